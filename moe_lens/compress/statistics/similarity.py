"""How alike two experts of a layer are: by what they answer, and by when they are asked.

``similarity(i, j) = (output similarity + activation overlap) / 2``, both between 0 and 1:

- **Output similarity** is the mean of max(0, cosine) of the two experts' outputs on the same
  input, over sampled calibration tokens that were routed to i or to j. Every expert is evaluated
  on those tokens, whether it was chosen or not (HC-SMoE, arXiv:2410.08589, compares mean outputs;
  here the outputs are compared token by token, so that two experts with one mean and different
  behaviour are told apart). Opposite answers count as unrelated ones.
- **Activation overlap** is the Jaccard index of the token sets that chose i and j, over all
  calibration tokens: tokens routed to both / tokens routed to either.
"""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from moe_lens.experts.answers import Evaluate

from .statistics import NOT_AN_EXPERT, LayerStatistics

DEFINITION = (
    "similarity(i, j) = mean of output similarity (mean of max(0, cosine) of both experts' outputs "
    "over sampled calibration tokens routed to i or j) and activation overlap (Jaccard index of "
    "the calibration tokens routed to i and to j)"
)

SCALE = (
    "0: the outputs are unrelated (or opposite) and no token chose both. "
    "0.5: half of it, for example outputs that point the same way from experts that are never "
    "chosen together, or unrelated outputs from experts that are always chosen together. "
    "1: outputs that point the same way on every token, and exactly the same tokens."
)

_CHUNK_BYTES = 64 << 20


@dataclass(frozen=True)
class Similarity:
    """Pairwise similarities of one layer, each [E, E], symmetric, 1 on the diagonal."""

    layer: int
    total: NDArray[np.float64]
    """The mean of the two below: what a threshold is compared with."""
    outputs: NDArray[np.float64]
    """Output similarity; 0 where no sampled token chose either expert."""
    overlap: NDArray[np.float64]
    """Activation overlap; 0 where no token chose either expert."""

    definition = DEFINITION

    def best_partner(self) -> NDArray[np.float64]:
        """[E] the similarity of every expert to its most similar other expert."""
        others = self.total.copy()
        np.fill_diagonal(others, -1.0)
        return others.max(axis=1)


def similarity(statistics: LayerStatistics) -> Similarity:
    """The similarities of one layer from its additive statistics."""
    outputs = _ratio(statistics.cosine_sums, statistics.cosine_counts)
    counts = statistics.counts
    either = counts[:, None] + counts[None, :] - statistics.together
    overlap = _ratio(statistics.together.astype(np.float64), either)
    outputs, overlap = _unit_diagonal(outputs), _unit_diagonal(overlap)
    return Similarity(statistics.layer, (outputs + overlap) / 2, outputs, overlap)


def _ratio(sums: NDArray[np.float64], counts: NDArray[np.int64]) -> NDArray[np.float64]:
    return np.clip(np.divide(sums, counts, out=np.zeros_like(sums), where=counts > 0), 0.0, 1.0)


def _unit_diagonal(matrix: NDArray[np.float64]) -> NDArray[np.float64]:
    np.fill_diagonal(matrix, 1.0)
    return matrix


def compare_outputs(
    evaluate: Evaluate, inputs: mx.array, ids: NDArray[np.uint16], num_experts: int
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Sums and counts of max(0, cosine) over tokens routed to either expert of a pair.

    Args:
        evaluate: Runs every expert on a chunk of tokens.
        inputs: [T, hidden] what the experts read.
        ids: [T, k] the experts each token was routed to; `NOT_AN_EXPERT` is skipped.
        num_experts: E.

    Returns:
        `cosine_sums` and `cosine_counts`, [E, E] each, symmetric.

    Only the k chosen experts of a token are compared with all E, since a pair without a chosen
    one does not count: E / k times less work than all pairs. Memory is bounded by evaluating
    chunks of tokens whose outputs fit 64 MiB.
    """
    sums = np.zeros((num_experts, num_experts))
    counts = np.zeros((num_experts, num_experts), np.int64)
    step = max(1, _CHUNK_BYTES // (4 * num_experts * inputs.shape[-1]))
    for start in range(0, len(ids), step):
        outputs = np.array(evaluate(inputs[start : start + step]).astype(mx.float32))
        part_sums, part_counts = _compare_chunk(outputs, ids[start : start + step])
        sums += part_sums
        counts += part_counts
    return sums, counts


def _compare_chunk(
    outputs: NDArray[np.float32], ids: NDArray[np.uint16]
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    tokens, experts, _ = outputs.shape
    directions = _directions(outputs)
    real = ids != NOT_AN_EXPERT
    rows = np.where(real, ids, 0).astype(np.int64)
    chosen = np.take_along_axis(directions, rows[..., None], axis=1)
    cosines = np.matmul(chosen, directions.transpose(0, 2, 1))
    cosines = np.clip(cosines, 0.0, 1.0) * real[..., None]

    routed = np.zeros((tokens, experts), bool)
    routed[np.nonzero(real)[0], ids[real]] = True
    slots = (rows[..., None] == np.arange(experts)) & real[..., None]
    from_either = np.einsum("tsi,tsj->ij", slots, cosines, dtype=np.float64, optimize=True)
    # A token that chose both i and j is in row i and in row j: it is taken out once.
    both = np.einsum("tsi,tsj,tj->ij", slots, cosines, routed, dtype=np.float64, optimize=True)
    sums = from_either + from_either.T - (both + both.T) / 2
    single = routed.sum(axis=0, dtype=np.int64)
    pairs = np.einsum("ti,tj->ij", routed, routed, dtype=np.int64, optimize=True)
    return sums, single[:, None] + single[None, :] - pairs


def _directions(outputs: NDArray[np.float32]) -> NDArray[np.float32]:
    """Unit vectors; an output of zero gets a direction of its own, equal to other zeros only."""
    norms = np.sqrt(np.vecdot(outputs, outputs))[..., None]
    if (norms > 0).all():
        return outputs / norms
    directions = np.divide(outputs, norms, out=np.zeros_like(outputs), where=norms > 0)
    silent = (norms == 0).astype(outputs.dtype)
    return np.concatenate([directions, silent], axis=-1)
