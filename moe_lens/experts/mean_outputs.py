"""What every expert answers on average to the tokens that were routed to it."""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from moe_lens.families import MoELayer
from moe_lens.instrument import Forward

Floats = NDArray[np.float64]

VALUES = ("expert_ids", "expert_outputs")
"""What every layer has to show."""


class MeanOutputs:
    """A sink that adds up the outputs of each expert; what it keeps does not grow with the text.

    Args:
        layers: The MoE layers of the model.

    Attributes:
        counts: By layer index [E] int64, tokens routed to each expert.
        sums: By layer index [E, hidden] float64, sums of the outputs before their weights (of a
            family that weighs the input of its experts: after them).
    """

    by_layer = True
    values = frozenset(VALUES)

    def __init__(self, layers: Sequence[MoELayer]) -> None:
        self._experts = {layer.index: layer.num_experts for layer in layers}
        self.counts = {
            index: np.zeros(experts, np.int64) for index, experts in self._experts.items()
        }
        self.sums: dict[int, Floats] = {}

    def record(self, forward: Forward) -> None:
        """Add one forward (called by the instrument)."""
        rows = mx.array(np.flatnonzero(forward.valid).astype(np.uint32))
        if not rows.size:
            return
        for index in forward.layers:
            experts = self._experts[index]
            ids = forward.value("expert_ids", index)[rows].reshape(-1)
            outputs = forward.value("expert_outputs", index)[rows].astype(mx.float32)
            outputs = outputs.reshape(-1, outputs.shape[-1])
            # Zero experts stand after those with weights: one more row takes them all.
            cell = mx.minimum(ids, experts)
            summed = mx.zeros((experts + 1, outputs.shape[-1])).at[cell].add(outputs)
            mx.eval(summed, cell)
            self.counts[index] += np.bincount(np.array(cell), minlength=experts + 1)[:experts]
            part = np.array(summed[:experts], np.float64)
            self.sums[index] = self.sums.get(index, 0.0) + part

    def means(self, index: int) -> Floats:
        """[E, hidden] of one layer; NaN for an expert that no token was routed to."""
        counts = self.counts[index][:, None]
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.where(counts > 0, self.sums[index] / counts, np.nan)
