"""A measure of how alike two experts are, for every pair of experts of every MoE layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

__all__ = ["Floats", "Kind", "Measure", "PairMeans", "Pairs", "upper"]

Floats = NDArray[np.floating]
Kind = Literal["weights", "outputs", "routing"]

Pairs = list[tuple[int, int]]
"""Pairs of expert ids, the smaller one first."""


@dataclass(frozen=True, eq=False)
class PairMeans:
    """The mean over the pairs of a layer, [layers] each.

    Attributes:
        mean: Over the pairs that have a value; NaN where none has.
        low: Lower end of a 95 % interval over experts (jackknife); NaN where pairs are missing.
        high: Upper end.
    """

    mean: NDArray[np.float64]
    low: NDArray[np.float64]
    high: NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Measure:
    """One number for every pair.

    Attributes:
        name: Short, unique in a result.
        kind: What is compared.
        says: What the number is.
        values: For each MoE layer [E, E] float32, symmetric; NaN where it was not measured, and on
            the diagonal.
        part: Whether it is of a part of what another measure compares: one projection.
    """

    name: str
    kind: Kind
    says: str
    values: tuple[NDArray[np.float32], ...]
    part: bool = False

    @classmethod
    def of(
        cls, name: str, kind: Kind, says: str, values: list[Floats], *, part: bool = False
    ) -> Measure:
        """With the diagonal taken out: an expert is no neighbour of itself."""
        kept = []
        for each in values:
            table = np.array(each, np.float32)
            np.fill_diagonal(table, np.nan)
            kept.append(table)
        return cls(name, kind, says, tuple(kept), part)

    def complete(self, place: int) -> bool:
        """Whether every pair of the layer at `place` has a value."""
        return not np.isnan(upper(self.values[place])).any()

    def nearest(self, place: int) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """[E] the most similar other expert, -1 where no pair has a value, and [E] how similar."""
        table = np.where(np.isnan(self.values[place]), -np.inf, self.values[place])
        found = table.argmax(axis=1)
        best = table[np.arange(len(table)), found]
        none = np.isneginf(best)
        return np.where(none, -1, found), np.where(none, np.nan, best).astype(np.float32)

    def mutual(self, place: int) -> Pairs:
        """Pairs of experts that are each other's nearest, the most similar first."""
        nearest, best = self.nearest(place)
        found = [
            (expert, int(other))
            for expert, other in enumerate(nearest)
            if expert < other and nearest[other] == expert
        ]
        return sorted(found, key=lambda pair: (-float(best[pair[0]]), pair))

    def means(self) -> PairMeans:
        """The mean over pairs of every layer, with its interval."""
        found = np.array([_mean(each) for each in self.values])
        return PairMeans(found[:, 0], found[:, 1], found[:, 2])


def upper(table: Floats) -> Floats:
    """[E (E - 1) / 2] the values of all pairs."""
    found: Floats = table[np.triu_indices(len(table), 1)]
    return found


def _mean(table: Floats) -> tuple[float, float, float]:
    """Mean over pairs, and mean +- 1.96 standard errors of the jackknife over experts.

    A pair has two experts, so pairs are no independent draws: one expert at a time is left out
    with all its pairs (Efron and Tibshirani 1993, chapter 11).
    """
    pairs = upper(table).astype(np.float64)
    known = pairs[~np.isnan(pairs)]
    if len(known) == 0:
        return np.nan, np.nan, np.nan
    mean, experts = float(known.mean()), len(table)
    if len(known) < len(pairs) or experts < 4:
        return mean, np.nan, np.nan
    rows = np.nansum(table, axis=1, dtype=np.float64)
    without = (known.sum() - rows) / ((experts - 1) * (experts - 2) / 2)
    error = np.sqrt((experts - 1) / experts * np.square(without - without.mean()).sum())
    return mean, mean - 1.96 * float(error), mean + 1.96 * float(error)
