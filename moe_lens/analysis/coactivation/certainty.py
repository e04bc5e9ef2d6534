"""How sure the lift of a pair is, from runs of prompts.

The linear approximation of the bootstrap (infinitesimal jackknife; Efron and Tibshirani 1993,
chapter 21): with T_ij the tokens of a run that chose both experts, c_i those that chose i and n all
of them, the influence of the run on log lift is

    T_ij / sum T_ij - c_i / sum c_i - c_j / sum c_j + n / sum n,

and the variance is the sum of its squares. (The expectation by chance is taken as proportional to
both loads; that it also depends a little on the others is left out.) For the test of a lift of 1
the first term is divided by the expected tokens instead, and its variance is at least that of
independent tokens.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from .pair_counts import RunProducts
from .ratio import ratio_of

__all__ = ["FEWEST_RUNS", "FEWEST_TOKENS", "certainty", "reach"]

FEWEST_RUNS = 10
"""Runs of prompts without which nothing is claimed."""

FEWEST_TOKENS = 5.0
"""Tokens that chance must expect of a pair before anything is claimed of it."""

Floats = NDArray[np.float64]


def certainty(
    together: NDArray[np.int64],
    tokens: int,
    chance: Floats,
    products: RunProducts | None,
    runs: int,
) -> tuple[Floats, Floats]:
    """[layers, R, R] the standard error of log lift, and p of a lift of 1, two-sided."""
    nothing = np.full(together.shape, np.nan)
    if products is None or runs < 2:
        return nothing, nothing
    counts = np.diagonal(together, axis1=1, axis2=2).astype(np.float64)
    expected = tokens * chance
    ratio = ratio_of(together, expected)
    # Tokens that chose both, in units of those there are, and of those expected by chance.
    own, by_chance = (_inverse(each) for each in (together.astype(np.float64), expected))
    inflated = runs / (runs - 1)
    spread = _spread(products, counts, tokens)
    variance = spread(own) * inflated
    error = np.where(together > 0, np.sqrt(np.maximum(variance, 0.0)), np.nan)
    if runs < FEWEST_RUNS:
        return error, nothing
    with np.errstate(invalid="ignore", divide="ignore"):
        null = (spread(by_chance) - (ratio - 1) ** 2 / runs) * inflated
        # Runs that hardly ever see a pair show no spread; independent tokens would have this.
        load = _inverse(counts) * tokens
        one, other = load[:, :, None], load[:, None, :]
        alone = by_chance * tokens - one - other - 1 + 2 * chance * one * other
        null = np.maximum(null, alone / tokens)
        p = 2 * stats.t.sf(np.abs(ratio - 1) / np.sqrt(null), runs - 1)
    return error, np.where((expected >= FEWEST_TOKENS) & (null > 1e-12), p, np.nan)


def _spread(products: RunProducts, counts: Floats, tokens: int) -> Callable[[Floats], Floats]:
    """The sum over runs of the squared influence, given what T_ij is divided by."""
    one = _inverse(counts)
    i, j = one[:, :, None], one[:, None, :]
    loads = np.diagonal(products.one_other, axis1=1, axis2=2) * one**2
    mixed = products.one_all * one / tokens
    fixed = (
        loads[:, :, None]
        + loads[:, None, :]
        + products.all_all / tokens**2
        + 2 * products.one_other * i * j
        - 2 * (mixed[:, :, None] + mixed[:, None, :])
    )
    with_loads = products.both_one * i + products.both_one.transpose(0, 2, 1) * j
    linear = 2 * (products.both_all / tokens - with_loads)
    return lambda unit: unit**2 * products.both_both + unit * linear + fixed


def reach(runs: int) -> float:
    """Standard errors from the middle to an end of a 95 % interval; NaN with one run."""
    return float(stats.t.ppf(0.975, runs - 1)) if runs > 1 else np.nan


def _inverse(values: Floats) -> Floats:
    return np.divide(1.0, values, out=np.zeros_like(values), where=values > 0)
