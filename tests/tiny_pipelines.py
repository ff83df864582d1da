"""Builders of tiny random pipelines."""

import inspect

import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput


class LoopPipeline(DiffusionPipeline):
    """The loop of StableDiffusionPipeline around an unconditional denoiser."""

    def __init__(self, unet, scheduler):
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler)

    @torch.no_grad()
    def __call__(self, batch_size=1, generator=None, num_inference_steps=10, output_type="pt"):
        self.scheduler.set_timesteps(num_inference_steps)
        config = self.unet.config
        shape = (batch_size, config.in_channels, config.sample_size, config.sample_size)
        image = torch.randn(shape, generator=generator) * getattr(
            self.scheduler, "init_noise_sigma", 1.0
        )
        takes_generator = "generator" in inspect.signature(self.scheduler.step).parameters
        options = {"generator": generator} if takes_generator else {}
        for timestep in self.progress_bar(self.scheduler.timesteps):
            model_input = image
            if hasattr(self.scheduler, "scale_model_input"):
                model_input = self.scheduler.scale_model_input(image, timestep)
            model_output = self.unet(model_input, timestep, return_dict=False)[0]
            image = self.scheduler.step(model_output, timestep, image, **options).prev_sample
        return ImagePipelineOutput(images=image)


def loop_pipeline(unet, scheduler):
    pipe = LoopPipeline(unet, scheduler)
    pipe.set_progress_bar_config(disable=True)
    return pipe
