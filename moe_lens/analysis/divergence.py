"""How different the labels' distributions over experts are, layer by layer, and by chance.

Measured two ways (see `distributions`): mean Jensen-Shannon divergence over pairs of labels, and
mutual information. Each label counts the same, however many tokens it has.

By chance: units are exchanged between labels, not as they are, but as what they deviate from the
mean of all labels in units of what a unit of that length would (see `null`). So a label keeps its
lengths: one with little text is far from the others by chance alone, and stays so in the null.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .distributions import information, mean_jensen_shannon, shares
from .enrichment import FEWEST_UNITS
from .null import Sample
from .resampling import RESAMPLES, draws, false_discovery, shuffles, spread
from .units import Units

__all__ = ["Divergence", "divergences"]

Array = NDArray[np.float64]

_LOGARITHMS = 200_000_000
"""Taken for draws, and again for shuffles, as far as `_FEWEST_ROUNDS` allows."""

_FEWEST_ROUNDS = 200

_AT_ONCE = 250
"""Rounds whose tables are in memory together."""


@dataclass(frozen=True, eq=False)
class Divergence:
    """One measure, by MoE layer, in bits.

    Attributes:
        value: [layers] float64, of the counts as they are: too high on little text.
        low: [layers] float64, lower end of the 95 % interval: how far another corpus of this size
            would differ. NaN if no label has two units.
        high: [layers] float64, upper end.
        shuffled: [layers] float64, mean with units shuffled over labels: what chance alone gives.
        excess: [layers] float64, value less shuffled.
        p: [layers] float64, share of shuffles that reach the value; NaN on too little data.
        q: [layers] float64, p with false discoveries controlled over the layers.
    """

    value: Array
    low: Array
    high: Array
    shuffled: Array
    excess: Array
    p: Array
    q: Array


def divergences(
    units: Units, counts: NDArray[np.int64], *, seed: int = 0
) -> tuple[Divergence, Divergence]:
    """Jensen-Shannon divergence and mutual information of the labels that have tokens.

    Args:
        units: The units; those without a label take no part.
        counts: [units, layers, R] tokens of each unit that went to each expert.
        seed: Of draws and shuffles.
    """
    kept = units.label >= 0
    present, label = np.unique(units.label[kept], return_inverse=True)
    # Single precision for the many products: a relative error of 1e-7 is nothing to an interval.
    flat = np.ascontiguousarray(np.moveaxis(counts[kept], 1, 0), dtype=np.float32)
    members = np.bincount(label)
    places = np.arange(len(present))[:, None]
    own = label[None] == places
    cost = (len(present) * (len(present) - 1) // 2 + len(present) + 1) * flat[:, 0].size
    rounds = int(np.clip(_LOGARITHMS // cost, _FEWEST_ROUNDS, RESAMPLES))
    table = draws(label, seed=seed, resamples=rounds)
    drawn = _measured(flat, (own * row for row in table))
    orders = shuffles(np.arange(len(label)), seed=seed, rounds=rounds)
    null = _by_chance(_sample(units, counts), own, orders)
    value = _measured(flat.astype(np.float64), [own])[:, 0]
    sure = (members >= FEWEST_UNITS).sum() >= 2
    fewest = int(members[members > 1].min(initial=len(label)))
    found = []
    for kind in range(2):
        low = high = np.full(len(flat), np.nan)
        if (members > 1).any():
            low, high = spread(value[kind], drawn[kind], units=fewest)
        reached = (null[kind] >= value[kind] * (1 - 1e-6)).sum(axis=0)
        p = (1 + reached) / (1 + rounds) if sure else np.full(len(low), np.nan)
        shuffled = null[kind].mean(axis=0)
        found.append(
            Divergence(
                value=value[kind],
                low=np.maximum(low, 0.0),
                high=high,
                shuffled=shuffled,
                excess=value[kind] - shuffled,
                p=p,
                q=false_discovery(p),
            )
        )
    return found[0], found[1]


def _measured(flat: NDArray[np.floating], weights: Iterable[NDArray]) -> Array:
    """[2, rounds, layers] both measures, for tables [labels, units] of how units are weighted.

    Args:
        flat: [layers, units, R] tokens.
        weights: A table for each round.
    """
    parts = []
    for rows in _batches(weights):  # [rounds, labels, units]
        rounds, labels, units = rows.shape
        measured = np.empty((2, rounds, len(flat)))
        for place, layer in enumerate(flat):
            sums = rows.reshape(-1, units).astype(flat.dtype) @ layer
            measured[:, :, place] = _both(sums.reshape(rounds, labels, -1))
        parts.append(measured)
    return np.concatenate(parts, axis=1)


def _sample(units: Units, counts: NDArray[np.int64]) -> Sample:
    kept = units.label >= 0
    flat = counts[kept].reshape(int(kept.sum()), -1).astype(np.float64)
    tokens, squares = units.tokens[kept], units.squares[kept]
    return Sample(flat, tokens.astype(np.float64), squares.astype(np.float64), counts.shape[2])


def _by_chance(
    sample: Sample, own: NDArray[np.bool_], orders: Iterable[NDArray[np.int64]]
) -> Array:
    """[2, rounds, layers] both measures of what each order of the residuals makes of the labels."""
    share, scale, rest = sample.residuals()
    labels, (units, layers) = len(own), scale.shape
    expected = np.outer(own @ sample.tokens, share).reshape(labels, layers, -1)
    residuals = np.ascontiguousarray(
        np.moveaxis(rest.reshape(units, layers, -1), 1, 0), dtype=np.float32
    )
    parts = []
    for order in _batches(orders):  # [rounds, units]
        measured = np.empty((2, len(order), layers))
        for place in range(layers):
            rows = (own * scale[:, place]).astype(np.float32)[:, order]  # [labels, rounds, units]
            moved = rows.swapaxes(0, 1).reshape(-1, units) @ residuals[place]
            sums = expected[:, place] + moved.reshape(len(order), labels, -1)
            measured[:, :, place] = _both(np.maximum(sums, 0.0).astype(np.float32))
        parts.append(measured)
    return np.concatenate(parts, axis=1)


def _both(sums: NDArray[np.floating]) -> Array:
    """[2, rounds] both measures of tokens [rounds, labels, R]."""
    p = shares(np.moveaxis(sums, 1, 0))
    if np.isnan(p).any():  # a label drawn without a choice in this layer differs from none
        p = np.where(np.isnan(p), np.nanmean(p, axis=0), p)
    return np.stack([mean_jensen_shannon(p), information(p)])


def _batches(weights: Iterable[NDArray]) -> Iterator[NDArray]:
    waiting: list[NDArray] = []
    for each in weights:
        waiting.append(each)
        if len(waiting) == _AT_ONCE:
            yield np.stack(waiting)
            waiting = []
    if waiting:
        yield np.stack(waiting)
