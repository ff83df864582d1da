"""An unconditional pipeline that runs every diffusers scheduler."""

from collections.abc import Callable

import torch
from diffusers import DDPMPipeline, ImagePipelineOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor


class SolverPipeline(DDPMPipeline):
    """`DDPMPipeline` with the loop that diffusers' newer pipelines have.

    `DDPMPipeline` itself passes `generator` to a scheduler's step, which UniPC, DEIS, PNDM and Heun
    refuse, and does not scale the model's input, without which Heun's is wrong. With the
    schedulers that it can run, both give the same bits.

    Attributes:
        observer: Called with (timestep, model_output) after each evaluation; None for nobody.
    """

    observer: Callable[[Tensor, Tensor], None] | None = None

    @torch.no_grad()
    def __call__(
        self,
        batch_size: int = 1,
        generator: list[torch.Generator] | torch.Generator | None = None,
        num_inference_steps: int = 50,
        output_type: str = "np",
    ) -> ImagePipelineOutput:
        """Sample images.

        Args:
            batch_size: Images.
            generator: Where the first noise comes from, one an image or one for all.
            num_inference_steps: The scheduler's steps.
            output_type: "np" for arrays (B, H, W, C), "pt" for a tensor (B, C, H, W), in [0, 1].
        """
        size = self.unet.config.sample_size
        height, width = (size, size) if isinstance(size, int) else size
        shape = (batch_size, self.unet.config.in_channels, height, width)
        device = self._execution_device
        noise = randn_tensor(shape, generator, device=device, dtype=self.unet.dtype)
        # On the CPU: looking them up must not wait for a GPU.
        self.scheduler.set_timesteps(num_inference_steps)
        # Flow matching's schedulers scale nothing and have no words for it.
        sample = noise * getattr(self.scheduler, "init_noise_sigma", 1.0)
        scale = getattr(self.scheduler, "scale_model_input", lambda sample, timestep: sample)
        for timestep in self.progress_bar(self.scheduler.timesteps):
            model_input = scale(sample, timestep)
            model_output = self.unet(model_input, timestep).sample
            if self.observer is not None:
                self.observer(timestep, model_output)
            sample = self.scheduler.step(model_output, timestep, sample).prev_sample
        images = (sample / 2 + 0.5).clamp(0, 1)
        if output_type == "np":
            images = images.cpu().permute(0, 2, 3, 1).float().numpy()
        return ImagePipelineOutput(images=images)
