"""Dynamic network surgery: pruning while training, with weights that may come back.

Source: Guo, Yao, Chen, "Dynamic Network Surgery for Efficient DNNs", NIPS 2016, arXiv 1608.04493,
and the authors' code. Names here -> theirs: raw weight -> W, mask -> T, `prune_below` -> a,
`splice_above` -> b, draw -> the random number that gates a layer's update.
"""

import warnings
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from morse.compression.surgery_mask import Flips, MaskedLayer, Thresholds
from morse.compression.surgery_state import check_state, draw_each, read_thresholds
from morse.compression.surgery_targets import PerLayer, check_settings, find_targets, per_layer


class NetworkSurgery:
    """Prunes a network's weights while it trains, and splices back those that grow again.

    Each weight has a mask of 0 or 1; the network computes with their product, but the gradient
    reaches the raw weight unmasked, so that a pruned weight goes on moving. Call `step` once before
    each update of the weights (with gradient accumulation, before the first of its forwards), train
    as usual, and `finalize` at the end.

    At the first step, each layer's thresholds are computed once, from the mean m and the standard
    deviation s of |w| over all of its parameters with masks: with t = max(m + c_rate * s, 0), a
    weight is pruned at |w| <= low * t and spliced back at |w| > high * t. A layer updates at
    iteration i < iter_stop with probability (1 + gamma * i) ** -power; later its masks stay.

    The masks are buffers of the module, so they follow it in `to`, `deepcopy` and DDP's broadcast
    (wrap it after this). Parameters stay the same objects, for optimizers made before. Yet where a
    layer is pruned in part (`prune_bias`, `include`, `exclude`), their order is another until
    `finalize`: make after this what counts them, such as averages and optimizers to resume.

    A moving average of the module has raw weights and masks too. To finish it, load it into a copy:
    `twin = copy.deepcopy(surgery)`, `twin.module.load_state_dict(average.module.state_dict())` and
    `twin.finalize()`, which returns the finished average; the training may go on.

    Args:
        module: Network to prune, trained before (thresholds come from its weights).
        c_rate: The higher, the more is pruned; a number, or {layer's name or glob: number}, where
            a layer that is not named has 3. The paper's LeNets have 2 to 5.
        gamma: How fast updates get rarer, at least 0.
        power: Exponent of that decay, at least 0.
        iter_stop: Iteration from which masks stay, above 0; a number or a mapping, as `c_rate`,
            of which the default is 10000.
        low: Factor of the pruning threshold, at least 0.
        high: Factor of the splicing threshold, at least `low`; weights between keep their mask.
        prune_bias: Whether biases are pruned too, by their layer's thresholds.
        include: Names or globs of the layers or parameters to prune, out of the trainable weights
            and biases of convolutions and linear layers, which are all pruned by default; any
            other parameter can be named in full. Normalisation layers are thus left alone.
        exclude: Names or globs of what to leave alone; a zero-initialised layer must be here.
        generator: Source of the draws; by default an own one with a fixed seed, so that all
            processes of a distributed run agree.

    Raises:
        ValueError: If an argument is out of its range, a name is unknown, a parameter asked for is
            frozen, nothing is left to prune, or the module is under another surgery.

    Example:
        >>> import torch
        >>> from morse.compression import NetworkSurgery
        >>> layer = torch.nn.Linear(4, 2)
        >>> _ = torch.nn.init.constant_(layer.bias, 0.5)
        >>> weight = [[1.0, 0.1, 2.0, 0.2], [0.3, -3.0, 0.1, -0.2]]
        >>> _ = layer.weight.data.copy_(torch.tensor(weight))
        >>> surgery = NetworkSurgery(layer, c_rate=0.0, iter_stop=1, prune_bias=False)
        >>> _ = surgery.step()
        >>> layer.weight.tolist()
        [[1.0, 0.0, 2.0, 0.0], [0.0, -3.0, 0.0, 0.0]]
        >>> surgery.density()
        0.375
        >>> surgery.finalize() is layer
        True
    """

    def __init__(
        self,
        module: nn.Module,
        *,
        c_rate: PerLayer = 3.0,
        gamma: float = 1e-3,
        power: float = 1.0,
        iter_stop: PerLayer = 10000,
        low: float = 0.9,
        high: float = 1.1,
        prune_bias: bool = True,
        include: str | Iterable[str] | None = None,
        exclude: str | Iterable[str] | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        """Check the settings and give every target a mask of ones."""
        check_settings(gamma, power, low, high)
        targets = find_targets(module, include, exclude, prune_bias)
        rates = per_layer("c_rate", c_rate, targets, 3.0)
        stops = per_layer("iter_stop", iter_stop, targets, 10000)
        self.module = module
        self.gamma, self.power, self.low, self.high = gamma, power, low, high
        self.generator = torch.Generator().manual_seed(0) if generator is None else generator
        self.iteration = -1
        self.frozen = self.finalized = False
        self._thresholds: dict[str, Thresholds] = {}
        self._layers = {
            name: MaskedLayer(name, layer, names, rates[name], stops[name])
            for name, (layer, names) in targets.items()
        }
        self._flips = dict.fromkeys(self.masks, Flips(0, 0))

    @property
    def masks(self) -> dict[str, Tensor]:
        """The masks by parameter name, bool, shaped like the parameter: the live ones."""
        return {k: mask for layer in self._layers.values() for k, mask in layer.masks.items()}

    @property
    def thresholds(self) -> dict[str, Thresholds]:
        """Each layer's thresholds, with mean and spread; empty before the first step."""
        return dict(self._thresholds)

    @property
    def flips(self) -> dict[str, Flips]:
        """How many entries of each parameter the latest step pruned and spliced."""
        return dict(self._flips)

    def density(self, name: str | None = None) -> float:
        """Return the share of entries whose mask is 1: of a layer, a parameter, or all targets.

        Raises:
            ValueError: If `name` is neither a layer nor a parameter under surgery.
        """
        chosen = [
            mask
            for layer_name, layer in self._layers.items()
            for full, mask in layer.masks.items()
            if name in (None, layer_name, full)
        ]
        if not chosen:
            raise ValueError(f"name must be one of {[*self._layers, *self.masks]}, got {name!r}.")
        return sum(int(mask.sum()) for mask in chosen) / sum(mask.numel() for mask in chosen)

    @torch.no_grad()
    def step(
        self, iteration: int | None = None, draws: Mapping[str, float] | None = None
    ) -> dict[str, bool]:
        """Update the masks; call it once before each update of the weights.

        Args:
            iteration: Iteration i, at least that of the latest step; by default the one after it,
                beginning at 0.
            draws: Draws r in [0, 1] by layer, to replay a run; others come from the generator.

        Returns:
            Whether each layer was updated.

        Raises:
            ValueError: If the iteration decreases, a draw is out of range or for an unknown layer,
                the entries of a layer are all zero at the first step, or after `finalize`.
        """
        self._check_open("step")
        iteration = self.iteration + 1 if iteration is None else iteration
        if iteration < max(self.iteration, 0):
            raise ValueError(
                f"iteration must not decrease, got {iteration} after {self.iteration}; "
                "load_state_dict() to go back."
            )
        if not self._thresholds and not self.frozen:
            self._thresholds = {
                name: layer.measure(self.low, self.high) for name, layer in self._layers.items()
            }
        drawn = draw_each(self._layers, self.generator, draws or {})
        self.iteration = iteration
        self._flips = dict.fromkeys(self.masks, Flips(0, 0))
        chance = (1 + self.gamma * iteration) ** -self.power
        updated = {
            name: not self.frozen and iteration < layer.iter_stop and chance > drawn[name]
            for name, layer in self._layers.items()
        }
        for name in filter(updated.get, updated):
            self._flips |= self._layers[name].update(self._thresholds[name])
        return updated

    def freeze(self) -> None:
        """Leave the masks as they are from now on; training may continue."""
        self._check_open("freeze")
        self.frozen = True

    def finalize(self) -> nn.Module:
        """Write zeros into the pruned weights, remove the masks and return the module.

        Outputs stay the same, and so do the parameters as objects. Warns if some layer has not
        reached `iter_stop`, where its masks could still have changed.

        Raises:
            ValueError: If it was done before.
        """
        self._check_open("finalize")
        early = [n for n, layer in self._layers.items() if self.iteration < layer.iter_stop - 1]
        if early and not self.frozen:
            warnings.warn(
                f"iter_stop was not reached (iteration {self.iteration}) in layers {early}; lower "
                "it, or freeze() the masks and train on.",
                stacklevel=2,
            )
        for layer in self._layers.values():
            layer.bake()
        self.finalized = True
        return self.module

    def state_dict(self) -> dict[str, Tensor]:
        """Return what a resumed run needs besides the module's raw weights, all as tensors.

        These are "masks.{parameter}", "thresholds.{layer}" (a, b, mean, spread; none before the
        first step), "iteration", "frozen" and "generator". All but the masks are on the CPU.
        """
        state = {f"masks.{name}": mask.clone() for name, mask in self.masks.items()}
        for name, values in self._thresholds.items():
            state[f"thresholds.{name}"] = torch.tensor(values, dtype=torch.float64, device="cpu")
        state["iteration"] = torch.tensor(self.iteration, device="cpu")
        state["frozen"] = torch.tensor(self.frozen, device="cpu")
        state["generator"] = self.generator.get_state()
        return state

    @torch.no_grad()
    def load_state_dict(self, state_dict: Mapping[str, Tensor]) -> None:
        """Continue from what `state_dict` returned; the raw weights are the module's matter.

        Raises:
            ValueError: If names or shapes are others, the generator's state is none, or after
                `finalize`; nothing is loaded then.
        """
        self._check_open("load_state_dict")
        check_state(state_dict, self.state_dict(), self._layers)
        try:
            self.generator.set_state(state_dict["generator"].cpu())
        except RuntimeError as error:
            raise ValueError(f"generator is no state of one: {error}") from error
        for name, mask in self.masks.items():
            mask.copy_(state_dict[f"masks.{name}"])
        self._thresholds = read_thresholds(state_dict, self._layers)
        self.iteration = int(state_dict["iteration"])
        self.frozen = bool(state_dict["frozen"])
        self._flips = dict.fromkeys(self.masks, Flips(0, 0))

    def _check_open(self, action: str) -> None:
        if self.finalized:
            raise ValueError(f"{action}() after finalize(): the masks are gone; start another one.")
