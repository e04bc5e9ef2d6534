"""How specialisation changes with depth: for each label, and for the layers as wholes.

* effective experts of a label in a layer: 2^H of the shares of its choices that go to each expert
  (H in bits): as many equally used experts would be as spread out;
* top expert: of those with a claimed lift (see `enrichment`) the one with the largest; where there
  is none, the most chosen;
* own experts from: the first MoE layer with a claimed lift of 2 or more;
* specialised: experts with a claimed lift of 2 or more for any label;
* kept: of the specialised experts with a match in the next layer, the share whose match is
  specialised in the same label.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moe_lens.analysis.enrichment import Enrichment
from moe_lens.analysis.resampling import draws, interval
from moe_lens.analysis.units import Units

__all__ = ["OWN", "Roles", "roles"]

OWN = 2.0
"""Lift from which an expert is a label's own."""

DRAWS = 200
"""Draws of an interval: each is a table of labels by experts."""


@dataclass(frozen=True, eq=False)
class Roles:
    """Specialisation by depth.

    Attributes:
        names: The labels.
        effective: [labels, layers] float64, effective number of experts.
        low: [labels, layers] float64, lower end of its 95 % interval; NaN for one unit.
        high: [labels, layers] float64, upper end.
        top: [labels, layers] int64, the top expert.
        lift: [labels, layers] float64, its lift.
        claimed: [labels, layers] bool, whether that lift is claimed.
        own_from: [labels] int64, model layer index; -1: in none.
        specialised: [layers] int64, experts that are a label's own.
        label_of: [layers, R] int64, place in `names` of the label whose own an expert is most;
            -1: of none.
        kept: [layers - 1] float64; NaN where no specialised expert has a match.
    """

    names: tuple[str, ...]
    effective: NDArray[np.float64]
    low: NDArray[np.float64]
    high: NDArray[np.float64]
    top: NDArray[np.int64]
    lift: NDArray[np.float64]
    claimed: NDArray[np.bool_]
    own_from: NDArray[np.int64]
    specialised: NDArray[np.int64]
    label_of: NDArray[np.int64]
    kept: NDArray[np.float64]


def roles(
    units: Units,
    counts: NDArray[np.int64],
    table: Enrichment,
    layers: tuple[int, ...],
    match: NDArray[np.int64],
    *,
    seed: int = 0,
) -> Roles:
    """Work out the roles.

    Args:
        units: The units.
        counts: [units, layers, R] choices by unit.
        table: Their enrichment.
        layers: Model layer index of each MoE layer.
        match: [layers - 1, R] matched expert of the next MoE layer; -1: none.
        seed: Of the draws.
    """
    lift = np.where(table.claimed, table.lift, -1.0)
    claimed = np.asarray(lift.max(axis=2) >= 0)
    top = np.where(claimed, lift.argmax(axis=2), table.rate.argmax(axis=2))
    own = np.asarray(lift >= OWN)
    first = np.asarray(own.any(axis=2))
    own_from = np.where(first.any(axis=1), np.array(layers)[first.argmax(axis=1)], -1)
    label_of = np.where(own.any(axis=0), np.where(own, lift, -1.0).argmax(axis=0), -1)
    low, high = _intervals(units, counts, seed)
    return Roles(
        names=table.names,
        effective=_effective(table.rate),
        low=low,
        high=high,
        top=top,
        lift=np.take_along_axis(table.lift, top[:, :, None], axis=2)[:, :, 0],
        claimed=claimed,
        own_from=own_from,
        specialised=own.any(axis=0).sum(axis=1),
        label_of=label_of,
        kept=_kept(label_of, match),
    )


def _effective(rate: NDArray[np.float64]) -> NDArray[np.float64]:
    """2^entropy of the last axis."""
    share = rate / np.maximum(rate.sum(axis=-1, keepdims=True), 1e-30)
    return np.exp2(-(share * np.log2(share, where=share > 0, out=np.zeros_like(share))).sum(-1))


def _intervals(
    units: Units, counts: NDArray[np.int64], seed: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    shape = (len(units.names), counts.shape[1])
    low, high = np.full(shape, np.nan), np.full(shape, np.nan)
    drawn = draws(units.label, seed=seed, resamples=DRAWS)
    for label in range(shape[0]):
        own = units.label == label
        if own.sum() > 1:
            for layer in range(shape[1]):
                found = _effective(drawn[:, own] @ counts[own, layer].astype(float))
                low[label, layer], high[label, layer] = interval(found, units=int(own.sum()))
    return low, high


def _kept(label_of: NDArray[np.int64], match: NDArray[np.int64]) -> NDArray[np.float64]:
    kept = np.full(len(match), np.nan)
    for place, each in enumerate(match):
        rows = np.flatnonzero((each >= 0) & (label_of[place] >= 0))
        if len(rows):
            kept[place] = (label_of[place, rows] == label_of[place + 1, each[rows]]).mean()
    return kept
