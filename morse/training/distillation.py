"""Trains Dot's features after Dash's, beside its output: `--distill`.

Dash's features are not kept in windows, so that each pair costs one more evaluation of Dash.
"""

import copy
from typing import TYPE_CHECKING, Self

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from morse.distillation import NORMTransform
from morse.dot import MorseDot
from morse.sampling import JumpPoint
from morse.training.common import derive_seed
from morse.training.distillation_terms import SEGMENTS, TERMS, TRANSFORMS
from morse.training.feature_taps import (
    StudentFeatures,
    TeacherFeatures,
    hooks,
    read_student,
    read_teacher,
)
from morse.training.guidance import each_branch

if TYPE_CHECKING:
    from morse.training.config import TrainDotConfig
    from morse.training.source import ConditionedImages


class DistilledDot(nn.Module):
    """A Dot in training with what only training needs: losses on features, NORM's transform.

    All parameters are trained and checkpointed together; `finished` gives the Dot alone.

    Args:
        dot: The network, bound to `dash`.
        dash: The frozen denoiser.
        transform: NORM's, on what goes into the first layer of Dot's up blocks; None for none.
    """

    def __init__(self, dot: MorseDot, dash: nn.Module, transform: NORMTransform | None) -> None:
        """Keep the parts; `terms` are added when the features' shapes are known."""
        super().__init__()
        self.dot, self.transform = dot, transform
        self.terms = nn.ModuleDict()
        self.weights: dict[str, float] = {}
        self._dash = (dash,)  # in a tuple, so that it does not become a child

    @property
    def independent(self) -> bool:
        """See `MorseDot`."""
        return self.dot.independent

    def bind(self, dash: nn.Module) -> Self:
        """Share the layers of `dash` from now on, after copying."""
        self.dot.bind(dash)
        self._dash = (dash,)
        return self

    def __getstate__(self) -> dict[str, object]:
        """Copies leave Dash behind; bind them again."""
        return {**super().__getstate__(), "_dash": ()}

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor,
        jump: JumpPoint,
        rng: torch.Generator | None = None,
        **conditions: object,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Predict residuals as Dot does; with `rng` give also the weighted sum of the losses.

        Args:
            sample: See `MorseDot.forward`.
            timestep: The same.
            jump: The same.
            rng: Source of what the losses draw.
            conditions: See `MorseDot.forward`.
        """
        expanded: list[Tensor] = []

        def run() -> Tensor:
            return self.dot(sample, timestep, jump, **conditions)

        with hooks(*self._insert_transform(expanded)):
            if rng is None:
                return run()
            residual, student = read_student(self._dash[0], self.dot, run, expanded)
        loss = residual.new_zeros((), dtype=torch.float32)
        if self.terms:
            teacher = read_teacher(self._dash[0], self.dot, sample, timestep, conditions)
            for name, term in self.terms.items():
                loss = loss + self.weights[name] * term(student, teacher, rng)
        return residual, loss

    def _insert_transform(self, expanded: list[Tensor]) -> list[RemovableHandle]:
        if self.transform is None:
            return []

        def transform(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            out, wide = self.transform(args[0])
            expanded.append(wide)
            return (out, *args[1:])

        return [self.dot.up_blocks[0].reduce.register_forward_pre_hook(transform)]

    def finished(self) -> MorseDot:
        """Give a copy of Dot as it will be used, the transform folded into its own layer."""
        dot = copy.deepcopy(self.dot).bind(self._dash[0]).eval()
        if self.transform is not None:
            block = dot.up_blocks[0]
            block.reduce = self.transform.fold(block.reduce)
        return dot


def add_distillation(
    dot: MorseDot, source: "ConditionedImages", config: "TrainDotConfig"
) -> MorseDot | DistilledDot:
    """Add what `config.distill` names to a Dot; without it, give the Dot itself.

    Both networks are evaluated once on an image of `source` for the shapes of their features.

    Raises:
        ValueError: If one of them does not fit this Dash, or would fill a pruned Dot's zeros.
        TypeError: If Dot's layer, into which NORM's transform is to be folded, is none it can be.
    """
    if not config.distill:
        return dot
    transforms = set(config.distill) & set(TRANSFORMS)
    if transforms and dot.config.sparse:
        raise ValueError(
            f"distill is {config.distill} and init_from is {config.init_from}, a pruned Dot, whose "
            f"zeros the transform of {transforms.pop()!r} would fill; distill first, then prune "
            "the result with init_from"
        )
    dash = source.pipeline.dash.model
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(config.seed, len(config.distill)))
        transform = None
        if transforms:
            layer = dot.up_blocks[0].reduce
            transform = NORMTransform(
                layer.in_channels, layer.in_channels, SEGMENTS, norm="none", init="identity"
            )
            transform.fold(layer)  # an error now, not after the training
        whole = DistilledDot(dot, dash, transform)
        student, teacher = _probe(whole, source)
        weights = config.distill_weight * (len(config.distill) // len(config.distill_weight))
        for name, weight in zip(config.distill, weights, strict=True):
            if name in TERMS:
                whole.terms[name] = TERMS[name](student, teacher)
                whole.weights[name] = weight
    return whole.to(dot.device)


@torch.no_grad()
def _probe(
    whole: DistilledDot, source: "ConditionedImages"
) -> tuple[StudentFeatures, TeacherFeatures]:
    pipeline, batch = source.pipeline, source.__getitems__([0])
    low, high = pipeline.guidance_scale
    clean = source.clean(batch)
    scale = None if high == 1 else torch.full((1,), low, device=clean.device)
    conditions = source.conditions(batch, scale)
    sample = each_branch(clean, conditions.branches)
    dash = pipeline.dash
    timestep = dash.schedule.timesteps[:1].expand(len(sample))
    inputs = conditions.inputs()

    def run() -> Tensor:
        output = dash.model(sample, timestep=timestep, return_dict=False, **inputs)[0]
        return whole.dot(sample, timestep, JumpPoint(sample, timestep, output), **inputs)

    with dash.autocast():
        teacher = read_teacher(dash.model, whole.dot, sample, timestep, inputs)
        return read_student(dash.model, whole.dot, run, [])[1], teacher
