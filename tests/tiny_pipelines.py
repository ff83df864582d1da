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


TEXT_CHANNELS = 8


def text_unet(in_channels=4, out_channels=4, **options):
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=16,
        in_channels=in_channels,
        out_channels=out_channels,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=TEXT_CHANNELS,
        attention_head_dim=4,
        norm_num_groups=4,
        **options,
    ).eval()


def xl_unet(**options):
    # 6 numbers about the picture, 4 channels each, and the pooled text.
    return text_unet(
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=6 * 4 + TEXT_CHANNELS,
        **options,
    )


def tiny_vae(channels=8, norm_num_groups=4, sample_size=32, **options):
    """Latents have a quarter of the picture's pixels."""
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    return AutoencoderKL(
        block_out_channels=(channels, channels),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=norm_num_groups,
        latent_channels=4,
        sample_size=sample_size,
        **options,
    ).eval()


def stable_diffusion(pipeline_class, unet, scheduler=None, xl=False, **more):
    """A Stable Diffusion pipeline that is called with `text_inputs()` in place of a prompt."""
    from diffusers import DDIMScheduler

    components = {"text_encoder": None, "tokenizer": None, "unet": unet, "vae": tiny_vae()}
    if xl:
        components |= {"text_encoder_2": None, "tokenizer_2": None}
    else:
        components |= {"safety_checker": None, "feature_extractor": None}
        components |= {"requires_safety_checker": False}
    scheduler = scheduler or DDIMScheduler(clip_sample=False, timestep_spacing="trailing")
    # What Stable Diffusion's own settings say; without them it warns.
    scheduler.register_to_config(steps_offset=1, clip_sample=False)
    pipe = pipeline_class(**components, scheduler=scheduler, **more)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def text_inputs(batch_size=2, pooled=False):
    generator = torch.Generator().manual_seed(3)
    names = ("prompt_embeds", "negative_prompt_embeds")
    inputs = {
        name: torch.randn(batch_size, 5, TEXT_CHANNELS, generator=generator) for name in names
    }
    if pooled:
        for name in ("pooled_prompt_embeds", "negative_pooled_prompt_embeds"):
            inputs[name] = torch.randn(batch_size, TEXT_CHANNELS, generator=generator)
    return inputs


def picture(batch_size=2, channels=3):
    generator = torch.Generator().manual_seed(4)
    return torch.rand(batch_size, channels, 32, 32, generator=generator)
