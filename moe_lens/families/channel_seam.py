"""The third seam: the channels inside the experts, which their down projections read.

Its classes are swapped only while channels are watched or masked, so it costs nothing otherwise.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from .class_swap import ClassSwaps, call_original
from .layer import MoELayer

VALUE = "expert_channels"


class ChannelSeam:
    """The channels of one MoE layer.

    Args:
        layer: The layer.
        emit: Takes ``expert_channels`` [..., k, width], in the slots of ``expert_outputs``.
    """

    def __init__(self, layer: MoELayer, emit: Callable[[str, mx.array], None]) -> None:
        self.watched = False
        """Whether the channels are handed over."""
        self.mask: mx.array | None = None
        """[E, width] what the channels of every expert are multiplied by, or None."""
        self._layer = layer
        self._emit = emit
        self._slots: mx.array | None = None
        self._listed: list[mx.array] = []
        self._swaps = ClassSwaps()

    def set_up(self) -> None:
        """Swap the down projections if they are watched or masked, otherwise put them back."""
        if self.mask is None and not self.watched:
            self._swaps.undo()
        elif not self._swaps:
            for expert, module in enumerate(self._layer.down_projections):
                listed = self._layer.list_experts
                self._swaps.swap(module, self._listed_call(expert) if listed else self._call())

    def take_down(self) -> None:
        """Put every class back and forget the mask."""
        self.mask, self.watched = None, False
        self._swaps.undo()
        self.begin()

    def begin(self) -> None:
        """Forget the previous forward."""
        self._slots = None
        self._listed.clear()

    def enter(self, ids: mx.array) -> None:
        """Remember which expert stands in which slot [..., k]: a Switch module sorts them."""
        self._slots = ids

    def emit_listed(self, slots: tuple[int, ...]) -> None:
        """Hand over what a list of experts showed one by one, in `slots` [tokens, k]."""
        if self.watched:
            self._emit(VALUE, mx.stack(self._listed).reshape(*slots, -1))
        self._listed.clear()

    def _call(self) -> Callable[..., mx.array]:
        """The down projection of a Switch module."""

        def call(
            module: nn.Module, x: mx.array, ids: mx.array, *args: Any, **kwargs: Any
        ) -> mx.array:
            if self.mask is not None:
                x = x * self.mask[ids][..., None, :].astype(x.dtype)
            if self.watched and self._slots is not None:
                self._emit(VALUE, _in_slots(x.squeeze(-2), ids, self._slots))
            output: mx.array = call_original(module, x, ids, *args, **kwargs)
            return output

        return call

    def _listed_call(self, expert: int) -> Callable[..., mx.array]:
        """The down projection of one expert of a list."""

        def call(module: nn.Module, x: mx.array) -> mx.array:
            if self.mask is not None:
                x = x * self.mask[expert].astype(x.dtype)
            if self.watched:
                self._listed.append(x)
            output: mx.array = call_original(module, x)
            return output

        return call


def _in_slots(channels: mx.array, ids: mx.array, slots: mx.array) -> mx.array:
    """[*slots, width] of `channels`, which stand in the order of `ids`.

    `ids` has the shape of `slots` [..., k], or one axis where SwitchGLU has sorted a long input by
    expert: the same sort is undone.
    """
    if ids.shape == slots.shape:
        return channels
    order = mx.argsort(slots.flatten())
    return channels[mx.argsort(order)].reshape(*slots.shape, -1)
