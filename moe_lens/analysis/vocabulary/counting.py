"""How often each expert is chosen for each token id, counted over a whole trace."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from moe_lens.analysis.passes import fold, successors
from moe_lens.analysis.resampling import draws, interval
from moe_lens.analysis.units import Units
from moe_lens.errors import UsageError
from moe_lens.kernels import NO_EXPERT
from moe_lens.telling import Progress
from moe_lens.trace import Routes, TokenTexts, Trace

__all__ = ["IDS", "IdCounts", "count_ids"]

IDS = {
    "input": "the token that is read",
    "next": "the token that follows in the text",
    "predicted": "the token that the model finds likeliest to follow",
}
"""What x can be in N(x, expert) / N(x)."""


@dataclass(frozen=True, eq=False)
class IdCounts:
    """Counts by token id. Memory grows with the ids that occur and the experts, not with tokens.

    Attributes:
        layers: Model layer index of each MoE layer.
        router_width: R.
        kind: Key of `IDS`.
        slots: How many choices of a token count, the best first.
        token_ids: [ids] int64, those that occur, ascending.
        occurrences: [ids] int64, N(x).
        chosen: For each layer [ids, R] int64 sparse, N(x, expert).
        loads: [layers, R] float64, share of all counted tokens that each expert got.
        texts: Texts of token ids.
    """

    layers: tuple[int, ...]
    router_width: int
    kind: str
    slots: int
    token_ids: NDArray[np.int64]
    occurrences: NDArray[np.int64]
    chosen: tuple[sparse.csr_array, ...]
    loads: NDArray[np.float64]
    texts: TokenTexts = field(repr=False)
    _trace: Trace = field(repr=False)
    _predicted: NDArray[np.int32] | None = field(repr=False)

    @property
    def tokens(self) -> int:
        """Tokens counted."""
        return int(self.occurrences.sum())

    def most_chosen(self, place: int) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """In one layer, for each id the expert that gets most of it, and its share; [ids] each."""
        table = self.chosen[place]
        best = np.asarray(table.argmax(axis=1)).ravel().astype(np.int64)
        most = np.asarray(table.max(axis=1).todense()).ravel()
        return best, most / self.occurrences

    def influence(self, groups: NDArray[np.bool_]) -> NDArray[np.float64]:
        """How much each unit of prompts moves the mean over ids of the largest share.

        With s(x) the largest share and e(x) its expert, a token of id x moves s(x), to first order,
        by (1 - s(x)) / N(x) if e(x) is among its choices, by -s(x) / N(x) else. One more reading
        of the trace.

        Args:
            groups: [groups, ids] which ids each mean is over.

        Returns:
            [units, groups, layers] float64.
        """
        units = Units.of(self._trace)
        seen = _Influence(self, units, groups)
        fold(self._trace, seen)
        return seen.sums

    def intervals(
        self, groups: NDArray[np.bool_], value: NDArray[np.float64], seed: int
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """[groups, layers] ends of the 95 % interval of the means `value` of `influence`.

        Prompts are drawn anew, each with what it moves. (To draw anew and take the largest share
        again would be biased upwards: the largest of noisier shares is larger.)
        """
        moved = self.influence(groups)
        label = Units.of(self._trace).label
        drawn = draws(label, seed=seed) - 1.0
        shifts = (drawn @ moved.reshape(len(label), -1)).reshape(len(drawn), *value.shape)
        return interval(value + shifts)


def count_ids(
    trace: Trace,
    *,
    kind: str = "input",
    slots: int = 1,
    predicted: NDArray[np.int32] | None = None,
    progress: Progress | None = None,
) -> IdCounts:
    """Count, in one reading of the trace.

    Args:
        trace: A recorded run.
        kind: Which token id is x: ``input``, ``next`` or ``predicted``.
        slots: How many choices of each token count: 1 for the first.
        predicted: [tokens] of the trace, for ``predicted``; `moe_lens.recording` has
            `record_predictions` for them.
        progress: Called with tokens read and tokens in all.

    Raises:
        UsageError: An option is out of range, or no token has such an id.
        CaptureError: The trace has no tokens.
    """
    _check(trace, kind, slots, predicted)
    seen = _Counting(trace, kind, slots, predicted)
    fold(trace, seen, progress=progress)
    if not seen.occurrences.any():
        raise UsageError("no prompt has two tokens, so no token has a next one; give longer text")
    kept = np.flatnonzero(seen.occurrences)
    occurrences = seen.occurrences[kept]
    chosen = tuple(table[kept] for table in seen.tables())
    loads = np.stack([np.asarray(table.sum(axis=0)).ravel() for table in chosen])
    return IdCounts(
        layers=trace.layers,
        router_width=trace.router_width,
        kind=kind,
        slots=slots,
        token_ids=kept,
        occurrences=occurrences,
        chosen=chosen,
        loads=loads / occurrences.sum(),
        texts=trace.texts,
        _trace=trace,
        _predicted=predicted,
    )


def _check(trace: Trace, kind: str, slots: int, predicted: NDArray[np.int32] | None) -> None:
    if kind not in IDS:
        raise UsageError(f"there are no {kind!r} token ids; choose from {', '.join(IDS)}")
    if not 1 <= slots <= trace.slots:
        raise UsageError(
            f"tokens of this run choose {trace.slots} experts, so {slots} of their choices cannot "
            f"be counted; give 1 to {trace.slots}"
        )
    if kind != "predicted":
        return
    if predicted is None:
        raise UsageError(
            "a recorded run does not hold what the model predicts; give the model itself instead "
            "of the run, or look at the ids of the text (input or next)"
        )
    if len(predicted) != trace.num_tokens:
        raise UsageError(
            f"there are {len(predicted)} predictions for {trace.num_tokens} tokens; they must be "
            "those of the same prompts"
        )


class _Ids:
    """The id x of each row of a trace, shard after shard."""

    def __init__(self, kind: str, predicted: NDArray[np.int32] | None) -> None:
        self._kind, self._predicted, self._start = kind, predicted, 0

    def of(self, routes: Routes) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Rows that have an id, and the ids."""
        rows = np.arange(len(routes))
        start, self._start = self._start, self._start + len(routes)
        if self._kind == "input":
            return rows, routes.token_ids.astype(np.int64)
        if self._kind == "next":
            rows = successors(routes)
            return rows, routes.token_ids[rows + 1].astype(np.int64)
        assert self._predicted is not None
        return rows, self._predicted[start : self._start].astype(np.int64)


class _Counting:
    """A `Fold`: the sparse tables of `IdCounts`, rows by token id."""

    def __init__(
        self, trace: Trace, kind: str, slots: int, predicted: NDArray[np.int32] | None
    ) -> None:
        self._ids, self._slots, self._width = _Ids(kind, predicted), slots, trace.router_width
        known = [*trace.texts.pieces, *trace.texts.special]
        highest = max(known, default=0)
        if predicted is not None:
            highest = max(highest, int(predicted.max(initial=0)))
        self.occurrences = np.zeros(highest + 1, dtype=np.int64)
        self._held: list[sparse.csr_array | None] = [None] * len(trace.layers)

    def tables(self) -> list[sparse.csr_array]:
        """By layer."""
        return [table for table in self._held if table is not None]

    def add(self, routes: Routes) -> None:
        rows, ids = self._ids.of(routes)
        highest = int(ids.max(initial=0))
        if highest >= len(self.occurrences):
            self._grow(highest + 1)
        self.occurrences += np.bincount(ids, minlength=len(self.occurrences))
        shape = (len(self.occurrences), self._width)
        for place, layer in enumerate(routes.expert_ids):
            chosen = layer[rows, : self._slots]
            filled = chosen != NO_EXPERT
            row = np.broadcast_to(ids[:, None], chosen.shape)[filled]
            column = chosen[filled].astype(np.int64)
            ones = np.ones(len(row), dtype=np.int64)
            part = sparse.coo_array((ones, (row, column)), shape=shape).tocsr()
            held = self._held[place]
            self._held[place] = part if held is None else held + part

    def _grow(self, size: int) -> None:
        self.occurrences = np.pad(self.occurrences, (0, size - len(self.occurrences)))
        for table in self._held:
            if table is not None:
                table.resize((size, self._width))


class _Influence:
    """A `Fold`: see `IdCounts.influence`."""

    def __init__(self, counts: IdCounts, units: Units, groups: NDArray[np.bool_]) -> None:
        self._ids, self._units = _Ids(counts.kind, counts._predicted), units
        self._counts, self._slots = counts, counts.slots
        best = [counts.most_chosen(place) for place in range(len(counts.layers))]
        self._best = [each for each, _ in best]
        self._share = [share for _, share in best]
        sizes = np.maximum(groups.sum(axis=1), 1)
        # [groups, ids] what one token of the id counts for in the mean over ids.
        self._weight = groups / (sizes[:, None] * counts.occurrences[None])
        self.sums = np.zeros((len(units), len(groups), len(counts.layers)))

    def add(self, routes: Routes) -> None:
        rows, ids = self._ids.of(routes)
        place_of = np.searchsorted(self._counts.token_ids, ids)
        unit = self._units.of_rows(routes)[rows]
        for place, layer in enumerate(routes.expert_ids):
            best, share = self._best[place][place_of], self._share[place][place_of]
            hit = (layer[rows, : self._slots] == best[:, None]).any(axis=1)
            moved = hit - share
            for group, weight in enumerate(self._weight):
                values = moved * weight[place_of]
                self.sums[:, group, place] += np.bincount(unit, values, len(self._units))
