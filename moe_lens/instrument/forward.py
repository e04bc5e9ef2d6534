"""What one forward of the model showed: its tokens, and the values of every observed layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import mlx.core as mx
import numpy as np

from moe_lens.errors import CaptureError
from moe_lens.families import MoELayer
from moe_lens.kernels import NO_EXPERT

ROUTING = frozenset({"expert_ids", "expert_weights"})


class Sink(Protocol):
    """Something that takes the values of each forward: a capture, a recorder, a statistic.

    `record` is called once after each forward. Its arrays are lazy: a sink evaluates what it
    keeps (or reduces it) before it returns, so that memory stays bounded.

    A sink whose layers do not depend on each other may say so with an attribute ``by_layer =
    True``. The model is then evaluated layer by layer, and `record` called after each layer of
    each forward, with a `Forward` of that layer alone: the values of all layers are never in
    memory together, whether or not the weights are.
    """

    values: frozenset[str]

    def record(self, forward: Forward) -> None: ...


def takes_layers(sink: Sink) -> bool:
    """Whether `sink` takes the layers of a forward one at a time."""
    return bool(getattr(sink, "by_layer", False))


@dataclass(frozen=True)
class Forward:
    """One forward of the model.

    Attributes:
        token_ids: [B, L] int, the input.
        valid: [B * L] bool, False where a token is a pad.
        continues: Whether this forward goes on with the sequences of the one before it (the
            same cache), as in generation.
        layers: Indices of the observed MoE layers.
        about: What whoever drives the model said of this forward.
    """

    token_ids: mx.array
    valid: np.ndarray
    continues: bool
    layers: tuple[int, ...]
    _modules: Mapping[int, MoELayer]
    _values: Mapping[int, Mapping[str, mx.array]]
    about: Any = None

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of the batch."""
        batch, length = self.token_ids.shape
        return batch, length

    def reason(self, name: str, layer: int) -> str | None:
        """Why `layer` cannot give the value `name`; None: it can."""
        return self._modules[layer].reason(name)

    def value(self, name: str, layer: int) -> mx.array:
        """[B * L, ...] the value of one layer, in the block's own dtype and slot order."""
        reason = self.reason(name, layer)
        if reason is not None:
            raise CaptureError(f"layer {layer} cannot give {name}: {reason}")
        try:
            value = self._values[layer][name]
        except KeyError:
            raise CaptureError(
                f"layer {layer} ({self._modules[layer].path}) ran without showing {name}, so the "
                "model changed under the capture: detach other hooks and load it again"
            ) from None
        trailing = 2 if name in ("expert_outputs", "expert_channels") else 1
        return value.reshape(-1, *value.shape[value.ndim - trailing :])

    def routing(self) -> tuple[mx.array, mx.array]:
        """Expert ids uint32 and weights float32, both [layers, B * L, k], best slot first.

        Slots are sorted by falling weight; of equal weights the block's lower slot is first.
        Where layers differ in k, the slots that one does not fill are last and hold `NO_EXPERT`
        and 0.
        """
        parts = [
            (self.value("expert_ids", layer), self.value("expert_weights", layer))
            for layer in self.layers
        ]
        widest = max(ids.shape[-1] for ids, _ in parts)
        ids = mx.stack([_widen(ids.astype(mx.uint32), widest, NO_EXPERT) for ids, _ in parts])
        weights = mx.stack([_widen(weights, widest, 0) for _, weights in parts]).astype(mx.float32)
        if widest > 1:
            rank = mx.where(ids == NO_EXPERT, mx.array(float("inf")), -weights)
            order = mx.argsort(rank, axis=-1)
            ids = mx.take_along_axis(ids, order, axis=-1)
            weights = mx.take_along_axis(weights, order, axis=-1)
        return ids, weights


def _widen(slots: mx.array, width: int, fill: int) -> mx.array:
    missing = width - slots.shape[-1]
    if missing == 0:
        return slots
    return mx.pad(slots, [(0, 0), (0, missing)], constant_values=mx.array(fill, slots.dtype))
