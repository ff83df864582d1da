"""A ControlNet beside the denoiser runs where Dash runs; Dot is steered by its latest features.

Pipelines evaluate it before every denoiser call, at about half of the denoiser's cost, so that it
would eat up most of what Dot saves. Several ControlNets are one module, which adds up what they
return.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from morse.branches import Branches
from morse.capture import map_tensors
from morse.denoisers import Call
from morse.plan import ModelName


@dataclass
class LatestFeatures:
    """The features computed last, for each branch of a step, and what they were computed for."""

    _branches: Branches = field(default_factory=Branches)
    _index: int | None = None

    def answer(
        self, index: int | None, model: ModelName, call: Call, compute: Callable[[], object]
    ) -> object:
        """Answer one call of the ControlNet.

        Args:
            index: Where the scheduler stands, or None.
            model: Which model makes the denoiser call that follows, as far as that is known.
            call: What the ControlNet is given. Features are used again where size and conditions
                are as they were: the strength, which its end sets to zero, the picture, the text.
            compute: Runs the ControlNet.
        """
        if index is None or index != self._index:
            self._branches.start_step(forget=model == "dash")
        self._index = index
        features = None if model == "dash" else self._branches.find(self, call)
        if features is None:
            features = compute()
            # Copied: compiled models reuse their output buffers.
            self._branches.keep(self, call, map_tensors(features, torch.clone))
        return features
