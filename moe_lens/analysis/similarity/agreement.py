"""Do two measures find the same pairs alike? Rank correlation, tested by permuting experts.

Pairs share experts, so a p-value that takes them for independent would be far too small. Mantel's
test (1967) permutes the experts of one measure, rows and columns together, and asks how often a
rank correlation as far from 0 comes out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.stats import rankdata

from moe_lens.analysis.resampling import FALSE_SHARE, false_discovery
from moe_lens.telling import Progress

from .measures import Measure

__all__ = ["Agreement", "agree"]

PERMUTATIONS = 499
"""So that the smallest p-value is 0.002."""

FEWEST_EXPERTS = 5
"""With fewer, too few permutations differ to say anything."""


@dataclass(frozen=True, eq=False)
class Agreement:
    """Rank correlations of measures, m of them.

    Attributes:
        names: The measures; those that have a value for every pair of a layer take part in it.
        rho: [layers, m, m] Spearman's rank correlation over the pairs of a layer; NaN where one
            did not take part.
        q: [layers, m, m] p-values of Mantel's test, corrected for the number of tests
            (Benjamini and Hochberg).
    """

    names: tuple[str, ...]
    rho: NDArray[np.float64]
    q: NDArray[np.float64]

    def median(self) -> NDArray[np.float64]:
        """[m, m] over layers."""
        known = ~np.isnan(self.rho)
        found = np.full(self.rho.shape[1:], np.nan)
        for cell in np.ndindex(*found.shape):
            values = self.rho[(slice(None), *cell)][known[(slice(None), *cell)]]
            found[cell] = np.median(values) if len(values) else np.nan
        return found

    def sure(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """[m, m] layers where the correlation is not chance, and layers tested."""
        with np.errstate(invalid="ignore"):
            return (self.q <= FALSE_SHARE).sum(axis=0), (~np.isnan(self.rho)).sum(axis=0)


def agree(
    measures: Sequence[Measure],
    *,
    seed: int = 0,
    permutations: int = PERMUTATIONS,
    progress: Progress | None = None,
) -> Agreement:
    """Compare all measures with each other, layer by layer.

    Experts that some measure knows nothing of, such as those never chosen, are left out; and
    measures of single pairs, or of less than half of the experts.

    Args:
        measures: Of the same layers.
        seed: Of the permutations.
        permutations: How many.
        progress: Called with layers done and in all.
    """
    layers, number = len(measures[0].values), len(measures)
    rho = np.full((layers, number, number), np.nan)
    p = np.full_like(rho, np.nan)
    for place in range(layers):
        if progress is not None:
            progress(place, layers)
        draw = np.random.default_rng([seed, place])
        _layer(measures, place, draw, permutations, rho[place], p[place])
    if progress is not None:
        progress(layers, layers)
    one, two = np.triu_indices(number, 1)
    q = np.full_like(p, np.nan)
    q[:, one, two] = q[:, two, one] = false_discovery(p[:, one, two])
    return Agreement(tuple(each.name for each in measures), rho, q)


def _layer(
    measures: Sequence[Measure],
    place: int,
    draw: np.random.Generator,
    permutations: int,
    rho: NDArray[np.float64],
    p: NDArray[np.float64],
) -> None:
    tables = [each.values[place].astype(np.float64) for each in measures]
    # Partners of each expert: none for one that was never chosen, a few where pairs were picked.
    known = [(~np.isnan(table)).sum(axis=0) for table in tables]
    taken = [number for number, count in enumerate(known) if _whole(count)]
    if not taken:
        return
    alive = np.logical_and.reduce([known[number] > 0 for number in taken])
    if alive.sum() < FEWEST_EXPERTS:
        return
    experts = np.flatnonzero(alive)
    ranked = {number: _ranked(tables[number][np.ix_(experts, experts)]) for number in taken}
    taken = [number for number, each in ranked.items() if each.any()]
    if not taken:
        return
    squares = [ranked[number] for number in taken]
    whole = np.stack(squares).reshape(len(taken), -1)
    one, two = np.triu_indices(len(experts), 1)
    flat = whole[:, one * len(experts) + two]
    found = flat @ flat.T
    beyond = np.ones_like(found)
    for _ in range(permutations):
        order = draw.permutation(len(experts))
        moved = whole[:, order[one] * len(experts) + order[two]]
        beyond += np.abs(moved @ flat.T) >= np.abs(found) - 1e-12
    cells = np.ix_(taken, taken)
    rho[cells] = found
    # Permuting one measure or the other is the same up to the draw: the mean of both.
    p[cells] = (beyond + beyond.T) / 2 / (permutations + 1)


def _whole(partners: NDArray[np.int64]) -> bool:
    """Whether half of the experts or more have a value, and each of them one with all others."""
    some = partners > 0
    return bool(2 * some.sum() >= len(some) and (partners[some] == some.sum() - 1).all())


def _ranked(table: NDArray[np.float64]) -> NDArray[np.float64]:
    """[E, E] ranks of the pairs, centred and scaled so that their squares add up to 1 over pairs.

    All 0 where every pair is alike.
    """
    one, two = np.triu_indices(len(table), 1)
    ranks = rankdata(table[one, two])
    ranks = ranks - ranks.mean()
    length = float(np.sqrt(np.square(ranks).sum()))
    found = np.zeros_like(table)
    if length > 0:
        found[one, two] = found[two, one] = ranks / length
    return found
