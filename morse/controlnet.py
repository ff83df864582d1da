"""A ControlNet beside the denoiser runs where Dash runs; Dot is steered by its latest features.

Pipelines evaluate it before every denoiser call, at about half of the denoiser's cost, so that it
would eat up most of what Dot saves.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor

from morse.plan import ModelName


@dataclass
class LatestFeatures:
    """The features computed last, for each branch of a step, and what they were computed for."""

    _kept: dict[int, tuple[object, object]] = field(default_factory=dict)
    _index: int | None = None
    _branch: int = -1

    def answer(
        self, index: int | None, model: ModelName, settings: object, compute: Callable[[], object]
    ) -> object:
        """Answer one call of the ControlNet.

        Args:
            index: Where the scheduler stands, or None.
            model: Which model the plan has for the denoiser call that follows.
            settings: What must be as it was for features to be used again: size, strength.
            compute: Runs the ControlNet.
        """
        again = index is not None and index == self._index
        self._index, self._branch = index, self._branch + 1 if again else 0
        kept_for, features = self._kept.get(self._branch, (None, None))
        if model == "dash" or kept_for != settings:
            features = compute()
            self._kept[self._branch] = settings, _clone(features)
        return features


def _clone(features: object) -> object:
    """Copy features: compiled models reuse their output buffers."""
    if isinstance(features, Tensor):
        return features.clone()
    if isinstance(features, (list, tuple)):
        return type(features)(_clone(each) for each in features)
    return type(features)(**{name: _clone(value) for name, value in features.items()})
