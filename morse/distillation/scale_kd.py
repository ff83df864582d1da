"""ScaleKD: a student learns the features of a large teacher of another architecture.

Source: Fan, Li, Liu, Yao, "ScaleKD: Strong Vision Transformers Could Be Excellent Teachers",
NeurIPS 2024, arXiv 2411.06786, and the authors' code. Its three parts: `cross_attention` (CAP),
`dual_view` (DFM) and `teacher_perception` (TPP).
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor, nn

from morse.distillation.cross_attention import CrossAttentionProjector, InputNorm
from morse.distillation.dual_view import DualViewMimicking, Reduction
from morse.distillation.functional import require
from morse.distillation.teacher_perception import TeacherParameterPerception


@dataclass(frozen=True)
class TapConfig:
    """One student feature that is distilled: its two projectors and how they are compared.

    The fields are arguments of `CrossAttentionProjector` and `DualViewMimicking`. `learned_query`
    is None for learned queries just where no other tap's tokens are the queries.
    """

    student_channels: int
    teacher_channels: int
    query_hw: tuple[int, int]
    input_hw: tuple[int, int] | None = None
    num_heads: int = 8
    softmax_scale: float = 5.0
    ffn_ratio: int = 4
    learned_query: bool | None = None
    norm: InputNorm = "batch"
    spatial_weight: float = 0.08
    frequency_weight: float = 0.06
    low_cutoff: tuple[int, int] = (1, 1)
    reduction: Reduction = "official"


class ScaleKDOutput(NamedTuple):
    """The sum, and its weighted parts: "mid_spatial", "mid_frequency", "last_spatial", ..."""

    loss: Tensor
    terms: dict[str, Tensor]


class ScaleKDLoss(nn.Module):
    """ScaleKD's feature distillation (Fan et al. 2024, arXiv 2411.06786).

    A middle feature of the student is projected to the teacher's middle width, sent through the
    teacher's remaining layers and compared with the teacher's last feature. What comes out also
    queries the projection of the student's last feature, compared with the same. All in two views,
    each with an own projector. Parameters are trained along with the student. Classifiers may also
    learn from logits, by `morse.distillation.functional.logit_distillation_loss`.

    Args:
        mid: The student's middle feature; `teacher_channels` and `query_hw` are those of the
            teacher where `tpp` begins.
        last: The student's last feature, in the teacher's last width; None for none.
        tpp: The teacher's layers between the two. Without it the middle tokens are compared as
            they are, and both taps have learned queries. As a part of this module they follow its
            `to` and `half`, which convert the teacher itself, and stand in its state dict, from
            which names that begin with "tpp." and "last_tpp." can be left out.
        last_tpp: More frozen layers, for the last tokens (the authors' for a ViT teacher: its last
            block).
        detach_query: Stop the last tap's gradient at its queries; the authors let it train the
            middle projectors too.

    Raises:
        ValueError: If a field of a tap is out of its range, or `last_tpp` lacks a last tap.

    Example:
        >>> import torch
        >>> from morse.distillation import ScaleKDLoss, TapConfig, TeacherParameterPerception
        >>> mid = TapConfig(6, 8, (4, 4), num_heads=2)
        >>> last = TapConfig(8, 12, (4, 4), num_heads=3)
        >>> tpp = TeacherParameterPerception(torch.nn.Linear(8, 12))
        >>> scale_kd = ScaleKDLoss(mid, last, tpp)
        >>> maps = (torch.randn(2, channels, 4, 4) for channels in (6, 8, 12))
        >>> out = scale_kd(*maps)
        >>> list(out.terms), bool(out.loss > 0)
        (['mid_spatial', 'mid_frequency', 'last_spatial', 'last_frequency'], True)
    """

    def __init__(
        self,
        mid: TapConfig,
        last: TapConfig | None,
        tpp: TeacherParameterPerception | None,
        *,
        last_tpp: TeacherParameterPerception | None = None,
        detach_query: bool = False,
    ) -> None:
        """Create the projectors."""
        super().__init__()
        require(last is not None or last_tpp is None, "last_tpp needs a last tap.")
        self.mid = ScaleKDTap(mid, learned_query=True)
        self.last = None if last is None else ScaleKDTap(last, learned_query=tpp is None)
        self.tpp, self.last_tpp = tpp, last_tpp
        self.detach_query = detach_query

    def forward(
        self,
        student_mid: Tensor,
        student_last: Tensor | None,
        teacher_last: Tensor,
        **tpp_kwargs: object,
    ) -> ScaleKDOutput:
        """Compare the student's features with the teacher's last one.

        Args:
            student_mid: Map (B, C, h, w) or tokens (B, h * w, C) of the middle tap.
            student_last: The same of the last tap; None if there is none.
            teacher_last: Teacher's last map, (B, Ct, H, W); no gradient reaches it.
            tpp_kwargs: What the teacher's layers take besides the tokens.

        Raises:
            ValueError: If a shape does not fit, or the last feature is missing or superfluous.
            TypeError: If there are `tpp_kwargs` but no teacher's layers.
        """
        require(
            (student_last is None) == (self.last is None),
            f"student_last must be {'None: there is no' if self.last is None else 'given for the'} "
            "last tap.",
        )
        if tpp_kwargs and self.tpp is None and self.last_tpp is None:
            raise TypeError(f"{sorted(tpp_kwargs)} are for the teacher's layers, but tpp is None.")
        tokens = self.mid.project(student_mid, (None, None), self.tpp, tpp_kwargs)
        terms = self.mid.compare("mid", tokens, teacher_last)
        if self.last is not None:
            queries = (None, None) if self.tpp is None else tokens
            if self.detach_query:
                queries = tuple(None if query is None else query.detach() for query in queries)
            tokens = self.last.project(student_last, queries, self.last_tpp, tpp_kwargs)
            terms |= self.last.compare("last", tokens, teacher_last)
        return ScaleKDOutput(sum(terms.values()), terms)

    def load_official(
        self, state_dict: Mapping[str, Tensor], prefix: str = "distill_losses."
    ) -> None:
        """Load the projectors from a state dict of the authors' distiller.

        Args:
            state_dict: Entries of other parts are ignored.
            prefix: What stands before "loss_fmd_s3" (the middle tap) and "loss_fmd_s4".

        Raises:
            ValueError: If names or shapes differ; nothing is loaded then.
        """
        taps = {"loss_fmd_s3": self.mid} | ({} if self.last is None else {"loss_fmd_s4": self.last})
        found = [
            (projector, projector.rename_official(state_dict, f"{prefix}{name}.projector_{index}."))
            for name, tap in taps.items()
            for index, projector in enumerate(tap.projectors())
        ]
        for projector, state in found:
            projector.load_state_dict(state)


class ScaleKDTap(nn.Module):
    """Two projectors of one student feature, one a view, and their comparison."""

    def __init__(self, config: TapConfig, learned_query: bool) -> None:
        """Create the projectors; `learned_query` counts where the config has None."""
        super().__init__()
        learned_query = learned_query if config.learned_query is None else config.learned_query
        self.cap_spatial, self.cap_frequency = (
            CrossAttentionProjector(
                config.student_channels, config.teacher_channels, config.query_hw, config.input_hw,
                num_heads=config.num_heads, softmax_scale=config.softmax_scale,
                ffn_ratio=config.ffn_ratio, learned_query=learned_query, norm=config.norm,
            )
            for _ in range(2)
        )  # fmt: skip
        self.mimicking = DualViewMimicking(
            config.spatial_weight, config.frequency_weight,
            low_cutoff=config.low_cutoff, reduction=config.reduction,
        )  # fmt: skip

    def projectors(self) -> Iterator[CrossAttentionProjector]:
        """Yield both projectors."""
        yield from (self.cap_spatial, self.cap_frequency)

    def project(
        self,
        x: Tensor,
        queries: tuple[Tensor | None, Tensor | None],
        stage: TeacherParameterPerception | None,
        kwargs: Mapping[str, object],
    ) -> tuple[Tensor, Tensor]:
        """Return the tokens of both views, after the teacher's layers if there are any."""
        tokens = [cap(x, query) for cap, query in zip(self.projectors(), queries, strict=True)]
        return tuple(each if stage is None else stage(each, **kwargs) for each in tokens)

    def compare(
        self, name: str, tokens: tuple[Tensor, Tensor], teacher: Tensor
    ) -> dict[str, Tensor]:
        """Return both views' losses, named after the tap."""
        return {f"{name}_{view}": loss for view, loss in self.mimicking(*tokens, teacher).items()}
