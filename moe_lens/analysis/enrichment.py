"""Which labels an expert is chosen for more often than for others, with interval and null.

The one table that taxonomy, domains and pipelines read. For a label D and an expert e of a layer:

* rate(D, e) = tokens of D routed to e / tokens of D (OLMoE, arXiv 2409.02060, Eq. 7, with any k);
* lift(D, e) = rate(D, e) / mean of rate(D', e) over all labels D', each label with the same weight:
  1 where e does not care, at most the number of labels;
* their intervals: 95 %, units drawn anew within each label, wider where a label has few of them;
* p(D, e): labels are shuffled over the units, see `null`;
* q: p after Benjamini and Hochberg over all cells with enough data.

A cell is *claimed* if q is small and the interval of its lift lies above 1. The first asks whether
labels matter at all, and takes units for exchangeable; the second asks whether this label's own
units agree, and does not.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .null import Sample, pooled_p
from .resampling import FALSE_SHARE, RESAMPLES, draws, false_discovery, interval
from .units import Units

__all__ = ["FEWEST_TOKENS", "FEWEST_UNITS", "Enrichment", "enrichment"]

FEWEST_TOKENS = 50
"""Tokens that an expert must have received before anything is claimed of it."""

FEWEST_UNITS = 5
"""Units that a label must have, and the other labels together, before anything is claimed of it."""

_AT_ONCE = 4_000_000
"""Drawn rates in memory at most."""

_DRAWN = 60_000_000
"""Drawn rates in all, as far as `_FEWEST_DRAWS` allows."""

_FEWEST_DRAWS = 400


@dataclass(frozen=True, eq=False)
class Enrichment:
    """Labels by cells; a cell is an expert of a layer.

    Attributes:
        names: [labels] the labels.
        rate: [labels, layers, R] float64, share of the label's tokens routed to the expert; NaN of
            a label without tokens.
        rate_low: [labels, layers, R] float64, lower end of the interval of the rate; NaN of a label
            with one unit.
        rate_high: [labels, layers, R] float64, upper end.
        lift: [labels, layers, R] float64; NaN for an expert that no labelled token chose.
        low: [labels, layers, R] float64, lower end of the interval of the lift; NaN of a label with
            one unit.
        high: [labels, layers, R] float64, upper end.
        p: [labels, layers, R] float64, one-sided; NaN on too little data.
        q: [labels, layers, R] float64, p with false discoveries controlled over all cells.
        enough: [labels, layers, R] bool, whether there is data enough for a claim.
    """

    names: tuple[str, ...]
    rate: NDArray[np.float64]
    rate_low: NDArray[np.float64]
    rate_high: NDArray[np.float64]
    lift: NDArray[np.float64]
    low: NDArray[np.float64]
    high: NDArray[np.float64]
    p: NDArray[np.float64]
    q: NDArray[np.float64]
    enough: NDArray[np.bool_]

    @property
    def claimed(self) -> NDArray[np.bool_]:
        """[labels, layers, R] whether the expert may be said to prefer the label."""
        return self.enough & (self.q <= FALSE_SHARE) & (self.low > 1)


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
    rate = _over(one_hot @ flat, (one_hot @ tokens)[:, None])
    members = one_hot.sum(axis=1)
    sure = (members >= FEWEST_UNITS) & (len(label) - members >= FEWEST_UNITS)
    enough = sure[:, None] & (flat.sum(axis=0) >= FEWEST_TOKENS)[None]
    ends = _intervals(one_hot, flat, tokens, label, seed)
    sample = Sample(flat, tokens, units.squares[labelled].astype(np.float64), shape[-1])
    p = pooled_p(sample, label, len(units.names), enough, seed=seed)
    full = (len(units.names), *shape)
    return Enrichment(
        names=units.names,
        rate=rate.reshape(full),
        rate_low=ends[0, 0].reshape(full),
        rate_high=ends[0, 1].reshape(full),
        lift=_lift(rate).reshape(full),
        low=ends[1, 0].reshape(full),
        high=ends[1, 1].reshape(full),
        p=p.reshape(full),
        q=false_discovery(p).reshape(full),
        enough=enough.reshape(full),
    )


def _over(part: NDArray[np.float64], whole: NDArray[np.float64]) -> NDArray[np.float64]:
    """part / whole, NaN where there is no whole."""
    found = np.full(np.broadcast_shapes(part.shape, whole.shape), np.nan)
    return np.divide(part, whole, out=found, where=whole > 0)


def _lift(rate: NDArray[np.float64]) -> NDArray[np.float64]:
    """Rate over its mean over the labels with tokens; labels are the second axis from the end."""
    there = np.asarray(~np.isnan(rate).all(axis=-1))
    mean = rate.sum(axis=-2, where=there[..., None]) / np.maximum(1, there.sum(axis=-1))[..., None]
    return _over(rate, mean[..., None, :])


def _intervals(
    one_hot: NDArray[np.float64],
    flat: NDArray[np.float64],
    tokens: NDArray[np.float64],
    label: NDArray[np.int64],
    seed: int,
) -> NDArray[np.float64]:
    """[rate and lift, low and high, labels, cells]"""
    rounds = int(np.clip(_DRAWN // (len(one_hot) * flat.shape[1]), _FEWEST_DRAWS, RESAMPLES))
    drawn = draws(label, seed=seed, resamples=rounds)
    sizes = (drawn * tokens) @ one_hot.T  # [draws, labels]
    members = one_hot.sum(axis=1).astype(np.int64)
    ends = np.full((2, 2, len(one_hot), flat.shape[1]), np.nan)
    step = max(1, _AT_ONCE // (len(drawn) * max(1, len(one_hot))))
    owned = [np.flatnonzero(row) for row in one_hot]
    for start in range(0, flat.shape[1], step):
        part = slice(start, start + step)
        sums = np.stack([drawn[:, own] @ flat[own, part] for own in owned], axis=1)
        rates = _over(sums, sizes[:, :, None])
        for kind, values in enumerate((rates, _lift(rates))):
            for place in np.flatnonzero(members > 1):
                ends[kind, :, place, part] = interval(values[:, place], units=members[place])
    return ends
