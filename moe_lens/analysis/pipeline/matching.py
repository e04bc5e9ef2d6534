"""Which expert of the next MoE layer does the work of one: matching by what they specialise in.

The profile of an expert is the distribution of what it is chosen for: over labels, each label with
the same weight, p(D | e) = rate(D, e) / sum over D of rate(D, e); without labels, over token ids
(or, where there are more, buckets of them) of the tokens whose first choice it is. Then:

* similarity of two experts: Bhattacharyya's, sum over x of sqrt(p(x | e) p(x | f)): 1 for the same
  profile, 0 for profiles with nothing in common;
* the matching of a layer with the next: one to one, of largest total similarity (Kuhn 1955;
  `scipy.optimize.linear_sum_assignment`); its score is the mean similarity of matched experts;
* null: each expert of the next layer keeps how specialised it is, but for what is dealt anew
  (labels: any; token ids: among those about as frequent), each label or id keeping its weight in
  the layer as a whole (iterative proportional fitting), and it is matched again. Corrected score =
  (score - null) / (1 - null); p from the null's mean and deviation, by Student's t as for one more
  draw of a normal variable;
* flow: share of the tokens whose first choices follow the matching, against what the loads of both
  layers make of the same matching, and against the one-to-one matching with the largest flow.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats
from scipy.optimize import linear_sum_assignment

from moe_lens.analysis.resampling import draws, false_discovery, interval
from moe_lens.analysis.units import Units
from moe_lens.trace import Routes

from .counting import token_bucket

__all__ = ["Matched", "MatchedFlow", "Matching", "dealt_anew", "match_layers", "matching"]

ROUNDS = 20
"""Times that profiles are dealt anew."""

ALIKE = 8
"""Token ids next to each other in frequency that are dealt among themselves."""

FITS = 5
"""Rounds of fitting: the sums are off by little then."""

DRAWS = 200
"""Draws of an interval: each is a table of labels by experts."""


@dataclass(frozen=True, eq=False)
class Matching:
    """Each MoE layer matched with the next.

    Attributes:
        by: What profiles are over: ``"labels"`` or ``"token ids"``.
        match: [layers - 1, R] int64, the expert of the next MoE layer; -1: without a match, such
            as one that is hardly used.
        similarity: [layers - 1, R] float64, of the matched; NaN without a match.
        score: [layers - 1] float64, mean similarity of the matched.
        low: [layers - 1] float64, lower end of the 95 % interval of the score over prompts, for
            the same matching; NaN for one unit.
        high: [layers - 1] float64, upper end.
        null: [layers - 1] float64, mean score where profiles are dealt anew.
        null_deviation: [layers - 1] float64, their standard deviation.
        corrected: [layers - 1] float64, (score - null) / (1 - null).
        p: [layers - 1] float64, one-sided; NaN where nothing can be matched.
        q: [layers - 1] float64.
        flow: [layers - 1] float64, share of tokens whose first choices follow the matching.
        flow_low: [layers - 1] float64, lower end of its interval.
        flow_high: [layers - 1] float64, upper end.
        flow_random: [layers - 1] float64, the share that the loads alone would give.
        flow_best: [layers - 1] float64, the largest share of any one-to-one matching.
    """

    by: str
    match: NDArray[np.int64]
    similarity: NDArray[np.float64]
    score: NDArray[np.float64]
    low: NDArray[np.float64]
    high: NDArray[np.float64]
    null: NDArray[np.float64]
    null_deviation: NDArray[np.float64]
    corrected: NDArray[np.float64]
    p: NDArray[np.float64]
    q: NDArray[np.float64]
    flow: NDArray[np.float64]
    flow_low: NDArray[np.float64]
    flow_high: NDArray[np.float64]
    flow_random: NDArray[np.float64]
    flow_best: NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Matched:
    """The matching before it is measured.

    Attributes:
        match: [layers - 1, R] int64, as in `Matching`.
        similarity: [layers - 1, R] float64.
        null: [layers - 1, ROUNDS] float64, scores of profiles dealt anew.
    """

    match: NDArray[np.int64]
    similarity: NDArray[np.float64]
    null: NDArray[np.float64]


class TokenProfiles:
    """A `Fold`: tokens in each bucket of ids whose first choice each expert was.

    Attributes:
        counts: [layers, R, BUCKETS] int64.
    """

    BUCKETS = 512

    def __init__(self, layers: int, width: int) -> None:
        self.width = width
        self.counts = np.zeros((layers, width, self.BUCKETS), dtype=np.int64)

    def add(self, routes: Routes) -> None:
        bucket = token_bucket(routes.token_ids, self.BUCKETS)
        for layer, ids in enumerate(routes.expert_ids[:, :, 0]):
            index = np.minimum(ids, self.width, dtype=np.intp) * self.BUCKETS + bucket
            table = np.bincount(index, minlength=(self.width + 1) * self.BUCKETS)
            self.counts[layer] += table.reshape(-1, self.BUCKETS)[: self.width]


def match_layers(
    choices: NDArray[np.float64], used: NDArray[np.bool_], *, seed: int = 0
) -> Matched:
    """Match each layer with the next.

    Args:
        choices: [layers, R, kinds] float64, how much of each label or token id each expert takes.
        used: [layers, R] bool, experts with enough tokens to be matched.
        seed: Of the null.
    """
    layers, width, _ = choices.shape
    match = np.full((layers - 1, width), -1, dtype=np.int64)
    similarity = np.full((layers - 1, width), np.nan)
    null = np.full((layers - 1, ROUNDS), np.nan)
    random = np.random.default_rng(seed)
    for place in range(layers - 1):
        here, there = np.flatnonzero(used[place]), np.flatnonzero(used[place + 1])
        if not (len(here) and len(there)):
            continue
        one, two = _roots(choices[place, here]), choices[place + 1, there]
        table = one @ _roots(two).T
        rows, columns = linear_sum_assignment(table, maximize=True)
        match[place, here[rows]] = there[columns]
        similarity[place, here[rows]] = table[rows, columns]
        for turn in range(ROUNDS):
            dealt = one @ _roots(dealt_anew(two, random)).T
            null[place, turn] = dealt[linear_sum_assignment(dealt, maximize=True)].mean()
    return Matched(match, similarity, null)


def _roots(choices: NDArray[np.float64]) -> NDArray[np.float64]:
    """The roots of profiles: rows that add up to 1 before."""
    return np.sqrt(choices / np.maximum(choices.sum(axis=1, keepdims=True), 1e-30))


def dealt_anew(choices: NDArray[np.float64], random: np.random.Generator) -> NDArray[np.float64]:
    """Each row's preferences exchanged between columns, with the sums of rows and columns kept.

    A preference is a cell over what the sums of its row and column make of it. Columns are
    exchanged with any if they are few, else with those about as frequent.
    """
    rows, columns = choices.sum(axis=1), choices.sum(axis=0)
    order = np.argsort(-columns, kind="stable")[: int((columns > 0).sum())]
    kinds = len(order)
    even = np.outer(rows, columns[order]) / columns.sum()
    liking = np.divide(choices[:, order], even, out=np.zeros_like(even), where=even > 0)
    group = np.zeros(kinds) if kinds <= 2 * ALIKE else np.arange(kinds) * (kinds // ALIKE) // kinds
    keys = group + random.random(even.shape)
    dealt = np.zeros_like(choices)
    dealt[:, order] = np.take_along_axis(liking, np.argsort(keys, axis=1), axis=1) * even
    for _ in range(FITS):
        dealt *= columns / np.maximum(dealt.sum(axis=0), 1e-30)
        dealt *= (rows / np.maximum(dealt.sum(axis=1), 1e-30))[:, None]
    return dealt


class MatchedFlow:
    """A `Fold` of the second reading: tokens whose first choices follow the matching, by unit.

    Args:
        units: The units.
        match: [layers - 1, R] int64, as in `Matching`.
        influence: [2, layers - 1, R, BUCKETS] float64, what a token adds to the score as one of
            the layer and as one of the next (see `token_influence`), or ``None``.

    Attributes:
        counts: [units, layers - 1] int64.
        influences: [units, layers - 1] float64.
    """

    def __init__(
        self,
        units: Units,
        match: NDArray[np.int64],
        influence: NDArray[np.float64] | None = None,
    ) -> None:
        self.units, self.match, self.influence = units, match, influence
        self.counts = np.zeros((len(units), len(match)), dtype=np.int64)
        self.influences = np.zeros((len(units), len(match)))

    def add(self, routes: Routes) -> None:
        unit, width = self.units.of_rows(routes), self.match.shape[1]
        first = np.minimum(routes.expert_ids[:, :, 0], width, dtype=np.intp)
        for layer, match in enumerate(self.match):
            followed = np.append(match, -1)[first[layer]] == first[layer + 1]
            self.counts[:, layer] += np.bincount(unit[followed], minlength=len(self.units))
        if self.influence is None:
            return
        bucket = token_bucket(routes.token_ids, self.influence.shape[-1])
        for side, tables in enumerate(self.influence):
            for layer, table in enumerate(tables):
                chosen = first[layer + side]
                filled = chosen < width
                each = table[chosen[filled], bucket[filled]]
                self.influences[:, layer] += np.bincount(unit[filled], each, len(self.units))


def token_influence(counts: NDArray[np.int64], match: NDArray[np.int64]) -> NDArray[np.float64]:
    """[2, layers - 1, R, BUCKETS] the change of a score by one token more, to first order.

    With p = c / n of an expert and q of its match, the similarity s changes with c(x) by
    (sqrt(q(x) / p(x)) - s) / (2 n).
    """
    layers, width, buckets = counts.shape
    found = np.zeros((2, layers - 1, width, buckets))
    totals = np.maximum(counts.sum(axis=2), 1)
    for place in range(layers - 1):
        rows = np.flatnonzero(match[place] >= 0)
        places = ((place, rows), (place + 1, match[place, rows]))
        one, two = (counts[where] / totals[where][:, None] for where in places)
        same = np.sqrt(one * two).sum(axis=1, keepdims=True)
        for side, (p, q) in enumerate(((one, two), (two, one))):
            ratio = np.sqrt(np.divide(q, p, out=np.zeros_like(p), where=p > 0))
            each = totals[places[side]][:, None] * (2 * len(rows))
            found[side, place, places[side][1]] = (ratio - same) / each
    return found


def matching(
    matched: Matched,
    seen: MatchedFlow,
    first: NDArray[np.int64],
    counts: NDArray[np.int64] | None,
    *,
    seed: int = 0,
) -> Matching:
    """Put together what the readings counted.

    Args:
        matched: The matching.
        seen: Its flow by unit.
        first: [layers - 1, R, R] steps of first choices.
        counts: [units, layers, R] choices by unit, where profiles are over labels; else ``None``.
        seed: Of the draws.
    """
    units, match = seen.units, matched.match
    some = (match >= 0).any(axis=1)
    score = np.full(len(match), np.nan)
    score[some] = np.nanmean(matched.similarity[some], axis=1)
    low, high, flow_low, flow_high = (np.full(len(match), np.nan) for _ in range(4))
    if len(units) > 1:
        drawn = draws(units.label, seed=seed)
        if counts is None:
            low, high = interval(score + (drawn - 1) @ seen.influences, units=len(units))
        else:
            low, high = interval(_redrawn(units, counts, match, drawn[:DRAWS]), units=len(units))
        shares = drawn @ seen.counts / (drawn @ units.tokens)[:, None]
        flow_low, flow_high = interval(shares, units=len(units))
    null, deviation = matched.null.mean(axis=1), matched.null.std(axis=1, ddof=1)
    error = deviation * np.sqrt(1 + 1 / ROUNDS)
    above = np.divide(score - null, error, out=np.zeros_like(score), where=error > 1e-12)
    p = np.where(some, stats.t.sf(above, ROUNDS - 1), np.nan)
    rest = 1 - null
    random, best = _other_flows(first, match)
    return Matching(
        by="labels" if counts is not None else "token ids",
        match=match,
        similarity=matched.similarity,
        score=score,
        low=low,
        high=high,
        null=null,
        null_deviation=deviation,
        corrected=np.divide(score - null, rest, out=np.full(len(rest), np.nan), where=rest > 1e-9),
        p=p,
        q=false_discovery(p),
        flow=seen.counts.sum(axis=0) / units.tokens.sum(),
        flow_low=flow_low,
        flow_high=flow_high,
        flow_random=random,
        flow_best=best,
    )


def _redrawn(
    units: Units, counts: NDArray[np.int64], match: NDArray[np.int64], drawn: NDArray[np.float64]
) -> NDArray[np.float64]:
    """[draws, layers - 1] the score of the same matching, of prompts drawn anew."""
    one_hot = units.label[None] == np.arange(len(units.names))[:, None]
    drawn = drawn[:, units.label >= 0]
    counts, one_hot = counts[units.label >= 0].astype(float), one_hot[:, units.label >= 0]
    tokens = units.tokens[units.label >= 0]
    scores = np.empty((len(drawn), len(match)))
    before = after = np.empty(0)
    for layer in range(counts.shape[1]):
        before, after = (
            after,
            np.stack(
                [
                    (drawn[:, row] @ counts[row, layer])
                    / np.maximum(drawn[:, row] @ tokens[row], 1)[:, None]
                    for row in one_hot
                ],
                axis=2,
            ),
        )  # [draws, R, labels]
        after /= np.maximum(after.sum(axis=2, keepdims=True), 1e-30)
        if layer:
            rows = np.flatnonzero(match[layer - 1] >= 0)
            same = np.sqrt(before[:, rows] * after[:, match[layer - 1, rows]]).sum(axis=2)
            scores[:, layer - 1] = same.mean(axis=1) if len(rows) else np.nan
    return scores


def _other_flows(
    first: NDArray[np.int64], match: NDArray[np.int64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    random, best = np.zeros(len(match)), np.zeros(len(match))
    for place, table in enumerate(first):
        total = max(1, int(table.sum()))
        rows = np.flatnonzero(match[place] >= 0)
        leaving, arriving = table.sum(axis=1) / total, table.sum(axis=0) / total
        random[place] = (leaving[rows] * arriving[match[place, rows]]).sum()
        best[place] = table[linear_sum_assignment(table, maximize=True)].sum() / total
    return random, best
