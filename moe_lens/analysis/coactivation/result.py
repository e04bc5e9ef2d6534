"""What `coactivation` returns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from moe_lens.analysis.resampling import FALSE_SHARE
from moe_lens.analysis.result import Result
from moe_lens.analysis.table import Table
from moe_lens.trace import place_of

from .certainty import FEWEST_RUNS, reach
from .communities import Communities
from .ratio import ratio_of, without_diagonal
from .tables import group_table, layer_table, pair_table, said

__all__ = ["Coactivation", "Pair"]

Floats = NDArray[np.float64]

_LISTED = 1000
"""Pairs that JSON describes one by one."""


@dataclass(frozen=True)
class Pair:
    """Two experts of a layer.

    Attributes:
        layer: Model layer index.
        one: The one, with the smaller id.
        two: The other.
        tokens: Tokens that chose both.
        share_of_one: Of the tokens of `one`, those that chose `two`, too.
        share_of_two: Of the tokens of `two`, those that chose `one`, too.
        lift: Tokens over those expected by chance.
        low: Lower end of its 95 % interval; None without one.
        high: Upper end.
        q: Of "lift is 1", false discoveries controlled over all pairs; None where not tested.
    """

    layer: int
    one: int
    two: int
    tokens: int
    share_of_one: float
    share_of_two: float
    lift: float
    low: float | None
    high: float | None
    q: float | None


@dataclass(frozen=True, eq=False)
class Coactivation(Result):
    """What experts have to do with each other, layer by layer. R is the router width.

    Attributes:
        definition: What the numbers are.
        layers: Model layer index of each MoE layer.
        tokens: Tokens counted.
        runs: Runs of prompts that the intervals rest on; 0 of a profile, which keeps no pairs by
            prompt.
        k: [layers] float64, experts chosen per token.
        together: [layers, R, R] int64, tokens that chose both; the diagonal is how often each was
            chosen.
        adjacent: The same of pairs next to each other in rank, diagonal 0; None if not asked.
        chance: [layers, R, R] float64, share of tokens expected to choose both.
        error: [layers, R, R] float64, standard error of log lift; NaN without one.
        q: [layers, R, R] float64; NaN where not tested.
        order: [layers, R] int64, experts so that those chosen together stand side by side.
        groups: [layers] the communities.
        inseparable: [layers] sets of experts of which any two are chosen together by at least half
            of the tokens of either, and more than by chance.
        seed: Of the communities.
    """

    kind: ClassVar[str] = "coactivation"
    definition: str
    layers: tuple[int, ...]
    tokens: int
    runs: int
    k: Floats
    together: NDArray[np.int64]
    adjacent: NDArray[np.int64] | None
    chance: Floats
    error: Floats
    q: Floats
    order: NDArray[np.int64]
    groups: tuple[Communities, ...]
    inseparable: tuple[tuple[tuple[int, ...], ...], ...]
    seed: int

    @property
    def title(self) -> str:
        ranks = " in adjacent ranks" if self.adjacent is not None else ""
        return f"Experts chosen together{ranks}, {self.tokens:,} tokens"

    @property
    def counts(self) -> NDArray[np.int64]:
        """[layers, R] tokens that chose each expert."""
        return np.diagonal(self.together, axis1=1, axis2=2)

    @property
    def share(self) -> Floats:
        """[layers, R, R] N_ij / N_i, of adjacent ranks if those were asked for; diagonal NaN."""
        pairs = self.together if self.adjacent is None else self.adjacent
        return without_diagonal(ratio_of(pairs, self.counts[:, :, None]))

    @property
    def lift(self) -> Floats:
        """[layers, R, R] tokens that chose both over those expected; NaN where none is."""
        return without_diagonal(ratio_of(self.together, self.tokens * self.chance))

    @property
    def bound(self) -> tuple[Floats, Floats]:
        """[layers, R, R] ends of the 95 % interval of the lift."""
        factor = np.exp(self.error * reach(self.runs))
        return self.lift / factor, self.lift * factor

    @property
    def attracted(self) -> NDArray[np.bool_]:
        """[layers, R, R] whether a pair is chosen together more often than by chance."""
        return (self.q <= FALSE_SHARE) & (self.lift > 1)

    @property
    def repelled(self) -> NDArray[np.bool_]:
        """[layers, R, R] whether a pair is chosen together less often than by chance."""
        return (self.q <= FALSE_SHARE) & (self.lift < 1)

    @property
    def partner_share(self) -> Floats:
        """[layers, 2] mean over experts of the largest share, and of the largest by chance."""
        used = self.counts > 0
        chance = without_diagonal(self.chance * self.tokens / np.maximum(self.counts, 1)[..., None])
        best = [np.nan_to_num(each).max(axis=2) for each in (self.share, chance)]
        return np.stack([(each * used).sum(axis=1) / used.sum(axis=1) for each in best], axis=1)

    def strongest(self, most: int | None = None, layer: int | None = None) -> list[Pair]:
        """Pairs with the highest lift among those above chance; all pairs if nothing was tested.

        Args:
            most: How many; None for all.
            layer: Model layer index of the only layer wanted.

        Raises:
            UsageError: The layer has no routed experts.
        """
        wanted = self.attracted if self.tested else self.lift > 1
        places = self._pairs(wanted, layer)
        lift, tokens = self.lift[places], self.together[places]
        return self._described(places, np.lexsort((-tokens, -lift)), most)

    def weakest(self, most: int | None = None, layer: int | None = None) -> list[Pair]:
        """Pairs with the lowest lift among those below chance."""
        places = self._pairs(self.repelled, layer)
        expected = self.chance[places]
        return self._described(places, np.lexsort((-expected, self.lift[places])), most)

    @property
    def tested(self) -> bool:
        """Whether there are prompts enough to claim anything."""
        return self.runs >= FEWEST_RUNS

    def place(self, layer: int) -> int:
        """Row of a model layer.

        Raises:
            UsageError: That layer has no routed experts.
        """
        return place_of(self.layers, layer)

    def findings(self) -> list[str]:
        """The strongest pair, how many there are, the inseparable, the communities."""
        return said(self)

    def tables(self) -> list[Table]:
        """Layers, then the strongest pairs, then communities."""
        return [
            table
            for table in (layer_table(self), pair_table(self), group_table(self))
            if table.rows
        ]

    def to_dict(self) -> dict[str, Any]:
        """Whole tables of counts and lift; `pairs` are the strongest above chance.

        The share of two experts is their entry of `together` over that of the first with itself.
        """
        content = super().to_dict()
        for name in ("chance", "error", "q"):
            del content[name]
        content["lift"] = _short(self.lift)
        pairs = self.strongest(_LISTED) if self.tested else []
        content["pairs"] = [vars(pair) for pair in pairs]
        return content

    def _pairs(self, wanted: NDArray[np.bool_], layer: int | None) -> tuple[NDArray, ...]:
        if layer is not None:
            only = np.zeros(len(self.layers), dtype=bool)
            only[self.place(layer)] = True
            wanted = wanted & only[:, None, None]
        return np.nonzero(np.triu(wanted, 1))

    def _described(
        self, places: tuple[NDArray, ...], order: NDArray[np.int64], most: int | None
    ) -> list[Pair]:
        share = ratio_of(self.together, self.counts[:, :, None])
        lift, (low, high) = self.lift, self.bound
        return [
            Pair(
                layer=self.layers[row],
                one=one,
                two=two,
                tokens=int(self.together[row, one, two]),
                share_of_one=float(share[row, one, two]),
                share_of_two=float(share[row, two, one]),
                lift=float(lift[row, one, two]),
                low=_known(low[row, one, two]),
                high=_known(high[row, one, two]),
                q=_known(self.q[row, one, two]),
            )
            for row, one, two in np.stack(places, axis=1)[order[:most]].tolist()
        ]


def _known(value: float) -> float | None:
    return None if np.isnan(value) else float(value)


def _short(values: Floats) -> list[Any]:
    """Nested lists of four digits, NaN as None."""
    large = np.abs(np.nan_to_num(values))
    scale = 10.0 ** (3 - np.floor(np.log10(large, out=np.zeros_like(large), where=large > 0)))
    short = (np.round(values * scale) / scale).astype(object)
    short[np.isnan(values)] = None
    return list(short.tolist())
