"""Experts compared by when they are chosen: together, for the same tokens, for the same labels."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.spatial.distance import pdist, squareform

from moe_lens.analysis.passes import fold
from moe_lens.profile import tally
from moe_lens.telling import Progress
from moe_lens.trace import Routes, Trace

from .measures import Floats, Measure

__all__ = ["LABELS", "TOGETHER", "TOKENS", "compare_routing"]

TOGETHER, TOKENS, LABELS = "chosen together", "same tokens", "same labels"

CELLS = 1024
"""Token ids that are counted by expert: the most frequent ones of a sample."""

_SAMPLE = 65_536


class Chosen:
    """A `Fold`: co-activation, and how often each expert is chosen for token ids and labels.

    Args:
        trace: Whose prompts will be added.
        cells: [highest token id + 1] int64, place of each token id that is counted; -1: it is not.

    Attributes:
        together: [layers, R, R] int64; the diagonal counts single experts.
        tokens: Tokens in all.
        by_token: [cells, layers, R] int64.
        by_label: [labels, layers, R] int64.
    """

    def __init__(self, trace: Trace, cells: NDArray[np.int64]) -> None:
        shape = len(trace.layers), trace.router_width
        names = {name: place for place, name in enumerate(trace.label_names)}
        self._label = np.array([-1 if each is None else names[each] for each in trace.labels])
        self._cells = cells
        self.tokens = 0
        self.together = np.zeros((*shape, shape[1]), dtype=np.int64)
        self.by_token = np.zeros((int(cells.max()) + 1, *shape), dtype=np.int64)
        self.by_label = np.zeros((len(names), *shape), dtype=np.int64)

    def add(self, routes: Routes) -> None:
        self.tokens += len(routes)
        self.together += tally.coactivation(routes)
        known = np.minimum(routes.token_ids, len(self._cells) - 1)
        cell = np.where(known == routes.token_ids, self._cells[known], -1)
        self.by_token += tally.group_counts(routes, cell, len(self.by_token))
        if len(self.by_label):
            label = self._label[routes.prompt]
            self.by_label += tally.group_counts(routes, label, len(self.by_label))


def compare_routing(
    trace: Trace, experts: Sequence[int], *, seed: int = 0, progress: Progress | None = None
) -> tuple[Measure, ...]:
    """What a trace says about the likeness of experts.

    * `TOGETHER`: phi coefficient of being chosen for the same token: the correlation of two
      yes-or-no variables over tokens. An expert takes a slot that another cannot have, so
      unrelated experts are a little below 0.
    * `TOKENS`: weighted Jaccard index (Ružička) of the token ids an expert is chosen for, as
      shares of its tokens: sum of minima / sum of maxima.
    * `LABELS`: 1 - Jensen-Shannon divergence in bits of the labels of the tokens it is chosen
      for; only of a corpus with two labels or more.

    Args:
        trace: A recorded run.
        experts: E of each MoE layer, without zero experts.
        seed: Of the sample that says which token ids are frequent.
        progress: Called with tokens read and tokens in all.

    Raises:
        CaptureError: The trace has no tokens.
    """
    seen = Chosen(trace, frequent_cells(trace, seed))
    fold(trace, seen, progress=progress)
    parts = [slice(0, each) for each in experts]
    found = [
        Measure.of(
            TOGETHER,
            "routing",
            "phi coefficient of being chosen for the same token",
            [
                phi(table[part, part], seen.tokens)
                for table, part in zip(seen.together, parts, strict=True)
            ],
        ),
        Measure.of(
            TOKENS,
            "routing",
            f"weighted Jaccard index of the token ids it is chosen for ({len(seen.by_token)} of "
            "them, the most frequent)",
            [jaccard(seen.by_token[:, place, part].T) for place, part in enumerate(parts)],
        ),
    ]
    if len(trace.label_names) > 1:
        alike = [likeness(seen.by_label[:, place, part].T) for place, part in enumerate(parts)]
        says = "1 - Jensen-Shannon divergence (bits) of the labels of the tokens it is chosen for"
        found.append(Measure.of(LABELS, "routing", says, alike))
    return tuple(found)


def frequent_cells(trace: Trace, seed: int = 0) -> NDArray[np.int64]:
    """[highest id + 1] place of each of the `CELLS` most frequent token ids; -1 for others.

    Counted on whole prompts drawn at random, until they have 65,536 tokens.
    """
    counts, read = np.zeros(1, dtype=np.int64), 0
    for prompt in np.random.default_rng(seed).permutation(trace.num_prompts):
        if read >= _SAMPLE:
            break
        part = np.bincount(trace.prompt(int(prompt)).token_ids)
        if len(part) > len(counts):
            counts = np.pad(counts, (0, len(part) - len(counts)))
        counts[: len(part)] += part
        read += int(part.sum())
    order = np.argsort(-counts, kind="stable")[:CELLS]
    order = order[counts[order] > 0]
    cells = np.full(len(counts), -1, dtype=np.int64)
    cells[order] = np.arange(len(order))
    return cells


def phi(together: NDArray[np.int64], tokens: int) -> Floats:
    """[E, E] correlation of being chosen; NaN for an expert chosen never or for every token."""
    single = np.diag(together).astype(np.float64)
    covariance = tokens * together.astype(np.float64) - single * single[:, None]
    spread = np.sqrt(single * (tokens - single))
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(np.outer(spread, spread) > 0, covariance / np.outer(spread, spread), np.nan)


def jaccard(counts: NDArray[np.int64]) -> Floats:
    """[E, E] of the rows [E, cells] as shares; NaN for a row of zeros."""
    shares = _shares(counts)
    apart = squareform(pdist(np.nan_to_num(shares), "cityblock"))
    # For shares sum min = 1 - d / 2 and sum max = 1 + d / 2, where d = sum |p - q|.
    return _where_known(shares, (2 - apart) / (2 + apart))


def likeness(counts: NDArray[np.int64]) -> Floats:
    """[E, E] 1 - Jensen-Shannon divergence, bits, of the rows [E, labels] as shares."""
    shares = _shares(counts)
    known = np.nan_to_num(shares, nan=1 / shares.shape[1])
    divergence = squareform(pdist(known, "jensenshannon")) ** 2 / np.log(2)
    return _where_known(shares, 1 - divergence)


def _shares(counts: NDArray[np.int64]) -> NDArray[np.float64]:
    with np.errstate(invalid="ignore"):
        return np.asarray(counts / counts.sum(axis=1, keepdims=True), np.float64)


def _where_known(shares: NDArray[np.float64], table: Floats) -> Floats:
    missing = np.isnan(shares).any(axis=1)
    table[missing], table[:, missing] = np.nan, np.nan
    return table
