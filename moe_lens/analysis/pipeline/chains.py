"""The way a label takes through the experts, chosen on half of its prompts, measured on the other.

**Choosing.** F(D, i, j) is the share of the tokens of label D that choose expert i in a MoE layer
and expert j in the next. The chain is the path with one expert in each MoE layer that has the
largest sum over layers of F log2(F / mean of F over the labels), found by dynamic programming
(Viterbi 1967): a step counts for how many tokens take it, and for how much more than other labels'
tokens do. With a width of N there are N such paths that share no expert, the best one first; then
a layer of the chain is a set of N experts.

**Measuring**, on prompts that had no part in the choice. A token is *on* the chain in a layer if
one of the experts it chose there is in the chain's set; it takes a *step* if it is on the chain in
a layer and in the next, and the *whole* chain if it is on it in every MoE layer. All are counted
token by token: a product of shares would take layers for independent.

* flow: share of the label's tokens that take a step, mean over steps;
* lift: flow over the mean of the labels' flows on this chain, each label with the same weight;
* interval, null (labels shuffled over the prompts) and p as in `enrichment`; q over labels.

A pipeline is claimed where q is at most 0.05, the lift `LEAST_LIFT` at least with an interval above
1, and there are prompts enough.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from moe_lens.analysis.enrichment import FEWEST_TOKENS, FEWEST_UNITS, Enrichment, enrichment
from moe_lens.analysis.resampling import FALSE_SHARE, false_discovery
from moe_lens.analysis.units import Units
from moe_lens.trace import Routes

__all__ = ["LEAST_LIFT", "MOST_LABELS", "Chain", "ChainUnits", "Halves", "best_chains", "chains"]

MOST_LABELS = 24
"""Labels that get a chain: those with the most tokens."""

LEAST_LIFT = 1.5
"""Lift from which a chain is called a label's pipeline."""

BITS = 8
"""Labels whose bits are counted together."""


@dataclass(frozen=True, eq=False)
class Chain:
    """The chain of a label. Shares are of the label's tokens in the prompts it is measured on.

    Attributes:
        label: The label.
        experts: For each MoE layer the experts of the chain, the best path's first.
        chosen_prompts: Prompts of the label that the chain was chosen on.
        prompts: Prompts of the label that it is measured on.
        tokens: Tokens of these.
        on: [layers] float64, share of tokens on the chain in each MoE layer.
        steps: [layers - 1] float64, share that is on it in a MoE layer and in the next.
        flow: Mean of `steps`.
        low: Lower end of the 95 % interval of the flow.
        high: Upper end.
        null: The flow of all labelled tokens: what shuffled labels give on average.
        others: The flow of the other labels, each with the same weight.
        lift: Flow over the mean over labels.
        lift_low: Lower end of its interval.
        lift_high: Upper end.
        p: One-sided; NaN on too little data.
        q: With false discoveries controlled over labels.
        whole: Share that is on the chain in every MoE layer.
        whole_low: Lower end of its interval.
        whole_high: Upper end.
        whole_independent: Product of `on`: the whole share, if layers were independent.
        whole_others: The share of the other labels, each with the same weight.
        whole_lift: As `lift`, of the whole share; NaN if no token takes the whole chain.
        claimed: Whether this is called the label's pipeline.
        why: Why it is not; empty if it is.
    """

    label: str
    experts: tuple[tuple[int, ...], ...]
    chosen_prompts: int
    prompts: int
    tokens: int
    on: NDArray[np.float64]
    steps: NDArray[np.float64]
    flow: float
    low: float
    high: float
    null: float
    others: float
    lift: float
    lift_low: float
    lift_high: float
    p: float
    q: float
    whole: float
    whole_low: float
    whole_high: float
    whole_independent: float
    whole_others: float
    whole_lift: float
    claimed: bool
    why: str


@dataclass(frozen=True, eq=False)
class Halves:
    """Which units choose chains and which measure them.

    Attributes:
        names: The labels that get a chain, sorted: those with two units or more, and of these the
            `MOST_LABELS` with the most tokens.
        choosing: [units] int64, place in `names` of those that choose; -1: no part in it.
        measuring: [units] int64, place in `names` of those that measure; -1: no part in it.
    """

    names: tuple[str, ...]
    choosing: NDArray[np.int64]
    measuring: NDArray[np.int64]

    @classmethod
    def of(cls, units: Units, *, seed: int = 0) -> Halves:
        """Halve the units of each label at random; an odd one measures."""
        tokens = {
            place: int(units.tokens[units.label == place].sum())
            for place in range(len(units.names))
            if (units.label == place).sum() > 1
        }
        kept = sorted(sorted(tokens, key=lambda place: -tokens[place])[:MOST_LABELS])
        choosing, measuring = (np.full(len(units), -1, dtype=np.int64) for _ in range(2))
        random = np.random.default_rng(seed)
        for number, place in enumerate(kept):
            members = random.permutation(np.flatnonzero(units.label == place))
            choosing[members[: len(members) // 2]] = number
            measuring[members[len(members) // 2 :]] = number
        return cls(tuple(units.names[place] for place in kept), choosing, measuring)


def best_chains(
    steps: NDArray[np.integer], tokens: NDArray[np.int64], width: int
) -> list[tuple[tuple[int, ...], ...]]:
    """For each label the experts of each MoE layer, best path first.

    Args:
        steps: [labels, layers - 1, R, R] steps of any choice.
        tokens: [labels] tokens they come from.
        width: Paths of each label; fewer where experts run out.
    """
    mean = np.zeros(steps.shape[1:])
    for each, many in zip(steps, tokens, strict=True):
        mean += each / (max(1, int(many)) * len(steps))
    found = []
    for each, many in zip(steps, tokens, strict=True):
        share = each / max(1, int(many))
        ratio = np.divide(share, mean, out=np.ones_like(share), where=share > 0)
        value = np.where(share > 0, share * np.log2(ratio), -np.inf)
        paths: list[tuple[int, ...]] = []
        for _ in range(width):
            path = _best_path(value)
            if path is None:
                break
            paths.append(path)
            for layer, expert in enumerate(path):
                if layer:
                    value[layer - 1, :, expert] = -np.inf
                if layer < len(value):
                    value[layer, expert] = -np.inf
        found.append(tuple(zip(*paths, strict=True)))
    return found


def _best_path(value: NDArray[np.float64]) -> tuple[int, ...] | None:
    """The path with the largest sum of the values [layers - 1, R, R] of its steps."""
    reached = np.zeros(value.shape[1])
    origins = []
    for step in value:
        ways = reached[:, None] + step
        origins.append(ways.argmax(axis=0))
        reached = ways.max(axis=0)
    path = [int(reached.argmax())]
    if not np.isfinite(reached[path[0]]):
        return None
    for origin in reversed(origins):
        path.append(int(origin[path[-1]]))
    return tuple(reversed(path))


class ChainUnits:
    """A `Fold` of the second reading: tokens on each chain, by unit.

    Args:
        units: The units.
        halves: Which of them measure.
        experts: For each label and MoE layer the experts of its chain.
        width: R.

    Attributes:
        on: [units, layers, chains] int64.
        steps: [units, layers - 1, chains] int64.
        whole: [units, chains] int64.
    """

    def __init__(
        self,
        units: Units,
        halves: Halves,
        experts: list[tuple[tuple[int, ...], ...]],
        width: int,
    ) -> None:
        layers, chained = len(experts[0]), len(experts)
        self.units, self.halves = units, halves
        # Each expert has a bit for each chain it is in; the last entry is an empty slot.
        self.member = np.zeros((layers, width + 1), dtype=np.uint32)
        for number, chain in enumerate(experts):
            for layer, chosen in enumerate(chain):
                self.member[layer, list(chosen)] |= np.uint32(1 << number)
        self.on = np.zeros((len(units), layers, chained), dtype=np.int64)
        self.steps = np.zeros((len(units), layers - 1, chained), dtype=np.int64)
        self.whole = np.zeros((len(units), chained), dtype=np.int64)

    def add(self, routes: Routes) -> None:
        unit = self.units.of_rows(routes)
        rows = np.flatnonzero(self.halves.measuring[unit] >= 0)
        unit = unit[rows]
        whole = np.full(len(rows), ~np.uint32(0))
        before = whole
        for layer, member in enumerate(self.member):
            bits = np.zeros(len(rows), dtype=np.uint32)
            for slot in np.ascontiguousarray(routes.expert_ids[layer, rows].T):
                bits |= member[np.minimum(slot, len(member) - 1, dtype=np.intp)]
            self.on[:, layer] += self._counted(unit, bits)
            if layer:
                self.steps[:, layer - 1] += self._counted(unit, bits & before)
            whole = whole & bits
            before = bits
        self.whole += self._counted(unit, whole)

    def _counted(self, unit: NDArray[np.int64], bits: NDArray[np.uint32]) -> NDArray[np.int64]:
        """[units, chains] in how many rows of a unit each bit is set."""
        found = []
        for start in range(0, self.whole.shape[1], BITS):
            many = min(BITS, self.whole.shape[1] - start)
            part = ((bits >> np.uint32(start)) & np.uint32((1 << many) - 1)).astype(np.int64)
            table = np.bincount((unit << many) | part, minlength=len(self.units) << many)
            sets = np.arange(1 << many)[:, None] >> np.arange(many) & 1
            found.append(table.reshape(-1, 1 << many) @ sets)
        return np.concatenate(found, axis=1)


def chains(
    seen: ChainUnits,
    experts: list[tuple[tuple[int, ...], ...]],
    *,
    seed: int = 0,
) -> tuple[Chain, ...]:
    """Measure the chains of all labels.

    Args:
        seen: Their counts by unit.
        experts: For each label and MoE layer the experts of its chain.
        seed: Of draws and shuffles.
    """
    names, measuring = seen.halves.names, seen.halves.measuring
    units = replace(seen.units, names=names, label=measuring)
    # Steps as tokens: one that takes all of a chain's steps counts as one.
    cells = np.stack([seen.steps.mean(axis=1), seen.whole], axis=1)  # [units, 2, chains]
    table = enrichment(units, cells, seed=seed)
    kept = measuring >= 0
    places = np.arange(len(names))
    q = false_discovery(table.p[places, 0, places])
    null = cells[kept].sum(axis=0) / units.tokens[kept].sum()
    found = []
    for place, label in enumerate(names):
        own = measuring == place
        many = int(units.tokens[own].sum())
        on = seen.on[own][:, :, place].sum(axis=0) / many
        flow, whole = table.rate[place, :, place]
        others = table.rate[:, :, place].sum(axis=0) - table.rate[place, :, place]
        others /= max(1, len(names) - 1)
        why = _why_not(table, place, float(q[place]), int(own.sum()), int((kept & ~own).sum()))
        found.append(
            Chain(
                label=label,
                experts=experts[place],
                chosen_prompts=int(units.prompts[seen.halves.choosing == place].sum()),
                prompts=int(units.prompts[own].sum()),
                tokens=many,
                on=on,
                steps=seen.steps[own][:, :, place].sum(axis=0) / many,
                flow=float(flow),
                low=float(table.rate_low[place, 0, place]),
                high=float(table.rate_high[place, 0, place]),
                null=float(null[0, place]),
                others=float(others[0]),
                lift=float(table.lift[place, 0, place]),
                lift_low=float(table.low[place, 0, place]),
                lift_high=float(table.high[place, 0, place]),
                p=float(table.p[place, 0, place]),
                q=float(q[place]),
                whole=float(whole),
                whole_low=float(table.rate_low[place, 1, place]),
                whole_high=float(table.rate_high[place, 1, place]),
                whole_independent=float(np.prod(on)),
                whole_others=float(others[1]),
                whole_lift=float(table.lift[place, 1, place]),
                claimed=not why,
                why=why,
            )
        )
    return tuple(found)


def _why_not(table: Enrichment, place: int, q: float, own: int, others: int) -> str:
    lift, low = table.lift[place, 0, place], table.low[place, 0, place]
    if min(own, others) < FEWEST_UNITS:
        return (
            f"too few prompts to measure on: {own} of the label and {others} of others, of "
            f"{FEWEST_UNITS} each at least"
        )
    if not table.enough[place, 0, place]:
        return f"fewer than {FEWEST_TOKENS} tokens take it"
    if not q <= FALSE_SHARE:
        return f"not above shuffled labels (q = {q:.2g})"
    if not (lift >= LEAST_LIFT and low > 1):
        return f"other labels take it nearly as often (lift {lift:.2f}, from {low:.2f})"
    return ""
