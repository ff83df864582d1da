"""Caches and patches of transformer blocks, put on and taken off again without a trace.

Those of diffusers keep a state that a pipeline resets after each call only if its model's class is
made for that, and the adaptive ones want to be told which branch is evaluated, which only newer
pipelines do. `_installed` sees to both, and removes every hook afterwards.
"""

import inspect
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from importlib.util import find_spec
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from morse.denoisers import find_denoiser
from morse.evaluation.bench.untouched import untouched
from morse.evaluation.conditions import base_class

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

BLOCK_LISTS = ("transformer_blocks", "single_transformer_blocks", "blocks", "layers")
# Timesteps between which attention is broadcast, as diffusers' documentation has them.
BROADCAST_RANGE = (100, 800)
SKIP_RANGE = (-1, 681)  # FasterCache's own default
# What TaylorSeer's authors extrapolate; diffusers' own pattern misses DiT's `attn1`.
EXTRAPOLATED = (r".*blocks\.\d+\.(attn\d*|ff|ff_context)",)
# cache-dit's own threshold, which goes with its own eight first blocks and eight steps of warm-up.
DEFAULT_THRESHOLD = 0.08
# With other thresholds: one block, and two steps, or few steps would be nothing but warm-up.
FOR_FEW_STEPS = {"Fn_compute_blocks": 1, "max_warmup_steps": 2}


def tomesd_obstacle(pipe: "DiffusionPipeline") -> str | None:
    """Tell why tomesd can't be measured with a pipeline; None if it can."""
    if find_spec("tomesd") is None:
        return "the package tomesd is not installed: pip install tomesd"
    unet = getattr(pipe, "unet", None)
    if unet is None or not any(type(m).__name__ == "BasicTransformerBlock" for m in unet.modules()):
        return (
            "not applicable: tomesd merges tokens in the transformer blocks of a UNet, and "
            f"{type(find_denoiser(pipe)).__name__} has none that it knows"
        )
    return None


@contextmanager
def tomesd(pipe: "DiffusionPipeline", ratio: float) -> Iterator[None]:
    """Sample with a share `ratio` of the tokens merged (Bolya and Hoffman 2023, 2303.17604).

    They are merged where attention sees most of them: at all positions in Stable Diffusion, which
    is tomesd's default, and at half of the resolution in SDXL, which has no attention before.
    """
    from tomesd import apply_patch, remove_patch

    kinds = enumerate(pipe.unet.config.down_block_types)
    level = next((level for level, kind in kinds if "CrossAttn" in kind), 0)
    with untouched(pipe.unet):  # it leaves its settings behind
        apply_patch(pipe.unet, ratio=ratio, max_downsample=2**level)
        try:
            yield
        finally:
            remove_patch(pipe.unet)


def block_obstacle(pipe: "DiffusionPipeline") -> str | None:
    """Tell why a cache of whole blocks can't be measured; None if it can."""
    denoiser = find_denoiser(pipe)
    blocks = _blocks(denoiser)
    if len(blocks) < 2:
        return _no_transformer(denoiser)
    from diffusers.hooks._helpers import TransformerBlockRegistry

    for block in blocks:
        try:
            TransformerBlockRegistry.get(type(block))
        except ValueError:
            return f"not applicable: diffusers does not know {type(block).__name__}"
    return None


def attention_obstacle(pipe: "DiffusionPipeline") -> str | None:
    """Tell why a cache of attention in a transformer can't be measured; None if it can."""
    denoiser = find_denoiser(pipe)
    return None if _blocks(denoiser) else _no_transformer(denoiser)


def faster_cache_obstacle(pipe: "DiffusionPipeline") -> str | None:
    """Tell why FasterCache can't be measured; None if it can."""
    if type(pipe).__name__.startswith("DiT"):
        return "not applicable: FasterCache wants the branch with the prompt last, DiT has it first"
    return attention_obstacle(pipe)


def cache_dit_obstacle(pipe: "DiffusionPipeline") -> str | None:
    """Tell why cache-dit can't be measured; None if it can."""
    if find_spec("cache_dit") is None:
        return "the package cache-dit is not installed: pip install cache-dit"
    return attention_obstacle(pipe)


def _blocks(denoiser: nn.Module) -> list[nn.Module]:
    lists = (getattr(denoiser, name, None) for name in BLOCK_LISTS)
    return [block for blocks in lists if isinstance(blocks, nn.ModuleList) for block in blocks]


def _no_transformer(denoiser: nn.Module) -> str:
    return (
        "not applicable: it caches the blocks of a transformer, and "
        f"{type(denoiser).__name__} is none"
    )


def first_block_cache(pipe: "DiffusionPipeline", threshold: float) -> AbstractContextManager[None]:
    """Skip all blocks but the first where its residual changed by less than `threshold`."""
    from diffusers.hooks import FirstBlockCacheConfig, apply_first_block_cache

    config = FirstBlockCacheConfig(threshold=threshold)
    return _installed(pipe, lambda denoiser, _: apply_first_block_cache(denoiser, config))


def pyramid_attention(pipe: "DiffusionPipeline", every: float) -> AbstractContextManager[None]:
    """Evaluate attention every so many steps between `BROADCAST_RANGE` (Zhao et al. 2024)."""
    from diffusers.hooks import PyramidAttentionBroadcastConfig, apply_pyramid_attention_broadcast

    def install(denoiser: nn.Module, timestep: Callable[[], float]) -> None:
        config = PyramidAttentionBroadcastConfig(
            spatial_attention_block_skip_range=int(every),
            spatial_attention_timestep_skip_range=BROADCAST_RANGE,
            cross_attention_block_skip_range=int(every),
            cross_attention_timestep_skip_range=BROADCAST_RANGE,
            current_timestep_callback=timestep,
        )
        apply_pyramid_attention_broadcast(denoiser, config)

    return _installed(pipe, install)


def faster_cache(pipe: "DiffusionPipeline", every: float) -> AbstractContextManager[None]:
    """Leave out attention and the branch without a prompt in most steps (Lv et al. 2024)."""
    from diffusers.hooks import FasterCacheConfig, apply_faster_cache

    def install(denoiser: nn.Module, timestep: Callable[[], float]) -> None:
        # Where branches are evaluated one by one there is no batch to halve.
        config = FasterCacheConfig(
            is_guidance_distilled=_names_branches(pipe),
            spatial_attention_block_skip_range=int(every),
            spatial_attention_timestep_skip_range=SKIP_RANGE,
            attention_weight_callback=lambda _: 0.3,  # as diffusers' example has it
            tensor_format="BCHW",
            current_timestep_callback=timestep,
        )
        apply_faster_cache(denoiser, config)

    return _installed(pipe, install)


def taylorseer(pipe: "DiffusionPipeline", interval: float) -> AbstractContextManager[None]:
    """Evaluate attention every so many steps, else extrapolate it linearly (Liu et al. 2025)."""
    from diffusers.hooks import TaylorSeerCacheConfig, apply_taylorseer_cache

    config = TaylorSeerCacheConfig(
        cache_interval=int(interval),
        taylor_factors_dtype=torch.float32,
        cache_identifiers=list(EXTRAPOLATED),
    )
    return _installed(pipe, lambda denoiser, _: apply_taylorseer_cache(denoiser, config))


@contextmanager
def cache_dit(pipe: "DiffusionPipeline", threshold: float) -> Iterator[None]:
    """Skip middle blocks where the first ones changed by less than `threshold` (cache-dit)."""
    import cache_dit as package

    denoiser = find_denoiser(pipe)
    own = {} if threshold == DEFAULT_THRESHOLD else FOR_FEW_STEPS
    config = package.DBCacheConfig(residual_diff_threshold=threshold, **own)

    def refresh() -> None:
        package.refresh_context(denoiser, num_inference_steps=len(pipe.scheduler.timesteps))

    with untouched(denoiser), _Run(refresh).follow(denoiser):
        try:
            package.enable_cache(denoiser, cache_config=config)
            yield
        finally:
            package.disable_cache(denoiser)


@contextmanager
def _installed(
    pipe: "DiffusionPipeline", install: Callable[[nn.Module, Callable[[], float]], None]
) -> Iterator[None]:
    """Install hooks of diffusers, reset them at each new run, and remove every trace.

    Args:
        pipe: A pipeline.
        install: Called with the denoiser and a function that tells the current timestep.
    """
    from diffusers.hooks import HookRegistry

    denoiser = find_denoiser(pipe)
    run = _Run(lambda: None if _names_branches(pipe) else _reset_caches(denoiser))
    with untouched(denoiser), run.follow(denoiser):
        for module in denoiser.modules():  # registries that remember the tree without these hooks
            vars(module).pop("_diffusers_hook", None)
        install(denoiser, lambda: run.timestep)
        HookRegistry.check_if_exists_or_initialize(denoiser).invalidate_child_registries_cache()
        yield


def _names_branches(pipe: "DiffusionPipeline") -> bool:
    """Tell whether a pipeline tells caches which branch it evaluates, and resets them itself."""
    return "cache_context(" in inspect.getsource(base_class(pipe).__call__)


def _reset_caches(denoiser: nn.Module) -> None:
    from diffusers.hooks.hooks import CacheContext, HookRegistry, _set_cache_context

    HookRegistry.check_if_exists_or_initialize(denoiser).reset_stateful_hooks()
    _set_cache_context(denoiser, CacheContext("both branches"))


class _Run:
    """Follows a denoiser's evaluations, so that no cache outlives its run.

    Attributes:
        timestep: The latest one, in training steps: where they run up to 1 they are multiplied.
    """

    def __init__(self, reset: Callable[[], None]):
        """Begin before the first run; `reset` is called where a run begins."""
        self.reset = reset
        self.timestep = self._first = float("nan")

    def follow(self, denoiser: nn.Module) -> RemovableHandle:
        """Note each evaluation from now on, till the handle's context ends."""
        return denoiser.register_forward_pre_hook(self._begin_evaluation, with_kwargs=True)

    def _begin_evaluation(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        """Note the timestep; a run begins where it is as large as the first one."""
        value = kwargs["timestep"] if "timestep" in kwargs else args[1]
        timestep = float(torch.as_tensor(value).flatten()[0])
        if not timestep < self._first:  # each run's timesteps fall
            self._first = timestep
            self.reset()
        self.timestep = timestep * 1000 if self._first <= 1 else timestep
