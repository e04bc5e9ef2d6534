"""First reading of a trace: how often the experts of successive MoE layers follow each other.

All tables are by pair of successive MoE layers, so nothing here grows with tokens:

* by rank: the expert in slot r of a layer and the one in slot r of the next. Rank 0 is the plain
  case, first choice to first choice, where every token takes exactly one step;
* of any choice: each of the k x k pairs of chosen experts, as ``Profile.transitions``;
* the same pairs of any choice for some groups of prompts apart, to choose chains from;
* first choices where the next layer's are shuffled over the tokens of a prompt: what remains is
  what the prompt as a whole explains.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from moe_lens import kernels
from moe_lens.analysis.units import Units
from moe_lens.trace import Routes

__all__ = ["MOST_RANKS", "SHUFFLES", "StepCounts", "pair_table", "token_bucket"]

MOST_RANKS = 8
"""Ranks that are counted apart."""

SHUFFLES = 2
"""Times that the next layer's choices are shuffled within prompts."""


def pair_table(one: NDArray, two: NDArray, width: int) -> NDArray[np.int64]:
    """[width, width] how often each id of `one` stands beside each of `two`; others count nowhere.

    Args:
        one: [tokens] expert ids, rows of the table.
        two: [tokens] expert ids, columns.
        width: Number of experts; higher ids, such as those of empty slots, are left out.
    """
    side = width + 1
    index = np.minimum(one, width, dtype=np.intp) * side + np.minimum(two, width, dtype=np.intp)
    table = np.bincount(index, minlength=side * side).reshape(side, side)
    return table[:width, :width].astype(np.int64, copy=False)


class StepCounts:
    """A `Fold`: steps from each MoE layer to the next.

    Args:
        units: The units.
        layers: Number of MoE layers.
        width: R, the experts a router can choose from.
        slots: k.
        group: [units] int64, a group that is also counted apart; -1: none.
        groups: Number of groups.
        seed: Of the shuffling.

    Attributes:
        ranks: [ranks, layers - 1, R, R] int64, slot r to slot r.
        any: [layers - 1, R, R] int64, any chosen expert to any chosen expert.
        of_group: [groups, layers - 1, R, R] int32, `any` of each group.
        shuffled: [SHUFFLES, layers - 1, R, R] int64, first choices, the next layer shuffled.
    """

    def __init__(
        self,
        units: Units,
        layers: int,
        width: int,
        slots: int,
        group: NDArray[np.int64],
        groups: int,
        seed: int = 0,
    ) -> None:
        shape = (layers - 1, width, width)
        self.units, self.width, self.group = units, width, group
        self.ranks = np.zeros((min(slots, MOST_RANKS), *shape), dtype=np.int64)
        self.any = np.zeros(shape, dtype=np.int64)
        self.of_group = np.zeros((groups, *shape), dtype=np.int32)
        self.shuffled = np.zeros((SHUFFLES, *shape), dtype=np.int64)
        self._random = np.random.default_rng(seed)

    def add(self, routes: Routes) -> None:
        group = self.group[self.units.of_rows(routes)]
        for place in np.unique(group):
            rows = np.flatnonzero(group == place)
            table = kernels.transitions(routes.expert_ids[:, rows], self.width)
            self.any += table
            if place >= 0:
                self.of_group[place] += table.astype(np.int32)
        for rank in range(len(self.ranks)):
            chosen = routes.expert_ids[:, :, rank]
            for layer in range(len(chosen) - 1):
                self.ranks[rank, layer] += pair_table(chosen[layer], chosen[layer + 1], self.width)
        first = routes.expert_ids[:, :, 0]
        for table in self.shuffled:
            # A stable sort by prompt of a random order shuffles within each prompt.
            order = self._random.permutation(len(routes))
            order = order[np.argsort(routes.prompt[order], kind="stable")]
            for layer in range(len(first) - 1):
                table[layer] += pair_table(first[layer], first[layer + 1][order], self.width)


def token_bucket(token_ids: NDArray[np.int32], buckets: int) -> NDArray[np.intp]:
    """[tokens] a bucket for each token id: itself if it is small enough, else by a fixed hash.

    The hash multiplies by 2^32 / golden ratio (Knuth, The Art of Computer Programming, 6.4), so
    ids that follow each other fall far apart.
    """
    mixed = (token_ids.astype(np.uint64) * np.uint64(2654435769)) % np.uint64(2**32)
    scattered = (mixed * np.uint64(buckets)) >> np.uint64(32)
    return np.where(token_ids < buckets, token_ids, scattered).astype(np.intp)
