"""MorseDot: the network between two Dash evaluations (Morse, ICML 2025, section 3.3)."""

from itertools import pairwise
from typing import Self

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from morse.dot.blocks import DotDownBlock, DotUpBlock, check_options, num_groups
from morse.dot.body import embed_time, embed_times, run_body
from morse.dot.card import dot_card
from morse.dot.conv_layers import share_time
from morse.dot.conv_settings import Conv, conv_settings
from morse.dot.convolutions import (
    ConvolutionSummary,
    install_convolutions,
    summarize_convolutions,
    warn_unless_saving,
)
from morse.dot.fingerprint import fingerprint
from morse.dot.gate import Gate
from morse.dot.grid import check_size, find_grid, with_sample_size
from morse.dot.guidance import DotGuidance, GuidanceEmbedding, check_dot_guidance
from morse.dot.hub import Publishable
from morse.dot.inputs import dot_inputs, input_channels
from morse.dot.loading import align_weights, safetensors_only
from morse.dot.lora import LowRank, nest_adapter
from morse.dot.mixture import GaussianMixture
from morse.dot.ports import default_widths, describe_layers, find_ports, lora_targets
from morse.dot.relay import Norm, install_relay
from morse.dot.resampling import Resample, set_upsamplers
from morse.dot.sharing import SharesDash
from morse.dot.shell import run_hooked
from morse.dot.storage import SparselyStored
from morse.dot.view import place_channels_last
from morse.dot.wrapped import unwrap
from morse.history import check_history
from morse.sampling import JumpPoint
from morse.spaces import BaseSpace, check_base_space


class MorseDot(SharesDash, Publishable, SparselyStored, ModelMixin, ConfigMixin):
    """Predicts what to add to Dash's latest estimate, from both points of the trajectory.

    The sample, the jump point's sample and the jump point's estimate go through
    `num_down_blocks` extra down-sampling blocks, Dash's own frozen layers with LoRA (at
    4^num_down_blocks times fewer positions), and as many up-sampling blocks with skip connections.
    The last layer starts at zero: an untrained Dot is exactly reuse of Dash's latest estimate.

    Create it with `from_dash`. Saved, it holds only its own weights; `from_pretrained` gives a Dot
    that must be bound to its Dash (`bind`, which `enable_morse` calls) before it can run.

    Args:
        dash_fingerprint: Identifies the Dash that it belongs to.
        lora_specs: Shape of every adapted layer of Dash, by name.
        sample_channels: Channels of what goes into Dash (inpainting's mask and image included).
        feature_channels: Channels that enter and leave Dash's shared layers.
        time_embed_dim: Size of Dash's time embedding.
        size_multiple: Height and width of a sample must be multiples of this.
        num_down_blocks: m, from 1 to 3.
        block_out_channels: Channels of the extra blocks, from full resolution inwards, m of them.
        layers_per_block: ResNet blocks in each extra block.
        lora_rank: Rank of the LoRA; 0 for none.
        lora_alpha: The LoRA is scaled by lora_alpha / lora_rank; None for 1.
        independent: Estimate from the sample alone, not as a correction: a control for experiments.
        speed_ratio: N on the machine named in the model card; plans for `lsd=` are made with it.
        plan_ratio: Evaluations per LSD that suit this Dot, by scheduler class name, "default", or
            "stochastic" where noise is added (1, all Dash, if left out; a name counts there only if
            its class always adds it). A number, or pairs [budget, ratio], each from a budget on.
        output_channels: Channels of Dash's estimate; None for `sample_channels`.
        base_space: What of Dash's latest estimate the residual is added to: "raw", "x0" or "v"; by
            the scheduler if None (`morse.rates.choose_base_space`). After the deterministic step
            that Dot is trained on, "raw" and "x0" of an epsilon agree.
        patch_size: Rows and columns of the sample in one token of a transformer; 1 for UNets.
        norm: "group", or "dnr": norms of the extra blocks that hand a state on, also from one Dot
            step to the next until Dash runs again (`morse.dot.relay`).
        plans: Searched plans (`morse plan`) by scheduler class name, each as a
            `morse.saved_plans.SavedPlan` has it; `find_saved_plan` there says which is run.
        sparse: Save only the weights that are not zero and their places: for a pruned Dot.
        history: Earlier estimates of Dash used: 1, or 0 as in the paper (`morse.history`).
        extrapolation_cap: With history, how far the residual's base follows the line through both
            estimates, in distances between these; 0 to let Dot see the line and no more.
        guidance: What Dot corrects under classifier-free guidance: the estimates of both "branches"
            as in the paper, or the "guided" one in one pass (`morse.dot.guidance`).
        conv: Convolutions of the extra blocks: "conv" for plain ones, "odconv", "kernel_warehouse"
            or "gridconv".
        conv_options: Settings of that kind by name: see `morse.dot.conv_settings`.
        resample: How the extra blocks double the resolution: "nearest" copies positions, "ske2grid"
            starts so and learns weights of each position, for samples of one size alone.
        sample_size: That height and width; `from_dash` takes those that Dash names.
        gate: Factors on the residual by t_s - t_i and t_i, as `morse.dot.gate.Gate` has them.
        mixture_size: Size of the Gaussian mixture saved along, with which plans may begin, as
            `morse.dot.mixture.GaussianMixture.to_config` gives it; None for none.

    Attributes:
        takes_dtype: Whether a pipeline's call brings it into Dash's precision; not in training,
            whose updates are too small for half precision.
    """

    takes_dtype = True

    @register_to_config
    def __init__(
        self,
        dash_fingerprint: dict[str, object],
        lora_specs: dict[str, dict[str, object]],
        sample_channels: int,
        feature_channels: int,
        time_embed_dim: int,
        size_multiple: int,
        num_down_blocks: int = 2,
        block_out_channels: tuple[int, ...] = (16, 32),
        layers_per_block: int = 1,
        lora_rank: int = 16,
        lora_alpha: float | None = None,
        independent: bool = False,
        speed_ratio: float | None = None,
        plan_ratio: dict[str, float | list[list[float]]] | None = None,
        output_channels: int | None = None,
        base_space: BaseSpace | None = None,
        patch_size: int = 1,
        norm: Norm = "group",
        plans: dict[str, list[dict[str, object]]] | None = None,
        sparse: bool = False,
        history: int = 0,
        extrapolation_cap: float = 1.0,
        guidance: DotGuidance = "branches",
        conv: Conv = "conv",
        conv_options: dict[str, object] | None = None,
        resample: Resample = "nearest",
        sample_size: tuple[int, int] | None = None,
        gate: dict[str, list[object]] | None = None,
        mixture_size: dict[str, object] | None = None,
    ) -> None:
        """Create the layers that are Dot's own."""
        super().__init__()
        check_base_space(base_space)
        check_history(history, extrapolation_cap, independent)
        check_dot_guidance(guidance, independent)
        check_options(num_down_blocks, block_out_channels, layers_per_block, lora_rank)
        self.independent, self.base_space = independent, base_space
        self.gate = Gate.from_config(gate)
        self.mixture = None if mixture_size is None else GaussianMixture(**mixture_size)
        self.history, self.extrapolation_cap = history, extrapolation_cap
        self.guidance = guidance
        alpha = lora_rank if lora_alpha is None else lora_alpha
        self.lora = nn.ModuleDict()
        self.adapters: dict[str, LowRank] = {}
        for name, spec in lora_specs.items() if lora_rank else ():
            self.adapters[name] = nest_adapter(self.lora, name, LowRank(spec, lora_rank, alpha))
        first = block_out_channels[0]
        levels = [*block_out_channels, feature_channels]
        self.jump_time = None if independent else nn.Linear(time_embed_dim, time_embed_dim)
        guided = guidance == "guided"
        self.guidance_embedding = GuidanceEmbedding(time_embed_dim) if guided else None
        output_channels = output_channels or sample_channels
        channels = input_channels(sample_channels, output_channels, independent, history)
        # Patches with a margin of one; without patches, a plain 3x3 convolution.
        self.conv_in = nn.Conv2d(channels, first, patch_size + 2, patch_size, padding=1)
        self.down_blocks = nn.ModuleList(
            DotDownBlock(channels, deeper, time_embed_dim, layers_per_block)
            for channels, deeper in pairwise(levels)
        )
        self.up_blocks = nn.ModuleList(
            DotUpBlock(deeper, channels, time_embed_dim, layers_per_block)
            for channels, deeper in reversed(list(pairwise(levels)))
        )
        self.conv_settings = conv_settings(conv, conv_options)
        by_level = list(zip(self.down_blocks, reversed(self.up_blocks), strict=True))
        self.warehouses = install_convolutions(
            by_level, self.conv_settings, time_embed_dim, patch_size
        )
        set_upsamplers(self.up_blocks, resample, sample_size, size_multiple, patch_size)
        self.norm_out = nn.GroupNorm(num_groups(first), first)
        self.conv_out = nn.Conv2d(first, output_channels * patch_size**2, 3, padding=1)
        for layer in filter(None, (self.jump_time, self.conv_out)):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)
        # Last, so that the other weights are drawn as without it.
        self.relay = install_relay(norm, by_level)
        self._merged = False
        self._unbind()

    @classmethod
    def from_dash(
        cls,
        dash: nn.Module,
        num_down_blocks: int = 2,
        block_out_channels: tuple[int, ...] | None = None,
        lora_rank: int = 16,
        **options: object,
    ) -> Self:
        """Create an untrained Dot for a pretrained denoiser, bound to it.

        Args:
            dash: The denoiser; it is not changed. Supported classes: see `morse.dot.ports.PORTS`.
            num_down_blocks: m, from 1 to 3; Dash's layers see 4^m times fewer positions.
            block_out_channels: m widths, from full resolution inwards; None for 16, 32, 64, four
                times as many on a transformer's tokens.
            lora_rank: Rank of the LoRA on every Linear and Conv2d of Dash; 0 for none.
            options: The other options of the class: `layers_per_block`, `lora_alpha`, ...

        Raises:
            ValueError: If its class is not supported, its attention fused, or an option is wrong.
        """
        dash = unwrap(dash)
        dot = cls(
            **describe_layers(dash, num_down_blocks),
            dash_fingerprint=fingerprint(dash),
            lora_specs=lora_targets(dash) if lora_rank else {},
            num_down_blocks=num_down_blocks,
            block_out_channels=tuple(block_out_channels or default_widths(dash)[:num_down_blocks]),
            lora_rank=lora_rank,
            **with_sample_size(options, dash.config.get("sample_size")),
        )
        warn_unless_saving(dot, dot.conv_settings)
        nn.Module.to(dot, dash.device, dash.dtype)  # without ModelMixin's warning
        return dot.bind(dash)

    def forward(
        self, sample: Tensor, timestep: Tensor, jump: JumpPoint, **dash_kwargs: object
    ) -> Tensor:
        """Predict the residual at `timestep`.

        Args:
            sample: x_ti, (B, C, H, W), or packed as Flux has it, (B, L, C).
            timestep: t_i, () or (B,), as Dash's forward method takes it.
            jump: The latest Dash evaluation, of the same batch. With norm="dnr" its `memory` is
                read and renewed: each call with one jump point is the next step of a relay.
            dash_kwargs: Conditions (class labels, ...), as Dash's forward method takes them.

        Returns:
            eta(x_ts, x_ti, z_ts, t_s, t_i) of Equation 5, (B, C_out, H, W), or packed.

        Raises:
            ValueError: If height or width do not fit, or no Dash is bound.
        """
        if not self._tree:
            self.bind(self._bound_dash())
        residual = run_hooked(self._dash[0], self._residual, sample, timestep, jump, **dash_kwargs)
        return residual if self.gate is None else self.gate(residual, timestep, jump.timestep)

    def set_gate(self, gate: dict[str, list[object]] | None) -> Self:
        """Scale the residual from now on by what `Gate.to_config` gave; None for not at all."""
        self.gate = Gate.from_config(gate)
        self.register_to_config(gate=gate)
        return self

    def set_mixture(self, mixture: GaussianMixture | None) -> Self:
        """Keep a mixture of Gaussians for the beginning of runs; None for none."""
        self.mixture = None if mixture is None else mixture.to(self.device, self.dtype)
        self.register_to_config(mixture_size=None if mixture is None else mixture.to_config())
        return self

    def _residual(
        self, sample: Tensor, timestep: Tensor, jump: JumpPoint, **dash_kwargs: object
    ) -> Tensor:
        tree = self._tree[0]
        grid = find_grid(find_ports(tree), sample, dash_kwargs.get("img_ids"), self.config)
        check_size(grid, getattr(self.conv_settings, "size", None), "conv='gridconv'")
        check_size(grid, self.config.sample_size, "resample='ske2grid'")
        timestep = timestep.reshape(-1).expand(len(sample))
        scale = dash_kwargs.get("timestep_cond")
        times, time_embedding = self._embed_times(timestep, jump, sample.dtype, scale)
        inputs = [sample] if self.independent else dot_inputs(sample, jump, self.history)
        hidden = torch.cat([grid.spread(each) for each in inputs], dim=1)
        hidden = self.conv_in(place_channels_last(hidden) if self._tree_state.is_merged else hidden)
        skips = []
        # Copied: a call that fails midway moves no state.
        relay = (dict(jump.memory),) if self.relay else ()
        for block in self.down_blocks:
            hidden, skip = block(hidden, time_embedding, *relay)
            skips.append(skip)
        factor = 2 ** len(self.down_blocks)
        hidden = run_body(tree, hidden, timestep, times, grid, factor, dash_kwargs)
        for block in self.up_blocks:
            hidden = block(hidden, skips.pop(), time_embedding, *relay)
        for states in relay:
            jump.memory.update(states)
        residual = self.conv_out(nn.functional.silu(self.norm_out(hidden)))
        residual = nn.functional.pixel_shuffle(residual, self.config.patch_size)
        return grid.gather(residual.contiguous())

    def _embed_times(
        self, timestep: Tensor, jump: JumpPoint, dtype: torch.dtype, scale: Tensor | None
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Embed where Dot is evaluated and, unless it is independent, what it corrects.

        Args:
            timestep: t_i, (B,).
            jump: Gives t_s and, to a Dot of guided estimates, the guidance scale.
            dtype: The sample's.
            scale: What `embed_times` takes as `guidance`.

        Returns:
            (B, time_embed_dim) by the name of Dash's layer, and the one for Dot's own blocks.
        """
        tree = self._tree[0]
        times, sources = embed_times(tree, timestep, dtype, scale), [timestep, scale]
        if not self.independent:
            since = jump.timestep.reshape(-1).expand(len(timestep))
            sources.append(since)
            shift = self.jump_time(embed_time(tree, since, dtype))
            if self.guidance_embedding is not None:
                sources.append(jump.guidance_scale)
                shift = shift + self.guidance_embedding(jump.guidance_scale, shift)
            times = {name: time + shift for name, time in times.items()}
        own = next(iter(times.values()))
        return times, own if self.training else share_time(self.conv_settings, own, sources)

    def convolution_summary(self) -> ConvolutionSummary:
        """Count the dynamic convolutions of the extra blocks and what they cost; `print` it."""
        return summarize_convolutions(self)

    @classmethod
    def from_pretrained(cls, path: str, **kwargs: object) -> Self:
        """Load a saved Dot as `ModelMixin.from_pretrained` does, from safetensors only."""
        loaded = super().from_pretrained(path, **safetensors_only(kwargs))
        align_weights(loaded[0] if isinstance(loaded, tuple) else loaded)
        return loaded

    def model_card(self) -> str:
        """Write the card that is saved along: what the config and the bound Dash tell."""
        return dot_card(self, self._dash[0].config.get("_name_or_path") if self._dash else None)
