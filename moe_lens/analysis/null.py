"""What labels would show if they meant nothing: p of every (label, expert), from shuffled labels.

For unit u with n_u tokens, x_u of which went to an expert that takes the share r of all tokens:

* The residual x_u - r n_u has the variance r (1 - r) v_u with v_u = n_u + rho (s_u - n_u), where
  s_u is the sum of the squared lengths of the unit's prompts, and rho how alike two tokens of a
  prompt are in where they go (the intraclass correlation, estimated for each layer). Divided by
  the root of v_u, residuals of long and of short prompts vary alike. Without that, a label with
  long prompts would stand out whatever they hold.
* The statistic of a label is the sum of these over its m of all U units. Under shuffling it has
  variance m (U - m) / (U - 1) times their mean square and a skewness in closed form; it is divided
  by the one, and freed of the other by Wilson and Hilferty's cube root (1931, for Pearson's type
  III by Kite 1977): an expert that a few prompts use is skewed far to the right.
* Statistics of *all* cells are then alike enough to be pooled (as in Tusher et al. 2001, doi
  10.1073/pnas.091062498): p is the share of shuffled statistics of all cells that reach a cell's
  own, so it can be small enough for many claims. A cell whose own shuffled statistics reach it
  often enough to be counted keeps its own share.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .resampling import RESAMPLES, shuffles

__all__ = ["Sample", "pooled_p", "shuffled_moments"]

_POOL = 4_000_000
"""Shuffled statistics in all, as far as `_FEWEST_ROUNDS` allows."""

_FEWEST_ROUNDS = 100

_OWN = 10
"""Shuffles of a cell itself that must reach its statistic for their share to be its p."""


@dataclass(frozen=True, eq=False)
class Sample:
    """Units and where their tokens went.

    Attributes:
        counts: [units, cells] float64, tokens of the unit that went to the expert.
        tokens: [units] float64.
        squares: [units] float64, see `Units.squares`.
        experts: Cells of a layer, which stand together.
    """

    counts: NDArray[np.float64]
    tokens: NDArray[np.float64]
    squares: NDArray[np.float64]
    experts: int

    def residuals(
        self,
    ) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
        """The share of each cell, and what each unit deviates from it.

        Returns:
            Shares [cells]; the root of v of each unit and layer [units, layers]; and residuals
            divided by it [units, cells], of equal variance under the null, mean 0 in each cell.
        """
        share = self.counts.sum(axis=0) / self.tokens.sum()
        rest = self.counts - self.tokens[:, None] * share
        pairs = (self.squares - self.tokens)[:, None]
        variance = self.tokens[:, None] + pairs * self._alike(share, rest)
        by_cell = np.repeat(variance, self.experts, axis=1)
        # The share again, now with units weighted by what they tell of it.
        weight = self.tokens[:, None] / by_cell
        share = (weight * self.counts).sum(axis=0) / (weight * self.tokens[:, None]).sum(axis=0)
        rest = (self.counts - self.tokens[:, None] * share) / np.sqrt(by_cell)
        return share, np.sqrt(variance), rest - rest.mean(axis=0)

    def _alike(self, share: NDArray[np.float64], rest: NDArray[np.float64]) -> NDArray[np.float64]:
        """[layers] rho by moments: the squared residuals of all experts against their variance."""
        units, total = len(self.tokens), self.tokens.sum()
        pairs = (self.squares - self.tokens).sum()
        by_chance = (share * (1 - share)).reshape(-1, self.experts).sum(axis=1)
        seen = np.square(rest).sum(axis=0).reshape(-1, self.experts).sum(axis=1)
        if pairs <= 0:
            return np.zeros(len(seen))
        seen = seen * units / (units - 1)
        ratio = np.divide(seen, by_chance, out=np.full(len(seen), total), where=by_chance > 0)
        return np.clip((ratio - total) / pairs, 0.0, 1.0)


def shuffled_moments(
    residuals: NDArray[np.float64], members: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Standard deviation and skewness of the sum of `members` residuals drawn from all.

    The exact moments of a sum drawn without replacement from a finite population.

    Args:
        residuals: [units, cells], mean 0 in each cell; three units at least.
        members: [labels] how many are drawn.

    Returns:
        Two arrays [labels, cells]; a skewness is 0 where nothing varies.
    """
    units = len(residuals)
    second = np.square(residuals).mean(axis=0)
    third = (np.square(residuals) * residuals).mean(axis=0)
    spread = members * (units - members) / (units - 1)
    tilt = spread * (units - 2 * members) / (units - 2)
    deviation = np.sqrt(spread[:, None] * second)
    cubed = deviation**3
    skewness = np.divide(
        tilt[:, None] * third, cubed, out=np.zeros(cubed.shape), where=cubed > 1e-27
    )
    return deviation, skewness


def pooled_p(
    sample: Sample,
    label: NDArray[np.int64],
    labels: int,
    enough: NDArray[np.bool_],
    *,
    seed: int = 0,
) -> NDArray[np.float64]:
    """One-sided p of every cell with enough data; NaN of the others.

    Args:
        sample: Units and counts.
        label: [units] label of each unit.
        labels: Number of labels.
        enough: [labels, cells] what is tested.
        seed: Of the shuffles.
    """
    p = np.full(enough.shape, np.nan)
    if not enough.any():
        return p
    tested = np.flatnonzero(enough.any(axis=0))
    kept = enough[:, tested]
    residuals = sample.residuals()[2][:, tested]
    places = np.arange(labels)[:, None]
    members = (label[None] == places).sum(axis=1).astype(np.float64)
    deviation, skewness = shuffled_moments(residuals, members)
    # An expert that takes the same share of every unit deviates from nothing.
    still = deviation < 1e-9
    deviation[still] = 1.0

    def statistics(order: NDArray[np.int64]) -> NDArray[np.float64]:
        rows = (order[None] == places).astype(np.float64)
        found = (rows @ residuals) / deviation
        found[still] = 0.0
        return _normal(found[kept], skewness[kept])

    observed = statistics(label)
    # The pool is counted against the observed ones as it is made, and never held.
    ascending = np.argsort(observed, kind="stable")
    edges = observed[ascending] - 1e-9
    rounds = int(np.clip(_POOL // len(observed), _FEWEST_ROUNDS, RESAMPLES))
    reached = np.zeros(len(observed) + 1, dtype=np.int64)
    own = np.zeros(len(observed), dtype=np.int64)
    for order in shuffles(label, seed=seed, rounds=rounds):
        shuffled = statistics(order)
        own += shuffled >= observed - 1e-9
        above = np.searchsorted(edges, np.sort(shuffled), side="right")
        reached += np.bincount(above, minlength=len(reached))
    # A shuffled statistic above `n` edges reaches the first n observed ones.
    at_least = reached[::-1].cumsum()[::-1][1:]
    found = np.empty(len(observed))
    found[ascending] = (1 + at_least) / (1 + rounds * len(observed))
    p[enough] = np.where(own >= _OWN, (1 + own) / (1 + rounds), found)
    return p


def _normal(score: NDArray[np.float64], skewness: NDArray[np.float64]) -> NDArray[np.float64]:
    """Scores of mean 0, variance 1 and a skewness, as normal scores; rising in `score`."""
    bent = np.where(np.abs(skewness) < 1e-6, 1e-6, skewness)
    return 6 / bent * (np.cbrt(np.maximum(1 + bent * score / 2, 0.0)) - 1) + bent / 6
