"""How much the choice of one MoE layer tells about the next: mutual information, in bits.

Of the first choices A of a layer and B of the next, with joint shares p(i, j):

* I = sum over i, j of p(i, j) log2(p(i, j) / (p(i) p(j))), from counts ("plug-in");
* its bias for N tokens, (cells - rows - columns + 1) / (2 N ln 2), counting those that occur
  (Miller 1955; Roulston 1999, doi 10.1016/S0167-2789(98)00269-3), is taken off;
* of that, what the prompt explains: the same where the next layer's choices are shuffled over the
  tokens of each prompt. What is left is decided token by token;
* interval: prompts drawn anew. Drawing changes I, to first order, as it changes the mean over
  tokens of log2(p(i, j) / (p(i) p(j))), so sums by unit are enough.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moe_lens.analysis.resampling import draws, interval
from moe_lens.analysis.units import Units
from moe_lens.trace import Routes

__all__ = ["Information", "PointwiseSums", "information", "mutual_information", "pointwise"]


@dataclass(frozen=True, eq=False)
class Information:
    """Mutual information of successive MoE layers, in bits.

    Attributes:
        bits: [layers - 1] float64, of first choices, bias taken off.
        low: [layers - 1] float64, lower end of the 95 % interval; NaN for one unit.
        high: [layers - 1] float64, upper end.
        bias: [layers - 1] float64, what was taken off.
        prompt: [layers - 1] float64, with the next layer's choices shuffled within prompts, bias
            taken off: the part that the prompt explains.
        entropy: [layers - 1] float64, of the next layer's first choices: the most there can be.
        ranks: [ranks, layers - 1] float64, of the choices of each rank, bias taken off.
    """

    bits: NDArray[np.float64]
    low: NDArray[np.float64]
    high: NDArray[np.float64]
    bias: NDArray[np.float64]
    prompt: NDArray[np.float64]
    entropy: NDArray[np.float64]
    ranks: NDArray[np.float64]


def pointwise(table: NDArray[np.int64]) -> NDArray[np.float64]:
    """[..., R, R] log2(p(i, j) / (p(i) p(j))); 0 for pairs that do not occur."""
    total = table.sum(axis=(-2, -1), keepdims=True)
    even = table.sum(axis=-1, keepdims=True) * table.sum(axis=-2, keepdims=True).astype(float)
    ratio = np.divide(table * total.astype(float), even, out=np.ones(table.shape), where=table > 0)
    return np.log2(ratio)


def mutual_information(
    table: NDArray[np.int64],
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """[...] plug-in mutual information of tables [..., R, R], in bits, and its bias."""
    total = np.maximum(table.sum(axis=(-2, -1)), 1)
    bits = (table * pointwise(table)).sum(axis=(-2, -1)) / total
    cells = (table > 0).sum(axis=(-2, -1))
    rows = (table.sum(axis=-1) > 0).sum(axis=-1)
    columns = (table.sum(axis=-2) > 0).sum(axis=-1)
    return bits, (cells - rows - columns + 1) / (2 * total * np.log(2))


class PointwiseSums:
    """A `Fold` of the second reading: sums over tokens of the pointwise information, by unit.

    Args:
        units: The units.
        table: [layers - 1, R, R] steps of first choices.

    Attributes:
        sums: [units, layers - 1] float64, bits.
    """

    def __init__(self, units: Units, table: NDArray[np.int64]) -> None:
        self.units, self.width = units, table.shape[-1]
        # A row and a column more, of zeros, for empty slots.
        self.values = np.pad(pointwise(table), ((0, 0), (0, 1), (0, 1)))
        self.sums = np.zeros((len(units), len(table)))

    def add(self, routes: Routes) -> None:
        unit = self.units.of_rows(routes)
        first = np.minimum(routes.expert_ids[:, :, 0], self.width, dtype=np.intp)
        for layer, values in enumerate(self.values):
            each = values[first[layer], first[layer + 1]]
            self.sums[:, layer] += np.bincount(unit, each, len(self.units))


def information(
    seen: PointwiseSums,
    ranks: NDArray[np.int64],
    shuffled: NDArray[np.int64],
    *,
    seed: int = 0,
) -> Information:
    """Put together what the readings counted.

    Args:
        seen: Sums by unit.
        ranks: [ranks, layers - 1, R, R] steps by rank.
        shuffled: [rounds, layers - 1, R, R] first choices, shuffled within prompts.
        seed: Of the draws.
    """
    bits, bias = mutual_information(ranks)
    still, still_bias = mutual_information(shuffled)
    loads = ranks[0].sum(axis=1)
    share = loads / np.maximum(loads.sum(axis=1, keepdims=True), 1)
    entropy = -(share * np.log2(share, where=share > 0, out=np.zeros_like(share))).sum(axis=1)
    low, high = (np.full(len(share), np.nan) for _ in range(2))
    units = seen.units
    if len(units) > 1:
        drawn = draws(units.label, seed=seed)
        low, high = interval(
            drawn @ seen.sums / (drawn @ units.tokens)[:, None] - bias[0], units=len(units)
        )
    return Information(
        bits=bits[0] - bias[0],
        low=low,
        high=high,
        bias=bias[0],
        prompt=(still - still_bias).mean(axis=0),
        entropy=entropy,
        ranks=bits - bias,
    )
