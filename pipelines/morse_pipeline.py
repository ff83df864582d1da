"""Stable Diffusion with Morse for diffusers' `custom_pipeline=`, where `morse` is installed.

pipe = DiffusionPipeline.from_pretrained(
    "path/to/model/with/dot", custom_pipeline="pipelines/morse_pipeline.py", trust_remote_code=True
)
pipe("a boat", lsd=10)

`MorsePipeline.from_pretrained` does the same for every kind of pipeline.
"""

from diffusers import StableDiffusionPipeline

from morse.attach import morse_class


class MorseStableDiffusionPipeline(morse_class(StableDiffusionPipeline, dot_is_component=True)):
    """A StableDiffusionPipeline that takes `lsd=` and loads the Dot saved with the model."""
