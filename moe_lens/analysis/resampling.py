"""How sure a number is, and what it would be if labels meant nothing; units are drawn, not tokens.

* Intervals: units are drawn with replacement within each label (Efron and Tibshirani 1993,
  chapter 6), so a label keeps its number of prompts.
* Nulls: the labels are shuffled over the units, everything else stays.
* Many claims at once: Benjamini and Hochberg (1995) bound the share of false ones among them.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from scipy import stats

__all__ = ["FALSE_SHARE", "RESAMPLES", "draws", "false_discovery", "interval", "shuffles", "spread"]

RESAMPLES = 1000
"""Draws of an interval, and shuffles of a null where the cost allows."""

FALSE_SHARE = 0.05
"""Largest expected share of false claims among the claims that are made."""

LOW = 0.025


def draws(
    label: NDArray[np.int64], *, seed: int = 0, resamples: int = RESAMPLES
) -> NDArray[np.float64]:
    """[resamples, units] how often each unit is drawn, within its label.

    Args:
        label: [units] group of each unit; units of one group are drawn for each other.
        seed: Of the draws.
        resamples: How many.
    """
    generator = np.random.default_rng(seed)
    table = np.zeros((resamples, len(label)))
    for place in np.unique(label):
        members = np.flatnonzero(label == place)
        even = np.full(len(members), 1 / len(members))
        table[:, members] = generator.multinomial(len(members), even, size=resamples)
    return table


def interval(
    drawn: NDArray[np.floating], *, units: int | None = None
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The middle 95 % of what `draws` gave: quantiles along the first axis.

    Args:
        drawn: [resamples, ...].
        units: From how many units was drawn. Of few, the quantiles are moved outwards: drawing
            from n units has (n - 1) / n of their variance, and n units leave Student's tails
            (Hesterberg 2015, doi 10.1080/00031305.2015.1089789, section 4.4).
    """
    low = LOW if units is None or units < 2 else _outer(units)
    ends = np.quantile(drawn, (low, 1 - low), axis=0)
    return ends[0], ends[1]


@lru_cache(maxsize=1024)
def _outer(units: int) -> float:
    width = np.sqrt(units / (units - 1)) * stats.t.ppf(1 - LOW, units - 1)
    return float(stats.norm.cdf(-width))


def spread(
    value: NDArray[np.float64], drawn: NDArray[np.floating], *, units: int | None = None
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """An interval around `value` as wide as that of `drawn`, for numbers that noise makes larger.

    An index of how uneven or how different counts are is too high on little data, and too high
    once more in what is drawn from that data. So `drawn` is moved until its mean is `value`. What
    remains is how far another corpus of this size would differ; how much of the value itself is
    noise, a null says.
    """
    low, high = interval(drawn, units=units)
    moved = value - drawn.mean(axis=0)
    return low + moved, high + moved


def shuffles(
    label: NDArray[np.int64], *, seed: int = 0, rounds: int = RESAMPLES
) -> Iterator[NDArray[np.int64]]:
    """`label` in other orders, `rounds` times."""
    generator = np.random.default_rng(seed)
    for _ in range(rounds):
        yield generator.permutation(label)


def false_discovery(p: NDArray[np.float64]) -> NDArray[np.float64]:
    """q-values of p-values of any shape (Benjamini and Hochberg 1995); NaN where p is.

    Claiming all with q at most x makes the expected share of false claims at most x.
    """
    q = np.full(p.shape, np.nan)
    tested = ~np.isnan(p)
    if tested.any():
        q[tested] = stats.false_discovery_control(p[tested], method="bh")
    return q
