"""Pruning Dot while it trains: Dynamic Network Surgery (Guo et al. 2016), or once by magnitude.

`morse.compression.NetworkSurgery` does the pruning. Here it gets its thresholds from the share of
weights that are to go, its place in a training run, and its state in the run's checkpoints.
"""

import math
import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from morse.compression import NetworkSurgery
from morse.settings import changed, require

if TYPE_CHECKING:
    from morse.dot import MorseDot
    from morse.training.config import TrainDotConfig

PruneMethod = Literal["surgery", "one_shot"]

# The layer that starts at zero and that all else passes through; few weights.
KEPT = ("conv_out",)
_SETTINGS = ("prune_method", "prune_start", "prune_stop", "prune_gamma", "prune_power")
_PREFIX = "surgery."
# Of the updates left once pruning starts, the share after which masks stay: the paper's LeNet-5
# has 14,000 of 20,000.
_MOVING_SHARE = 0.7


def check_prune_settings(config: "TrainDotConfig") -> None:
    """Raise `ValueError` if a setting of pruning is out of its range or without effect."""
    if config.prune is None:
        for name in changed(config, _SETTINGS):
            value = getattr(config, name)
            raise ValueError(f"{name} is {value!r}, but prune is not given; give --prune too")
        return
    require(0 < config.prune < 1, "prune", config.prune, "a share of weights, in (0, 1)")
    for name in ("prune_gamma", "prune_power"):
        value = getattr(config, name)
        require(0 <= value < math.inf, name, value, "finite and at least 0")
    if config.prune_stop is not None and config.prune_method == "one_shot":
        raise ValueError(
            f"prune_stop is {config.prune_stop}, but prune_method is 'one_shot', whose masks stay "
            "from prune_start on; leave --prune_stop out"
        )
    last = config.max_train_steps
    start, stop = prune_bounds(config)
    require(0 <= start < last, "prune_start", start, f"in [0, {last}), max_train_steps")
    if config.prune_method == "surgery":
        allowed = f"in ({start}, {last}), between prune_start and max_train_steps"
        require(start < stop < last, "prune_stop", stop, allowed)


def prune_bounds(config: "TrainDotConfig") -> tuple[int, int]:
    """Give the updates before which pruning starts and from which the masks stay."""
    last, start, stop = config.max_train_steps, config.prune_start, config.prune_stop
    if start is None:
        start = last // 3 if config.init_from is None else 0
    if stop is None:
        stop = start + max(1, round(_MOVING_SHARE * (last - start)))
    return start, stop


class DotPruner:
    """Masks on Dot's own weights that a training run moves.

    They are on the weights of all convolutions and linear layers that are Dot's, its LoRA included,
    but for the last layer. Biases, normalisation and Dash are left alone.

    Up to update `start` nothing is masked but what was pruned before. Then each layer's thresholds
    are set such that the share `prune` of its weights goes; by the paper's rule, weights are pruned
    and spliced until update `stop`. The share has moved by then: as few masks as possible change so
    that it is what was asked for, and all stay. "one_shot" is that last act alone, at `start`: the
    smallest go.

    Thresholds that keep a share are the paper's with another c_rate for each layer. In a layer of
    zeros alone, such as a LoRA's that no gradient has reached, they are 0: any weight that moves
    comes back, until `stop`.

    Make it before the optimizer and the moving average: masks change the order of parameters.

    Args:
        dot: The network; its masks are made here and stay.
        config: With `prune` given.
    """

    def __init__(self, dot: "MorseDot", config: "TrainDotConfig") -> None:
        """Give every weight to prune a mask of ones, but for what a pruned Dot has at zero."""
        self.dot, self.share, self.method = dot, config.prune, config.prune_method
        self.start, self.stop = prune_bounds(config)
        self.surgery = NetworkSurgery(
            dot,
            gamma=config.prune_gamma,
            power=config.prune_power,
            iter_stop=self.stop - self.start,
            prune_bias=False,
            exclude=KEPT,
            generator=torch.Generator().manual_seed(config.seed),
        )
        if dot.config.sparse:
            for name, weight in raw_weights(self.surgery).items():
                self.surgery.masks[name].copy_(weight != 0)

    @property
    def settings(self) -> dict[str, object]:
        """What decides how a run is pruned, as JSON."""
        surgery = self.surgery
        schedule = [self.start, self.stop, surgery.gamma, surgery.power]
        return {"prune": self.share, "prune_method": self.method, "prune_schedule": schedule}

    @property
    def is_settled(self) -> bool:
        """Whether the masks have their last values."""
        return self.surgery.frozen

    def summary(self) -> str:
        """Say what was pruned."""
        masks = self.surgery.masks.values()
        kept, total = sum(int(mask.sum()) for mask in masks), sum(mask.numel() for mask in masks)
        own = sum(parameter.numel() for parameter in self.dot.parameters())
        note = "" if self.is_settled else f"; it was to end at update {self.stop}"
        return (
            f"pruning left {kept:,} of {total:,} weights ({kept / total:.1%}); Dot has {own:,} "
            f"parameters in all{note}"
        )

    @torch.no_grad()
    def before_step(self, step: int) -> None:
        """Move the masks; to be called once before update `step`, counted from 0."""
        begun = self.surgery.iteration
        # A longer run resumed from a shorter one would begin later, but its masks move already.
        if (step < self.start and begun < 0) or self.is_settled:
            return
        if self.method == "one_shot" or step >= self.stop:
            keep_share(self.surgery, 1 - self.share)
            self.surgery.freeze()
            return
        if not self.surgery.thresholds:
            set_thresholds(self.surgery, self.share)
        with warnings.catch_warnings():
            # Said of every LoRA, whose outputs are as many as its weights are few.
            warnings.filterwarnings("ignore", message=".* entries of .* are left")
            self.surgery.step(max(step - self.start, begun + 1))

    def state_dict(self) -> dict[str, Tensor]:
        """Return raw weights, masks, thresholds and the source of draws: a checkpoint's tensors."""
        surgery = {
            _PREFIX + name: value
            for name, value in self.surgery.state_dict().items()
            if not name.startswith("masks.")  # which are buffers of Dot
        }
        return self.dot.state_dict() | surgery

    def load_state_dict(self, state_dict: Mapping[str, Tensor]) -> None:
        """Continue from what `state_dict` returned.

        Raises:
            RuntimeError: If it is that of another network, or has masks on other weights.
            ValueError: If it is of a run without pruning.
        """
        if f"{_PREFIX}iteration" not in state_dict:
            raise ValueError(
                "the checkpoint is of a run without prune; go on without it, and then prune "
                "in a new run with --init_from"
            )
        own = {k: v for k, v in state_dict.items() if not k.startswith(_PREFIX)}
        self.dot.load_state_dict(own)
        surgery = {
            k.removeprefix(_PREFIX): v for k, v in state_dict.items() if k.startswith(_PREFIX)
        }
        masks = {f"masks.{name}": mask for name, mask in self.surgery.masks.items()}
        self.surgery.load_state_dict(masks | surgery)

    def masked_state(self, averages: Sequence[Tensor] | None = None) -> dict[str, Tensor]:
        """Return the state dict of a Dot without masks whose pruned weights are zero.

        Args:
            averages: Averages of the raw weights in the order of Dot's parameters, to take in place
                of the present ones. They are masked as the present ones are, so that a weight
                which is pruned now is zero, whatever it was when it was averaged.
        """
        raw = dict(self.dot.named_parameters())
        if averages is not None:
            raw = dict(zip(raw, averages, strict=True))
        state = {_plain(k): v for k, v in self.dot.state_dict().items() if not _is_mask(k)}
        state |= {_plain(name): value.detach() for name, value in raw.items()}
        for name, mask in self.surgery.masks.items():
            # Not a product, in which negative weights would leave -0.0.
            state[name] = state[name].masked_fill(~mask.to(state[name].device), 0)
        return state


def raw_weights(surgery: NetworkSurgery) -> dict[str, nn.Parameter]:
    """Give the raw weights under surgery by name, in the order of `surgery.masks`."""
    raw = {_plain(name): parameter for name, parameter in surgery.module.named_parameters()}
    return {name: raw[name] for name in surgery.masks}


@torch.no_grad()
def set_thresholds(surgery: NetworkSurgery, share: float) -> None:
    """Set thresholds, before the first step, by which `share` of each layer's weights is pruned.

    Where as much was pruned before, they lie at the smallest weight that is left: at 0, whatever
    moves would come back.
    """
    state = surgery.state_dict()
    for name, weight in raw_weights(surgery).items():
        sizes = weight.abs().masked_fill(~surgery.masks[name], 0).flatten()
        kept, count = sizes[sizes > 0], round(share * len(sizes))
        if 0 < len(kept) < len(sizes):
            count = max(count, len(sizes) - len(kept) + 1)
        below = sizes.kthvalue(count).values.item() if count else 0.0
        above = below * surgery.high / surgery.low
        spread = (kept if len(kept) else sizes).cpu().double()  # not every device has it
        mu, std = spread.mean().item(), spread.std(correction=0).item()
        layer = name.rpartition(".")[0]
        state[f"thresholds.{layer}"] = spread.new_tensor([below, above, mu, std])
    surgery.load_state_dict(state)


@torch.no_grad()
def keep_share(surgery: NetworkSurgery, share: float) -> None:
    """Let each weight matrix keep exactly `share` of its entries, changing no more than needed.

    Where it keeps more, the smallest are pruned; where fewer, the largest pruned ones come back.
    """
    masks = surgery.masks
    for name, weight in raw_weights(surgery).items():
        mask, sizes = masks[name].flatten(), weight.abs().flatten()
        count = max(1, round(share * len(sizes)))
        missing = count - int(mask.sum())
        if missing < 0:
            chosen = sizes.masked_fill(~mask, -1).topk(count).indices
            mask = torch.zeros_like(mask)
        else:
            chosen = sizes.masked_fill(mask, -1).topk(missing).indices
        masks[name].copy_(mask.index_fill(0, chosen, True).view_as(weight))


def _is_mask(name: str) -> bool:
    return ".parametrizations." in f".{name}" and name.endswith(".mask")


def _plain(name: str) -> str:
    """Give a parameter's name without masks."""
    return name.replace("parametrizations.", "").removesuffix(".original")
