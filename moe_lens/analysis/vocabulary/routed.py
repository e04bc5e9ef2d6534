"""By routing: which token ids each expert is chosen for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from moe_lens.analysis.result import Result
from moe_lens.analysis.table import Cell, Table

from .chance import expected_largest_share
from .counting import IDS, IdCounts

__all__ = ["FEWEST", "Means", "RoutedVocabulary", "routed_vocabulary"]

FEWEST = 10
"""Occurrences that an id needs to stand in the table of an expert, as in OLMoE's Table 8."""

_NO_ID = -1


@dataclass(frozen=True, eq=False)
class Means:
    """Largest share of an id, mean over ids, for each MoE layer.

    Attributes:
        ids: Ids the mean is over.
        value: [layers] float64.
        low: [layers] float64, lower end of the 95 % interval over prompts.
        high: [layers] float64, upper end.
        random: [layers] float64, the same if experts were chosen by their loads alone.
    """

    ids: int
    value: NDArray[np.float64]
    low: NDArray[np.float64]
    high: NDArray[np.float64]
    random: NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class RoutedVocabulary(Result):
    """Token ids and the experts they go to.

    Attributes:
        definition: What the numbers are.
        layers: Model layer index of each MoE layer.
        kind: Which token id: ``input``, ``next`` or ``predicted``.
        slots: Choices of a token that count.
        fewest: Occurrences an id needs for the tables of experts.
        tokens: Tokens counted.
        all_ids: Over all ids, the number of the paper.
        frequent: Over ids with at least `fewest` occurrences.
        share: [layers, R] float64, mean share that an expert gets of the frequent ids that choose
            it most; NaN where no id does.
        ids: [layers, R] int64, how many frequent ids choose the expert most.
        top: [layers, R, top] int64, frequent ids by the share that the expert gets of them; -1
            where there are no more.
        top_share: [layers, R, top] float64, those shares.
        top_count: [layers, R, top] int64, occurrences of those ids.
        texts: Token texts of the ids in `top`.
        seed: Of draws and intervals.
    """

    kind: ClassVar[str] = "vocabulary by routing"
    definition: str
    layers: tuple[int, ...]
    token_kind: str
    slots: int
    fewest: int
    tokens: int
    all_ids: Means
    frequent: Means
    share: NDArray[np.float64]
    ids: NDArray[np.int64]
    top: NDArray[np.int64]
    top_share: NDArray[np.float64]
    top_count: NDArray[np.int64]
    texts: dict[int, str]
    seed: int

    @property
    def title(self) -> str:
        return f"Vocabulary of experts by {self.token_kind} token, {self.tokens:,} tokens"

    def findings(self) -> list[str]:
        """The layer whose experts divide the vocabulary most, beyond chance."""
        means = self.frequent if self.frequent.ids else self.all_ids
        which = f"that occur {self.fewest} times or more" if self.frequent.ids else "that occur"
        above = means.value - means.random
        best = int(np.argmax(above))
        return [
            f"Layer {self.layers[best]} divides the vocabulary most: of the {means.ids:,} ids "
            f"{which}, the expert chosen most gets {100 * means.value[best]:.0f} % "
            f"(interval {100 * means.low[best]:.0f} to {100 * means.high[best]:.0f}), "
            f"{100 * means.random[best]:.0f} % by chance."
        ]

    def tables(self) -> list[Table]:
        """By layer, then the experts that own their ids most."""
        return [self.layer_table(), self.expert_table()]

    def layer_table(self) -> Table:
        """Means over ids, a row for each layer."""
        columns = [
            "layer",
            "all ids, %",
            "all by chance",
            "frequent ids, %",
            "frequent by chance",
            "low",
            "high",
        ]
        rows: list[tuple[Cell, ...]] = []
        for place, layer in enumerate(self.layers):
            values = [self.all_ids.value, self.all_ids.random]
            values += [getattr(self.frequent, name) for name in ("value", "random", "low", "high")]
            rows.append((layer, *(float(100 * each[place]) for each in values)))
        return Table(tuple(columns), tuple(rows), "Share of the most chosen expert, mean over ids")

    def expert_table(self, most: int = 16) -> Table:
        """The experts with the highest mean share of at least three ids."""
        score = np.where(self.ids >= min(3, int(self.ids.max(initial=0))), self.share, np.nan)
        order = np.argsort(-np.nan_to_num(score, nan=-1.0), axis=None, kind="stable")
        rows: list[tuple[Cell, ...]] = []
        for cell in order[:most]:
            place, expert = divmod(int(cell), self.share.shape[1])
            if np.isnan(score[place, expert]):
                break
            rows.append(
                (
                    f"{self.layers[place]}:{expert}",
                    int(self.ids[place, expert]),
                    float(100 * self.share[place, expert]),
                    self.top_texts(place, expert, 5),
                )
            )
        columns = ("expert", "ids", "mean share, %", "its tokens, % of their occurrences")
        return Table(columns, tuple(rows), "Experts with the firmest vocabulary")

    def top_texts(self, place: int, expert: int, most: int) -> str:
        """The ids of which the expert gets most, as ``text share`` of each."""
        shown = zip(
            self.top[place, expert, :most], self.top_share[place, expert, :most], strict=True
        )
        return "  ".join(
            f"{self.texts[int(each)]} {100 * share:.0f}" for each, share in shown if each != _NO_ID
        )


def routed_vocabulary(
    counts: IdCounts, *, fewest: int = FEWEST, top: int = 10, seed: int = 0
) -> RoutedVocabulary:
    """Which ids go where, and how far that is beyond chance. Reads the trace once more.

    Args:
        counts: What `count_ids` counted.
        fewest: Occurrences that an id needs to stand in the table of an expert.
        top: Ids kept for each expert.
        seed: Of draws and intervals.
    """
    frequent = counts.occurrences >= fewest
    groups = np.stack([np.ones(len(frequent), dtype=bool), frequent])
    best, shares = _most_chosen(counts)
    chance = expected_largest_share(counts.loads, counts.occurrences, slots=counts.slots, seed=seed)
    value, random = (_means(each, groups) for each in (shares, chance))
    low, high = counts.intervals(groups, value, seed)
    means = [
        Means(int(groups[row].sum()), value[row], low[row], high[row], random[row])
        for row in range(len(groups))
    ]
    share, ids = _by_expert(best[:, frequent], shares[:, frequent], counts.router_width)
    tables = [_top(counts, place, frequent, top) for place in range(len(counts.layers))]
    ids_shown, share_shown, count_shown = (np.stack(each) for each in zip(*tables, strict=True))
    return RoutedVocabulary(
        definition=_definition(counts, fewest),
        layers=counts.layers,
        token_kind=counts.kind,
        slots=counts.slots,
        fewest=fewest,
        tokens=counts.tokens,
        all_ids=means[0],
        frequent=means[1],
        share=share,
        ids=ids,
        top=ids_shown,
        top_share=share_shown,
        top_count=count_shown,
        texts={
            int(each): counts.texts.visible(int(each))
            for each in np.unique(ids_shown[ids_shown != _NO_ID])
        },
        seed=seed,
    )


def _definition(counts: IdCounts, fewest: int) -> str:
    choices = "first choice" if counts.slots == 1 else f"first {counts.slots} choices"
    return (
        f"Share: of the tokens with id x, those for which the expert is the {choices}; x is "
        f"{IDS[counts.kind]}. A layer's number is the mean over ids of the largest share (OLMoE, "
        "arXiv 2409.02060, Eq. 8). By chance: the same number of tokens dealt to experts by their "
        f"loads. Frequent ids occur {fewest} times or more. Intervals: 95 %, over prompts."
    )


def _most_chosen(counts: IdCounts) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    found = [counts.most_chosen(place) for place in range(len(counts.layers))]
    return np.stack([best for best, _ in found]), np.stack([share for _, share in found])


def _means(values: NDArray[np.float64], groups: NDArray[np.bool_]) -> NDArray[np.float64]:
    """[groups, layers] means of [layers, ids] over the ids of each group; NaN over none."""
    sizes = groups.sum(axis=1).astype(np.float64)
    with np.errstate(invalid="ignore"):
        found: NDArray[np.float64] = (groups @ values.T) / sizes[:, None]
    return found


def _by_expert(
    best: NDArray[np.int64], share: NDArray[np.float64], width: int
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """[layers, R] mean of `share` over the ids whose `best` is the expert, and their number."""
    ids = np.stack([np.bincount(row, minlength=width) for row in best])
    sums = np.stack(
        [np.bincount(row, each, minlength=width) for row, each in zip(best, share, strict=True)]
    )
    with np.errstate(invalid="ignore"):
        return sums / np.where(ids > 0, ids, np.nan), ids


def _top(
    counts: IdCounts, place: int, frequent: NDArray[np.bool_], top: int
) -> tuple[NDArray[np.int64], NDArray[np.float64], NDArray[np.int64]]:
    """[R, top] ids, shares and occurrences: highest share first, of equal ones the frequent."""
    width = counts.router_width
    ids = np.full((width, top), _NO_ID, dtype=np.int64)
    shares, occurrences = np.full((width, top), np.nan), np.zeros((width, top), dtype=np.int64)
    rows = np.flatnonzero(frequent)
    columns = counts.chosen[place][rows].tocsc()
    for expert in range(width):
        part = slice(columns.indptr[expert], columns.indptr[expert + 1])
        among = rows[columns.indices[part]]
        share = columns.data[part] / counts.occurrences[among]
        order = np.lexsort((-counts.occurrences[among], -share))[:top]
        found = len(order)
        ids[expert, :found] = counts.token_ids[among[order]]
        shares[expert, :found] = share[order]
        occurrences[expert, :found] = counts.occurrences[among[order]]
    return ids, shares, occurrences
