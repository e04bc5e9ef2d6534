"""Which labels an expert is chosen for more often than for others, with interval and null.

The one table that taxonomy, domains and pipelines read. For a label D and an expert e of a layer:

* rate(D, e) = tokens of D routed to e / tokens of D (OLMoE, arXiv 2409.02060, Eq. 7, with any k);
* lift(D, e) = rate(D, e) / mean of rate(D', e) over all labels D', each label with the same weight:
  1 where e does not care, at most the number of labels;
* its interval: the middle 95 % over units drawn anew within each label;
* p(D, e): labels are shuffled over the units. With x_u the tokens of unit u that e took, n_u its
  tokens and r = sum x / sum n, the statistic is z = sum over D of (x_u - r n_u), divided by its
  exact standard deviation under shuffling, m (U - m) / (U - 1) times the mean square of
  (x_u - r n_u). Each p is the share of shuffled z of *all* cells that reach it (pooled as in
  Tusher et al. 2001, doi 10.1073/pnas.091062498): so p can be small enough for many claims;
* q: p after Benjamini and Hochberg over all cells with enough data.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .resampling import RESAMPLES, draws, false_discovery, interval, shuffles
from .units import Units

__all__ = ["FEWEST_TOKENS", "FEWEST_UNITS", "Enrichment", "enrichment"]

FEWEST_TOKENS = 50
"""Tokens that an expert must have received before anything is claimed of it."""

FEWEST_UNITS = 5
"""Units that a label must have, and the other labels together, before anything is claimed of it."""

_POOL = 4_000_000
"""Shuffled statistics kept at most."""


@dataclass(frozen=True, eq=False)
class Enrichment:
    """Labels by cells; a cell is an expert of a layer.

    Attributes:
        names: [labels] the labels.
        rate: [labels, layers, R] float64, share of the label's tokens routed to the expert.
        lift: [labels, layers, R] float64; NaN for an expert that no labelled token chose.
        low: [labels, layers, R] float64, lower end of the interval of the lift.
        high: [labels, layers, R] float64, upper end.
        p: [labels, layers, R] float64, one-sided; NaN on too little data.
        q: [labels, layers, R] float64, p with false discoveries controlled over all cells.
        enough: [labels, layers, R] bool, whether there is data enough for a claim.
    """

    names: tuple[str, ...]
    rate: NDArray[np.float64]
    lift: NDArray[np.float64]
    low: NDArray[np.float64]
    high: NDArray[np.float64]
    p: NDArray[np.float64]
    q: NDArray[np.float64]
    enough: NDArray[np.bool_]


def enrichment(units: Units, counts: NDArray[np.int64], *, seed: int = 0) -> Enrichment:
    """The table for tokens counted by unit.

    Args:
        units: The units; those without a label take no part.
        counts: [units, layers, R] tokens of each unit that went to each expert.
        seed: Of draws and shuffles.
    """
    labelled = units.label >= 0
    label, tokens = units.label[labelled], units.tokens[labelled].astype(np.float64)
    shape = counts.shape[1:]
    flat = counts[labelled].reshape(len(label), -1).astype(np.float64)
    one_hot = (label[None] == np.arange(len(units.names))[:, None]).astype(np.float64)
    rate = (one_hot @ flat) / (one_hot @ tokens)[:, None]
    lift = _lift(rate)
    members = one_hot.sum(axis=1)
    sure = (members >= FEWEST_UNITS) & (len(label) - members >= FEWEST_UNITS)
    enough = sure[:, None] & (flat.sum(axis=0) >= FEWEST_TOKENS)[None]
    low, high = _intervals(one_hot, flat, tokens, label, seed)
    p = _pooled_p(one_hot, flat, tokens, label, enough, seed)
    full = (len(units.names), *shape)
    return Enrichment(
        names=units.names,
        rate=rate.reshape(full),
        lift=lift.reshape(full),
        low=low.reshape(full),
        high=high.reshape(full),
        p=p.reshape(full),
        q=false_discovery(p).reshape(full),
        enough=enough.reshape(full),
    )


def _lift(rate: NDArray[np.float64]) -> NDArray[np.float64]:
    """Rate over its mean over the labels, which stand on the second axis from the end."""
    mean = rate.mean(axis=-2, keepdims=True)
    return np.divide(rate, mean, out=np.full(rate.shape, np.nan), where=mean > 0)


def _intervals(
    one_hot: NDArray, flat: NDArray, tokens: NDArray, label: NDArray, seed: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    drawn = draws(label, seed=seed)
    sizes = (drawn * tokens) @ one_hot.T  # [draws, labels]
    low, high = np.empty((len(one_hot), flat.shape[1])), np.empty((len(one_hot), flat.shape[1]))
    step = max(1, _POOL // (len(drawn) * max(1, len(one_hot))))
    for start in range(0, flat.shape[1], step):
        part = flat[:, start : start + step]
        # A label's units only: the others are zero in its row of the product.
        rates = np.stack([(drawn * row) @ part for row in one_hot], axis=1) / sizes[:, :, None]
        low[:, start : start + step], high[:, start : start + step] = interval(_lift(rates))
    return low, high


def _pooled_p(
    one_hot: NDArray, flat: NDArray, tokens: NDArray, label: NDArray, enough: NDArray, seed: int
) -> NDArray[np.float64]:
    p = np.full(enough.shape, np.nan)
    if not enough.any():
        return p
    units = len(label)
    residual = flat - tokens[:, None] * (flat.sum(axis=0) / tokens.sum())[None]
    residual -= residual.mean(axis=0)
    members = one_hot.sum(axis=1)
    spread = members * (units - members) / (units - 1)
    deviation = np.sqrt(spread[:, None] * np.square(residual).mean(axis=0)[None])
    # An expert that takes the same share of every unit deviates from nothing.
    still = deviation < 1e-9
    deviation[still] = 1.0

    def statistic(rows: NDArray) -> NDArray:
        found = (rows @ residual) / deviation
        found[still] = 0.0
        return found[enough]

    rounds = int(np.clip(_POOL // enough.sum(), 20, RESAMPLES))
    places = np.arange(len(one_hot))[:, None]
    pool = np.sort(
        np.concatenate(
            [
                statistic((order[None] == places).astype(np.float64))
                for order in shuffles(label, seed=seed, rounds=rounds)
            ]
        )
    )
    observed = statistic(one_hot)
    reached = len(pool) - np.searchsorted(pool, observed - 1e-9, side="left")
    p[enough] = (1 + reached) / (1 + len(pool))
    return p
