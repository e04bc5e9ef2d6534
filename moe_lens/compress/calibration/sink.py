"""The sink of a calibration: every forward of the model, reduced to sums."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from moe_lens import kernels
from moe_lens.compress.statistics.array_file import Arrays
from moe_lens.compress.statistics.routed_sums import Floats, RoutedSums, added, total
from moe_lens.compress.statistics.similarity import compare_outputs
from moe_lens.compress.statistics.statistics import NOT_AN_EXPERT, UNLABELLED, LayerStatistics
from moe_lens.compress.statistics.statistics_file import layers_as_arrays, layers_from_arrays
from moe_lens.experts.answers import Evaluate, evaluate_all
from moe_lens.families import MoELayer
from moe_lens.instrument import Forward

ROUTED = ("expert_ids", "expert_weights", "expert_outputs")
"""The values that the sums over routed tokens are made of."""


@dataclass(frozen=True)
class Tokens:
    """What the tokens of the next forward are, each array [B * L]; pads hold anything."""

    labels: tuple[str, ...]
    label: NDArray[np.int64]
    """The place of the token's label in `labels`."""
    second_half: NDArray[np.bool_]
    """Whether its prompt belongs to the second half of the text."""
    sampled: NDArray[np.bool_]
    """Whether every expert is evaluated on it."""

    @classmethod
    def plain(cls, size: int) -> Tokens:
        """Unlabelled tokens of the first half, none of them sampled."""
        no = np.zeros(size, bool)
        return cls((UNLABELLED,), np.zeros(size, np.int64), no, no)


@dataclass(frozen=True)
class _Slots:
    """What the k slots of the tokens of one forward show, [tokens, k] each."""

    ids: NDArray[np.uint32]
    weights: NDArray[np.float32]
    norms: NDArray[np.float32]
    peaks: NDArray[np.float32]
    outputs: mx.array | None
    """[tokens, k, width], where their sum is asked for."""

    def statistics(
        self, layer: MoELayer, tokens: Tokens, valid: NDArray[np.bool_]
    ) -> LayerStatistics:
        """Of these tokens alone: all that comes from routed tokens."""
        experts, labels = layer.num_experts, len(tokens.labels)
        real = valid[:, None] & (self.ids < experts)
        chosen = self.ids[real].astype(np.int64)
        groups = 2 * tokens.label + tokens.second_half
        group = groups[np.nonzero(real)[0]]
        weight, norm, peak = (
            each[real].astype(np.float64) for each in (self.weights, self.norms, self.peaks)
        )
        # Llama 4 weighs the experts' input, so its outputs carry the weight already.
        weighted = norm if layer.family.weights_on_input else weight * norm
        sizes = np.bincount(groups[valid], minlength=2 * labels).astype(np.int64)
        parts = RoutedSums.of(
            sizes, experts, chosen, group, weight=weight, norm=norm, weighted=weighted, peak=peak
        )
        by_label = [parts[2 * place] + parts[2 * place + 1] for place in range(labels)]
        if self.outputs is not None:
            sums = _sum_outputs(self.outputs, real, group // 2 * experts + chosen, labels * experts)
            by_label = [
                replace(each, output_sums=sums[place * experts : (place + 1) * experts])
                for place, each in enumerate(by_label)
            ]
        ids = np.where(real, self.ids, kernels.NO_EXPERT)
        return replace(
            LayerStatistics.empty(layer.index, experts, layer.k),
            labels={
                label: sums
                for label, sums in zip(tokens.labels, by_label, strict=True)
                if sums.tokens
            },
            together=kernels.coactivation(ids[None], experts)[0],
            halves=(total(parts[0::2], experts), total(parts[1::2], experts)),
        )


def _sum_outputs(
    outputs: mx.array, real: NDArray[np.bool_], cells: NDArray[np.int64], size: int
) -> Floats:
    """[size, width] float64 sums of the outputs of the slots that `real` marks, by their cell."""
    found = np.zeros((size, outputs.shape[-1]))
    routed = np.array(outputs.astype(mx.float32))[real]
    for cell in np.unique(cells):
        found[cell] = routed[cells == cell].sum(axis=0, dtype=np.float64)
    return found


class CalibrationSink:
    """Adds each forward to the statistics of every MoE layer.

    What is said about a forward are its `Tokens`; nothing: `Tokens.plain`.

    Args:
        layers: The MoE layers of the model.
        similarity: Also sum the Gram matrix of the router logits, where a layer shows them, and
            evaluate every expert on the sampled tokens.
        mean_outputs: Also sum the experts' outputs themselves: [E, width] for each label, and
            over all sampled tokens.
    """

    by_layer = True

    def __init__(
        self, layers: Sequence[MoELayer], *, similarity: bool = True, mean_outputs: bool = False
    ) -> None:
        self._layers = {layer.index: layer for layer in layers}
        self._show_logits = similarity and all(
            layer.reason("router_logits") is None for layer in layers
        )
        self._similarity, self._mean_outputs = similarity, mean_outputs
        self.values = frozenset(ROUTED)
        if similarity:
            self.values |= {"expert_inputs"}
        if self._show_logits:
            self.values |= {"router_logits"}
        self.tokens = 0
        """Tokens that all layers have run."""
        self.progress: Callable[[int], None] | None = None
        """Called with the tokens done; of a layer that has run alone, its share of them."""
        self._done = 0
        self._statistics = {
            layer.index: LayerStatistics.empty(layer.index, layer.num_experts, layer.k)
            for layer in layers
        }

    @property
    def statistics(self) -> tuple[LayerStatistics, ...]:
        """What was added so far, by layer."""
        return tuple(self._statistics[index] for index in sorted(self._statistics))

    def sums(self) -> tuple[dict[str, Any], Arrays]:
        """All that was added so far, once every layer has run the same tokens."""
        parts, arrays = layers_as_arrays(self.statistics)
        return {"layers": parts, "tokens": self.tokens}, arrays

    def go_on(self, content: dict[str, Any], arrays: Arrays) -> None:
        """Begin with what `sums` gave."""
        held = {each.layer: each for each in layers_from_arrays(content["layers"], arrays)}
        self._statistics = {index: held[index] for index in self._statistics}
        self.tokens = int(content["tokens"])
        self._done = self.tokens * len(self._layers)

    def record(self, forward: Forward) -> None:
        """Reduce one forward, or some layers of one; called by the instrument after it."""
        tokens = forward.about or Tokens.plain(len(forward.valid))
        lazy = {index: self._reduced(forward, index) for index in forward.layers}
        mx.eval(list(lazy.values()))
        for index, (ids, weights, norms, peaks, *gram) in lazy.items():
            slots = _Slots(
                np.array(ids),
                np.array(weights),
                np.array(norms),
                np.array(peaks),
                forward.value("expert_outputs", index) if self._mean_outputs else None,
            )
            found = slots.statistics(self._layers[index], tokens, forward.valid)
            if gram:
                found = replace(found, logit_gram=np.array(gram[0]).astype(np.float64))
            self._statistics[index] += found
            if self._similarity:
                self._compare_experts(forward, index, tokens.sampled)
        self._done += int(forward.valid.sum()) * len(forward.layers)
        self.tokens = self._done // len(self._layers)
        if self.progress is not None:
            self.progress(self.tokens)

    def _reduced(self, forward: Forward, index: int) -> tuple[mx.array, ...]:
        """Lazily: ids, weights, norms and peaks of every slot, and the Gram matrix of the logits.

        The outputs are read twice and never copied; everything is computed in float32.
        """
        ids, weights, outputs = (forward.value(name, index) for name in ROUTED)
        outputs = outputs.astype(mx.float32)
        norms = mx.sqrt(mx.square(outputs).sum(axis=-1))
        peaks = mx.maximum(outputs.max(axis=-1), -outputs.min(axis=-1))
        found = ids, weights.astype(mx.float32), norms, peaks
        if not self._show_logits:
            return found
        logits = forward.value("router_logits", index).astype(mx.float32)
        logits = mx.where(mx.array(forward.valid)[:, None], logits, 0.0)
        return *found, logits.T @ logits

    def _compare_experts(self, forward: Forward, index: int, sampled: NDArray[np.bool_]) -> None:
        """Evaluate every expert of a layer on the sampled tokens of this forward.

        The model's own experts are called, past the seams.
        """
        rows = np.flatnonzero(sampled & forward.valid)
        if not len(rows):
            return
        layer = self._layers[index]
        experts = layer.num_experts
        inputs = forward.value("expert_inputs", index)[mx.array(rows)]
        ids = np.array(forward.value("expert_ids", index))[rows]
        ids = np.where(ids < experts, ids, NOT_AN_EXPERT).astype(np.uint16)
        mx.eval(inputs)
        seen = _Summed(evaluate_all(layer.experts, experts), self._mean_outputs)
        sums, counts = compare_outputs(seen, inputs, ids, experts)
        held = self._statistics[index]
        self._statistics[index] = replace(
            held,
            cosine_sums=held.cosine_sums + sums,
            cosine_counts=held.cosine_counts + counts,
            sampled_ids=np.concatenate([held.sampled_ids, ids]),
            sampled_output_sums=added(
                held.sampled_output_sums, seen.sums, len(held.sampled_ids), len(ids)
            ),
        )


class _Summed:
    """Evaluates every expert, and sums what they answer where that is asked for."""

    def __init__(self, evaluate: Evaluate, asked: bool) -> None:
        self._evaluate, self._asked = evaluate, asked
        self.sums: Floats | None = None
        """[E, width] float64."""

    def __call__(self, inputs: mx.array) -> mx.array:
        outputs = self._evaluate(inputs)
        if self._asked:
            found = np.array(outputs.astype(mx.float32)).sum(axis=0, dtype=np.float64)
            self.sums = found if self.sums is None else self.sums + found
        return outputs
