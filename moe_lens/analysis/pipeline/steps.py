"""Steps from an expert to one of the next MoE layer that are taken more than loads explain.

For experts i of a layer and j of the next, with n(i, j) the steps counted among N, and the loads
a(i) and b(j) as shares of their layers' choices:

* chance P(j | i) = n(i, j) / sum over j of n(i, j);
* lift = (n(i, j) / N) / (a(i) b(j)): 1 where the layers are independent;
* interval: the middle 95 % of the lift over prompts drawn anew;
* p: one-sided t test over units, since tokens of a prompt are alike and a prompt counts once. With
  A and B the choices of i and of j among T tokens, the steps beyond independence, n - A B / T,
  are to first order the sum over units of e_u = n_u - (A_u B + A B_u) / T + A B T_u / T^2 (delta
  method; for any choice, A B / T is scaled to what independence gives for k x k pairs);
* q: Benjamini and Hochberg over *all* pairs with enough tokens; pairs that are not among the
  strongest, for which no p is worked out, enter with p = 1.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from moe_lens.analysis.enrichment import FEWEST_TOKENS, FEWEST_UNITS
from moe_lens.analysis.resampling import draws, false_discovery, interval
from moe_lens.analysis.units import Units
from moe_lens.trace import Routes

__all__ = ["MOST_STEPS", "StepUnits", "Steps", "judged", "lifts", "strongest"]

MOST_STEPS = 12
"""Steps of each pair of layers that are looked at by prompt."""


@dataclass(frozen=True, eq=False)
class Steps:
    """Some steps, the strongest first.

    Attributes:
        place: [steps] int64, place of the layer that is left, among the MoE layers.
        source: [steps] int64, expert that is left.
        target: [steps] int64, expert of the next MoE layer.
        count: [steps] int64, how often the step is taken.
        chance: [steps] float64, share of the steps from `source` that lead to `target`.
        lift: [steps] float64, against independence with the loads of both layers.
        low: [steps] float64, lower end of the 95 % interval of the lift; NaN on too few prompts.
        high: [steps] float64, upper end.
        shuffled: [steps] float64, the lift where the next layer's choices are shuffled within
            prompts: what the prompt as a whole explains; NaN where it was not counted.
        p: [steps] float64; NaN on too little data.
        q: [steps] float64, p with false discoveries controlled over all pairs of experts.
    """

    place: NDArray[np.int64]
    source: NDArray[np.int64]
    target: NDArray[np.int64]
    count: NDArray[np.int64]
    chance: NDArray[np.float64]
    lift: NDArray[np.float64]
    low: NDArray[np.float64]
    high: NDArray[np.float64]
    shuffled: NDArray[np.float64]
    p: NDArray[np.float64]
    q: NDArray[np.float64]


def lifts(table: NDArray[np.int64], loads: NDArray[np.int64]) -> NDArray[np.float64]:
    """[layers - 1, R, R] lift of every step; NaN where an expert is not used.

    Args:
        table: [layers - 1, R, R] steps.
        loads: [layers, R] choices of each expert.
    """
    share = loads / np.maximum(loads.sum(axis=1, keepdims=True), 1)
    joint = table / np.maximum(table.sum(axis=(1, 2), keepdims=True), 1)
    even = share[:-1, :, None] * share[1:, None, :]
    return np.divide(joint, even, out=np.full(table.shape, np.nan), where=even > 0)


def strongest(
    table: NDArray[np.int64], loads: NDArray[np.int64], most: int = MOST_STEPS
) -> NDArray[np.int64]:
    """[steps, 3] place, source and target of the steps that bind each pair of layers most.

    By their part in the mutual information, n log(lift), which weighs how often with how strongly.
    """
    lift = lifts(table, loads)
    part = np.where(lift > 1, table * np.log2(lift, where=lift > 1, out=np.zeros_like(lift)), 0.0)
    found = []
    for place, layer in enumerate(part):
        order = np.argsort(-layer, axis=None, kind="stable")[:most]
        order = order[layer.ravel()[order] > 0]
        source, target = np.divmod(order, layer.shape[1])
        found.append(np.stack([np.full(len(order), place), source, target], axis=1))
    return np.concatenate(found) if found else np.zeros((0, 3), dtype=np.int64)


class StepUnits:
    """A `Fold` of the second reading: how often each unit takes some steps.

    Args:
        units: The units.
        steps: [steps, 3] place, source, target.
        slots: How many of the slots count: 1 for first choices, k for any.

    Attributes:
        counts: [units, steps] int64.
    """

    def __init__(self, units: Units, steps: NDArray[np.int64], slots: int) -> None:
        self.units, self.steps, self.slots = units, steps, slots
        self.counts = np.zeros((len(units), len(steps)), dtype=np.int64)

    def add(self, routes: Routes) -> None:
        unit = self.units.of_rows(routes)
        for place in np.unique(self.steps[:, 0]):
            here = np.flatnonzero(self.steps[:, 0] == place)
            sides = [
                _chosen(
                    routes.expert_ids[place + side, :, : self.slots], self.steps[here, 1 + side]
                )
                for side in (0, 1)
            ]
            for step in here:
                both = sides[0][int(self.steps[step, 1])] & sides[1][int(self.steps[step, 2])]
                self.counts[:, step] += np.bincount(unit[both], minlength=len(self.units))


def _chosen(ids: NDArray, experts: NDArray[np.int64]) -> dict[int, NDArray[np.bool_]]:
    """Which tokens chose each of `experts`, [tokens] bool each."""
    columns = np.ascontiguousarray(ids.T)
    found = {}
    for expert in np.unique(experts).tolist():
        found[expert] = columns[0] == expert
        for column in columns[1:]:
            found[expert] |= column == expert
    return found


def judged(
    seen: StepUnits,
    table: NDArray[np.int64],
    counts: NDArray[np.int64],
    shuffled: NDArray[np.int64] | None = None,
    *,
    seed: int = 0,
) -> Steps:
    """The steps that `seen` counted by unit, with interval and test.

    Args:
        seen: Their counts by unit.
        table: [layers - 1, R, R] all steps.
        counts: [units, layers, R] choices of each expert.
        shuffled: [layers - 1, R, R] steps where prompts are shuffled.
        seed: Of the draws.
    """
    units, (place, source, target) = seen.units, seen.steps.T
    loads = counts.sum(axis=0)
    lift = lifts(table, loads)[place, source, target]
    count = table[place, source, target]
    a, b = counts[:, place, source].astype(float), counts[:, place + 1, target].astype(float)
    tokens = units.tokens.astype(float)
    # 1 for first choices. Otherwise what k x k pairs make of the product of the loads.
    scale = lift * a.sum(axis=0) * b.sum(axis=0) / np.maximum(count * tokens.sum(), 1)
    low, high, p = (np.full(len(count), np.nan) for _ in range(3))
    if len(units) >= FEWEST_UNITS and len(count):
        drawn = draws(units.label, seed=seed)
        even = (drawn @ a) * (drawn @ b)
        redrawn = np.divide(
            (drawn @ seen.counts) * (drawn @ tokens)[:, None] * scale,
            even,
            out=np.zeros_like(even),
            where=even > 0,
        )
        low, high = interval(redrawn, units=len(units))
        p = _p(seen.counts, a, b, tokens, scale)
        p[np.minimum(a.sum(axis=0), b.sum(axis=0)) < FEWEST_TOKENS] = np.nan
    row = table[place].sum(axis=2)[np.arange(len(place)), source]
    still = (
        np.full(len(count), np.nan)
        if shuffled is None
        else lifts(shuffled, loads)[place, source, target]
    )
    order = np.argsort(-count * np.log2(np.maximum(lift, 1)), kind="stable")
    return Steps(
        place=place[order],
        source=source[order],
        target=target[order],
        count=count[order],
        chance=(count / np.maximum(row, 1))[order],
        lift=lift[order],
        low=low[order],
        high=high[order],
        shuffled=still[order],
        p=p[order],
        q=_q(p, loads)[order],
    )


def _p(
    counts: NDArray[np.int64], a: NDArray, b: NDArray, tokens: NDArray, scale: NDArray
) -> NDArray[np.float64]:
    every, all_a, all_b = tokens.sum(), a.sum(axis=0), b.sum(axis=0)
    even = (a * all_b + all_a * b) / every - np.outer(tokens, all_a * all_b) / every**2
    excess = counts - even / scale
    error = excess.std(axis=0, ddof=1) * np.sqrt(len(excess))
    t = np.divide(excess.sum(axis=0), error, out=np.zeros(len(error)), where=error > 0)
    return np.asarray(stats.t.sf(t, len(excess) - 1), dtype=np.float64)


def _q(p: NDArray[np.float64], loads: NDArray[np.int64]) -> NDArray[np.float64]:
    """Over all pairs of experts with enough tokens; those without a p enter with 1."""
    enough = (loads >= FEWEST_TOKENS).sum(axis=1)
    pairs = int((enough[:-1] * enough[1:]).sum())
    others = max(0, pairs - int((~np.isnan(p)).sum()))
    return false_discovery(np.concatenate([p, np.ones(others)]))[: len(p)]
