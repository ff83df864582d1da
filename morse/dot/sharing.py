"""How a Dot holds on to its Dash without owning it, with its LoRA merged or beside the weights."""

from collections.abc import Callable
from typing import Self

from torch import Tensor, nn

from morse.dot.fingerprint import check_fingerprint, fingerprint, quantization_of
from morse.dot.lora import LowRank
from morse.dot.shell import moves_weights, update_tree, warn_of_other_forwards
from morse.dot.view import TreeState, check_projections, make_shared_tree, merge_shared_tree
from morse.dot.wrapped import unwrap


class SharesDash(nn.Module):
    """A network that runs the layers of a Dash, which is no part of it.

    Attributes:
        adapters: The LoRA, by the names of Dash's layers.
    """

    adapters: dict[str, LowRank]

    def _unbind(self) -> None:
        # In tuples, so that neither becomes a child of Dot.
        self._dash: tuple[nn.Module, ...] = ()
        self._checked: tuple[nn.Module, ...] = ()
        self._drop_tree()
        self._tree_state: TreeState | None = None

    # Of the Dash that a copy's original had then; a Dot without one knows its config's alone.
    _copied_with: dict[str, object] | None = None

    def _drop_tree(self) -> None:
        """Let go of the layers, as merged weights are as large as Dash: not two copies at a time.

        Graphs recorded of them (`morse.graphed`), which stand in a call's place, hold them too.
        """
        self._tree: tuple[nn.Module, ...] = ()
        forget = getattr(vars(self).get("_compiled_call_impl"), "forget", None)
        if forget is not None:
            forget()

    def check_dash(self, dash: nn.Module) -> None:
        """Raise `ValueError` unless `dash` is this Dot's and can be shared; changes nothing.

        It is not this Dot's if its fingerprint is another; it can't be shared if it is quantized or
        its attention fused.
        """
        dash = unwrap(dash)
        check_projections(dash)
        # A fingerprint reads whole weights, so that one is made for each Dash only.
        if all(known is not dash for known in (*self._dash, *self._checked)):
            check_fingerprint(dash, self.config.dash_fingerprint, self._copied_with)
            self._checked = (dash,)

    def adopt(self, dash: nn.Module) -> Self:
        """Belong to `dash` from now on; its layers are shared, and a LoRA merged, by the next run.

        Merging writes as much as Dash's weights, in vain where they are moved before that run.

        Raises:
            ValueError: If it is not the Dash of this Dot, is quantized, or its attention is fused.
        """
        dash = unwrap(dash)
        self.check_dash(dash)
        if not self._dash or self._dash[0] is not dash:
            self._unbind()
            self._dash = (dash,)
        warn_of_other_forwards(dash, self.adapters)
        return self

    def bind(self, dash: nn.Module) -> Self:
        """Share the layers of `dash` from now on.

        Raises:
            ValueError: As `adopt`.
        """
        dash = self.adopt(dash)._dash[0]
        # Its layers may have been replaced, moved or set otherwise since.
        state = TreeState(dash, self.adapters if self.is_merged else None)
        if self._tree and state == self._tree_state:
            update_tree(self._tree[0], dash)
        else:
            build = merge_shared_tree if self.is_merged else make_shared_tree
            self._drop_tree()
            self._tree, self._tree_state = (build(dash, self.adapters),), state
        return self

    @property
    def is_merged(self) -> bool:
        """Whether the LoRA is merged into a copy of Dash's weights; never of an offloaded Dash."""
        return self._merged and not (self._dash and moves_weights(self._dash[0]))

    def merge_lora(self) -> Self:
        """Run with the LoRA added to a copy of Dash's weights: faster, more memory, no training.

        Call it again after changing the LoRA's weights. An offloaded Dash is not copied.
        """
        self._merged = bool(self.adapters)
        self._drop_tree()
        return self

    def unmerge_lora(self) -> Self:
        """Run with the LoRA beside Dash's own weights again: slower, least memory, trainable."""
        self._merged = False
        self._drop_tree()
        return self

    def _apply(self, function: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # Merged weights, which are no parameters, would stay where they are until the next run.
        if self._tree_state is not None and self._tree_state.is_merged:
            self._drop_tree()
        return super()._apply(function, recurse)

    def _bound_dash(self) -> nn.Module:
        if not self._dash:
            raise ValueError("dot has no Dash yet: call dot.bind(dash) or enable_morse(pipe, dot).")
        return self._dash[0]

    def __getstate__(self) -> dict[str, object]:
        """Copies and pickles leave Dash behind; bind them again.

        They take a copy of that Dash too where it is another by then, as after a LoRA was fused
        into its weights and unloaded: its Dot stays with it.
        """
        left = {"_dash": (), "_checked": (), "_tree": (), "_tree_state": None}
        if self._dash and quantization_of(self._dash[0]) is None:
            found = fingerprint(self._dash[0])
            if found["weights"]:  # those on "meta" have no values to tell them by
                left["_copied_with"] = found
        return {**super().__getstate__(), **left}
