"""Pairs of experts counted in one pass, with what says how sure their lift is.

Tokens of a prompt are alike, so what varies is counted by run: some successive prompts of about
equally many tokens. Of each run only products are kept, added up over the runs, so memory does not
grow with them.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moe_lens import kernels
from moe_lens.trace import Routes, Trace

__all__ = ["PairCounts", "RunProducts"]

_MOST_RUNS, _FEWEST_RUNS = 512, 64
_CELLS = 2**26
"""Cells of tables that are multiplied at most, over all runs: about a second."""


@dataclass(eq=False)
class RunProducts:
    """Sums over runs of products of what each run counted; float64.

    With T_ij the tokens of a run that chose both, c_i those that chose i, and n all of them:

    Attributes:
        both_both: [layers, R, R] sum of T_ij^2.
        both_one: [layers, R, R] sum of T_ij c_i.
        both_all: [layers, R, R] sum of T_ij n.
        one_other: [layers, R, R] sum of c_i c_j.
        one_all: [layers, R] sum of c_i n.
        all_all: Sum of n^2.
    """

    both_both: NDArray[np.float64]
    both_one: NDArray[np.float64]
    both_all: NDArray[np.float64]
    one_other: NDArray[np.float64]
    one_all: NDArray[np.float64]
    all_all: float = 0.0

    @classmethod
    def empty(cls, layers: int, width: int) -> RunProducts:
        both, one, everything, other = (np.zeros((layers, width, width)) for _ in range(4))
        return cls(both, one, everything, other, np.zeros((layers, width)))

    def add(self, together: NDArray[np.int64], tokens: int) -> None:
        """Take the [layers, R, R] counts of one run."""
        both = together.astype(np.float64)
        one = np.diagonal(both, axis1=1, axis2=2).copy()
        self.both_both += both * both
        self.both_one += both * one[:, :, None]
        self.both_all += both * tokens
        self.one_other += one[:, :, None] * one[:, None, :]
        self.one_all += one * tokens
        self.all_all += float(tokens) ** 2


class PairCounts:
    """A `Fold`: tokens that chose both of two experts.

    Args:
        trace: What will be read; its prompts are dealt into runs.
        adjacent_ranks: Also count only pairs whose ranks in a token are next to each other.

    Attributes:
        tokens: Tokens counted.
        runs: Runs of prompts that the corpus has.
        together: [layers, R, R] int64, symmetric; the diagonal is how often each was chosen.
        adjacent: [layers, R, R] int64 of pairs in slots r and r + 1, diagonal 0; None if not asked.
        products: Of the runs that are complete; all of them after `finish`.
    """

    def __init__(self, trace: Trace, *, adjacent_ranks: bool = False) -> None:
        layers, width = len(trace.layers), trace.router_width
        self.tokens = 0
        self.together = np.zeros((layers, width, width), dtype=np.int64)
        self.adjacent = np.zeros_like(self.together) if adjacent_ranks else None
        self.products = RunProducts.empty(layers, width)
        self._run, self.runs = _runs(trace.prompt_tokens, layers * width**2)
        self._begun = np.zeros_like(self.together)
        self._begun_tokens = 0
        self._number = 0

    def add(self, routes: Routes) -> None:
        run = self._run[routes.prompt]
        edges = np.flatnonzero(np.diff(run)) + 1
        for start, stop in zip([0, *edges], [*edges, len(run)], strict=True):
            if start == stop:
                continue
            if run[start] != self._number:
                self.finish()
                self._number = int(run[start])
            self._begun += kernels.coactivation(routes.expert_ids[:, start:stop], self._width)
            self._begun_tokens += int(stop - start)
        if self.adjacent is not None:
            self.adjacent += _adjacent(routes)

    def finish(self) -> None:
        """Count the run that has begun as complete."""
        if self._begun_tokens:
            self.together += self._begun
            self.tokens += self._begun_tokens
            self.products.add(self._begun, self._begun_tokens)
            self._begun[:] = 0
            self._begun_tokens = 0

    @property
    def _width(self) -> int:
        return self.together.shape[-1]


def _runs(prompt_tokens: NDArray[np.int64], cells: int) -> tuple[NDArray[np.int64], int]:
    """The run of each prompt, and how many there are; few where a table has many cells."""
    filled = prompt_tokens > 0
    most = int(np.clip(_CELLS // cells, _FEWEST_RUNS, _MOST_RUNS))
    if filled.sum() <= most:
        return np.maximum(np.cumsum(filled) - 1, 0), int(filled.sum())
    begins = np.cumsum(prompt_tokens) - prompt_tokens
    share = begins * most // max(1, int(prompt_tokens.sum()))
    kept, run = np.unique(share[filled], return_inverse=True)
    of_prompt = np.zeros(len(prompt_tokens), dtype=np.int64)
    of_prompt[filled] = run
    return of_prompt, len(kept)


def _adjacent(routes: Routes) -> NDArray[np.int64]:
    """[layers, R, R] tokens in which the two follow each other in rank."""
    ids, width = routes.expert_ids, routes.router_width
    table = np.zeros((len(ids), width, width), dtype=np.int64)
    for slot in range(routes.slots - 1):
        table += kernels.coactivation(ids[:, :, slot : slot + 2], width)
    every = np.arange(width)
    table[:, every, every] = 0
    return table
