"""Do neighbouring tokens go to the same experts? (Mixtral, arXiv 2401.04088, section 5, Table 5)

    found = locality(trace)
    found.first.share[0]        # layer 0: share of tokens whose first choice the next token repeats

A pair is a token and the next one of the same prompt. Three questions are asked of it:

* *first*: is the first choice the same expert? Random: 1 / E.
* *any*: do the chosen sets share an expert? Random: 1 - C(E - k, k) / C(E, k). (The paper asks
  about the first or second choice of a k of 2, which is the same.)
* *overlap*: how many experts do the sets share? Random: k^2 / E.

The random expectation knows nothing of the text. The second comparison does: the same tokens of
the same prompts in shuffled order, so what remains above it is due to order alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import comb
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from moe_lens.errors import UsageError
from moe_lens.kernels import NO_EXPERT
from moe_lens.telling import Progress
from moe_lens.trace import Routes, Trace

from .expert_sets import expert_sets, shared_experts
from .passes import fold, successors
from .resampling import draws, interval
from .result import Result
from .table import Table
from .units import Units

__all__ = ["Agreement", "Locality", "Neighbours", "locality"]

ALL = "all"
"""Name of the row that counts every prompt."""


@dataclass(frozen=True, eq=False)
class Agreement:
    """One question, for each group of prompts and each MoE layer.

    Attributes:
        unit: What `value` counts.
        value: [groups, layers] float64, mean over pairs.
        low: [groups, layers] float64, lower end of the 95 % interval over prompts; NaN of a group
            with one prompt.
        high: [groups, layers] float64, upper end.
        shuffled: [groups, layers] float64, the mean where the tokens of each prompt are shuffled.
        random: [layers] float64, expectation if every token chose k experts at random.
    """

    unit: str
    value: NDArray[np.float64]
    low: NDArray[np.float64]
    high: NDArray[np.float64]
    shuffled: NDArray[np.float64]
    random: NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Locality(Result):
    """What neighbouring tokens have in common.

    Attributes:
        definition: What the numbers are.
        layers: Model layer index of each MoE layer.
        groups: ``all``, then the labels.
        pairs: [groups] int64, pairs counted.
        prompts: [groups] int64, prompts they come from.
        first: The same first choice.
        any: At least one expert in common.
        overlap: Number of experts in common.
        seed: Of the shuffling and the intervals.
    """

    kind: ClassVar[str] = "locality"
    definition: str
    layers: tuple[int, ...]
    groups: tuple[str, ...]
    pairs: NDArray[np.int64]
    prompts: NDArray[np.int64]
    first: Agreement
    any: Agreement
    overlap: Agreement
    seed: int

    @property
    def title(self) -> str:
        return f"Neighbouring tokens that share experts, {int(self.pairs[0]):,} pairs"

    def findings(self) -> list[str]:
        """The layer that keeps its first choice most, against both expectations."""
        best = int(np.argmax(self.first.value[0]))
        value, shuffled = self.first.value[0, best], self.first.shuffled[0, best]
        return [
            f"Layer {self.layers[best]} repeats its first choice most: {100 * value:.1f} % of the "
            f"tokens, {100 * shuffled:.1f} % in shuffled order, "
            f"{100 * self.first.random[best]:.1f} % at random."
        ]

    def tables(self) -> list[Table]:
        """One for each question: groups by layers, then the two expectations."""
        heads = {"first": "Same first choice, %", "any": "Any expert in common, %"}
        tables = [self._table(getattr(self, name), title, 100.0) for name, title in heads.items()]
        return [*tables, self._table(self.overlap, "Experts in common", 1.0)]

    def _table(self, asked: Agreement, title: str, scale: float) -> Table:
        names = [*self.groups, "all, shuffled", "random"]
        values = scale * np.vstack([asked.value, asked.shuffled[:1], asked.random[None]])
        layers = [f"layer {layer}" for layer in self.layers]
        if len(layers) > len(names):  # many layers go downwards, where there is room
            rows = zip(layers, values.T.tolist(), strict=True)
            columns = ("prompts", *names)
        else:
            rows = zip(names, values.tolist(), strict=True)
            columns = ("prompts", *layers)
        return Table(columns, tuple((name, *row) for name, row in rows), title)


class Neighbours:
    """A `Fold`: agreement of neighbours by unit, in the order of the text and shuffled.

    Attributes:
        pairs: [units] int64.
        sums: [2, 3, units, layers] float64: as it is, shuffled; first, any, overlap.
    """

    def __init__(self, units: Units, layers: int, *, seed: int = 0) -> None:
        self.units = units
        self.pairs = np.zeros(len(units), dtype=np.int64)
        self.sums = np.zeros((2, 3, len(units), layers))
        self._random = np.random.default_rng(seed)

    def add(self, routes: Routes) -> None:
        here = successors(routes)
        unit = self.units.of_rows(routes)[here]
        self.pairs += np.bincount(unit, minlength=len(self.units))
        # A stable sort by prompt of a random order shuffles within each prompt.
        order = self._random.permutation(len(routes))
        order = order[np.argsort(routes.prompt[order], kind="stable")]
        for place, layer in enumerate(routes.expert_ids):
            first, chosen = layer[:, 0], expert_sets(layer, routes.router_width)
            for kind, rows in enumerate((None, order)):
                self._count(kind, place, unit, first, chosen, rows, here)

    def _count(
        self,
        kind: int,
        place: int,
        unit: NDArray[np.int64],
        first: NDArray[np.unsignedinteger],
        chosen: NDArray[np.uint64],
        order: NDArray[np.int64] | None,
        here: NDArray[np.int64],
    ) -> None:
        if order is not None:
            first, chosen = first[order], chosen[order]
        shared = shared_experts(chosen[here], chosen[here + 1])
        answers = (first[here] == first[here + 1], shared > 0, shared)
        for asked, values in enumerate(answers):
            self.sums[kind, asked, :, place] += np.bincount(unit, values, len(self.units))


def locality(trace: Trace, *, seed: int = 0, progress: Progress | None = None) -> Locality:
    """How often neighbouring tokens share experts, over all prompts and by label.

    Args:
        trace: A recorded run.
        seed: Of the shuffling and the intervals.
        progress: Called with tokens read and tokens in all.

    Raises:
        UsageError: No prompt has two tokens.
        CaptureError: The trace has no tokens.
    """
    units = Units.of(trace)
    seen = Neighbours(units, len(trace.layers), seed=seed)
    used = _Slots(len(trace.layers))
    fold(trace, seen, used, progress=progress)
    if not seen.pairs.any():
        raise UsageError("no prompt has two tokens, so no token has a neighbour; give longer text")
    members = [np.ones(len(units), dtype=bool)]
    members += [units.label == place for place in range(len(units.names))]
    members = [each for each in members if seen.pairs[each].any()]
    names = [
        ALL,
        *(name for place, name in enumerate(units.names) if seen.pairs[units.label == place].any()),
    ]
    k, width = used.mean(), trace.router_width
    random = _random(k, width)
    drawn = draws(units.label, seed=seed)
    asked = [
        _asked(seen, members, place, unit, random[place], drawn)
        for place, unit in enumerate(("share of pairs", "share of pairs", "experts per pair"))
    ]
    return Locality(
        definition=(
            "A pair is a token and the next one of its prompt. First: the expert with the highest "
            "weight is the same. Any: the chosen sets share an expert. Random: k experts drawn "
            f"evenly from {width}, k = {_listed(k)}; shuffled: the same tokens in random order "
            "within their prompts. Intervals: 95 %, prompts drawn anew within their label. "
            "Mixtral, arXiv 2401.04088, Table 5."
        ),
        layers=trace.layers,
        groups=tuple(names),
        pairs=np.array([int(seen.pairs[each].sum()) for each in members]),
        prompts=np.array([int(units.prompts[each].sum()) for each in members]),
        first=asked[0],
        any=asked[1],
        overlap=asked[2],
        seed=seed,
    )


class _Slots:
    """A `Fold`: experts chosen per token, by layer."""

    def __init__(self, layers: int) -> None:
        self.filled, self.tokens = np.zeros(layers), 0

    def add(self, routes: Routes) -> None:
        self.filled += (routes.expert_ids != NO_EXPERT).sum(axis=(1, 2))
        self.tokens += len(routes)

    def mean(self) -> NDArray[np.float64]:
        return self.filled / max(1, self.tokens)


def _random(k: NDArray[np.float64], width: int) -> NDArray[np.float64]:
    """[3, layers] expectations for k distinct experts drawn evenly; k is rounded for *any*."""
    whole = [min(width, round(float(each))) for each in k]
    any_shared = [1.0 - comb(width - each, each) / comb(width, each) for each in whole]
    return np.stack([np.full(len(k), 1.0 / width), np.array(any_shared), k**2 / width])


def _asked(
    seen: Neighbours,
    members: list[NDArray[np.bool_]],
    place: int,
    unit: str,
    random: NDArray[np.float64],
    drawn: NDArray[np.float64],
) -> Agreement:
    value, low, high, shuffled = (np.full((len(members), len(random)), np.nan) for _ in range(4))
    for row, each in enumerate(members):
        pairs = seen.pairs[each]
        value[row], shuffled[row] = seen.sums[:, place, each].sum(axis=1) / pairs.sum()
        if each.sum() > 1:
            sizes = np.maximum(drawn[:, each] @ pairs, 1)
            means = (drawn[:, each] @ seen.sums[0, place, each]) / sizes[:, None]
            low[row], high[row] = interval(means, units=int(each.sum()))
    return Agreement(unit, value, low, high, shuffled, random)


def _listed(k: NDArray[np.float64]) -> str:
    return ", ".join(sorted({f"{each:.3g}" for each in k}))
