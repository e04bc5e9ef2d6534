"""The sink of a calibration: every forward of the model, reduced to sums."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from moe_lens.families import MoELayer
from moe_lens.instrument import Forward

from .similarity import compare_outputs, evaluate_all
from .statistics import NOT_AN_EXPERT, LayerStatistics


class CalibrationSink:
    """Adds each forward to the statistics of every MoE layer.

    Args:
        layers: The MoE layers of the model.
        similarity: Also keep the experts' inputs of the sampled tokens of a forward, for
            `compare_experts`.
    """

    layers: frozenset[int] | None = None

    def __init__(self, layers: Sequence[MoELayer], *, similarity: bool = True) -> None:
        self.values = frozenset({"expert_ids", "expert_weights", "expert_outputs"})
        if similarity:
            self.values |= {"expert_inputs"}
        self.sampled: NDArray[np.bool_] = np.zeros(0, bool)
        """[B * L] which tokens of the next forward are in the sample."""
        self.tokens = 0
        self._layers = {layer.index: layer for layer in layers}
        self._statistics = {
            layer.index: LayerStatistics.empty(layer.index, layer.num_experts, layer.k)
            for layer in layers
        }
        self._pending: dict[int, tuple[mx.array, NDArray[np.uint16]]] = {}

    @property
    def statistics(self) -> tuple[LayerStatistics, ...]:
        """What was added so far, by layer."""
        return tuple(self._statistics[index] for index in sorted(self._statistics))

    def record(self, forward: Forward) -> None:
        """Reduce one forward; called by the instrument after it."""
        self.tokens += int(forward.valid.sum())
        lazy = {}
        for index in forward.layers:
            outputs = forward.value("expert_outputs", index).astype(mx.float32)
            # Llama 4 weighs the experts' input, so its outputs carry the weight already.
            weights = forward.value("expert_weights", index).astype(mx.float32)
            norms = mx.sqrt(mx.square(outputs).sum(axis=-1))
            lazy[index] = (forward.value("expert_ids", index), weights, norms)
        mx.eval(list(lazy.values()))
        for index, (ids, weights, norms) in lazy.items():
            self._add(index, forward.valid, np.array(ids), np.array(weights), np.array(norms))
        if "expert_inputs" in self.values:
            self._keep_inputs(forward)

    def _add(
        self,
        index: int,
        valid: NDArray[np.bool_],
        ids: NDArray[np.uint32],
        weights: NDArray[np.float32],
        norms: NDArray[np.float32],
    ) -> None:
        layer, held = self._layers[index], self._statistics[index]
        experts = held.num_experts
        real = valid[:, None] & (ids < experts)
        chosen, gate, norm = ids[real].astype(np.int64), weights[real], norms[real]
        weighted = norm if layer.family.weights_on_input else gate.astype(np.float64) * norm

        def summed(values: NDArray) -> NDArray[np.float64]:
            return np.bincount(chosen, values, minlength=experts).astype(np.float64)

        self._statistics[index] = replace(
            held,
            counts=held.counts + np.bincount(chosen, minlength=experts),
            weight_sums=held.weight_sums + summed(gate),
            norm_sums=held.norm_sums + summed(norm),
            weighted_norm_sums=held.weighted_norm_sums + summed(weighted),
            together=held.together + _together(real, ids, experts),
        )

    def _keep_inputs(self, forward: Forward) -> None:
        if len(self.sampled) != len(forward.valid):
            return  # a forward that `collect` did not start has no sampled tokens
        rows = np.flatnonzero(self.sampled & forward.valid)
        if not len(rows):
            return
        for index in forward.layers:
            inputs = forward.value("expert_inputs", index)[mx.array(rows)]
            ids = np.array(forward.value("expert_ids", index))[rows]
            real = ids < self._layers[index].num_experts
            mx.eval(inputs)
            self._pending[index] = (inputs, np.where(real, ids, NOT_AN_EXPERT).astype(np.uint16))

    def compare_experts(self) -> None:
        """Evaluate every expert on the sampled tokens of the forwards since the last call.

        Must run outside the recording, so that the model's own experts are called.
        """
        for index, (inputs, ids) in self._pending.items():
            layer, held = self._layers[index], self._statistics[index]
            sums, counts = compare_outputs(
                evaluate_all(layer.experts, layer.num_experts), inputs, ids, layer.num_experts
            )
            self._statistics[index] = replace(
                held,
                cosine_sums=held.cosine_sums + sums,
                cosine_counts=held.cosine_counts + counts,
                sampled_ids=np.concatenate([held.sampled_ids, ids]),
            )
        self._pending = {}


def _together(real: NDArray[np.bool_], ids: NDArray[np.uint32], experts: int) -> NDArray[np.int64]:
    """[E, E] tokens that chose both experts. float32 counts are exact up to 2^24 tokens."""
    routed = np.zeros((len(ids), experts), np.float32)
    routed[np.nonzero(real)[0], ids[real]] = 1.0
    return np.rint(routed.T @ routed).astype(np.int64)
