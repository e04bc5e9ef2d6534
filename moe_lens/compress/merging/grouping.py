"""Groups of similar experts: complete linkage, so that no pair inside a group is below T.

Each layer gets a dendrogram (one for each router group, since experts of different router groups
are never merged). Cutting it at a threshold or at a number of groups only reads it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.cluster.hierarchy import linkage
from scipy.spatial.distance import squareform

from moe_lens.compress.statistics.similarity import Similarity

TOLERANCE = 1e-6
"""Similarities are means of float32 cosines: equal to within this, they reach a threshold."""

Group = tuple[int, ...]


@dataclass(frozen=True)
class Join:
    """Two groups that become one; `similarity` is that of its least similar pair."""

    similarity: float
    first: Group
    second: Group


@dataclass(frozen=True)
class Dendrogram:
    """The joins of one set of experts, most similar first, down to a single group."""

    experts: Group
    joins: tuple[Join, ...]

    def groups_at(self, threshold: float) -> int:
        """How many groups there are when everything that reaches `threshold` is merged."""
        reached = sum(join.similarity >= threshold - TOLERANCE for join in self.joins)
        return len(self.experts) - reached

    def cut(self, count: int) -> tuple[Group, ...]:
        """The `count` groups that the best joins leave, by smallest member."""
        groups: set[Group] = {(expert,) for expert in self.experts}
        for join in self.joins[: len(self.experts) - count]:
            groups -= {join.first, join.second}
            groups.add(tuple(sorted(join.first + join.second)))
        return tuple(sorted(groups))

    def threshold_for(self, count: int) -> float:
        """The largest threshold at which at most `count` groups are left."""
        return self.joins[len(self.experts) - count - 1].similarity


@dataclass(frozen=True)
class LayerTree:
    """The dendrograms of one layer, one for each router group."""

    layer: int
    parts: tuple[Dendrogram, ...]

    def groups_at(self, threshold: float) -> int:
        """Groups of the whole layer when every router group merges what reaches `threshold`."""
        return sum(part.groups_at(threshold) for part in self.parts)

    def cut(self, per_part: int) -> tuple[Group, ...]:
        """`per_part` groups from every router group, in the order of the router groups."""
        return tuple(group for part in self.parts for group in part.cut(per_part))


def dendrogram(similarity: np.ndarray, experts: Group) -> Dendrogram:
    """Complete linkage of `experts` on 1 - similarity.

    Args:
        similarity: [E, E] symmetric, between 0 and 1.
        experts: The ids to group; rows and columns of `similarity`.
    """
    groups: list[Group] = [(expert,) for expert in experts]
    joins = []
    for left, right, height, _ in complete_linkage(similarity, experts):
        first, second = sorted((groups[int(left)], groups[int(right)]))
        joins.append(Join(float(1.0 - height), first, second))
        groups.append(tuple(sorted(first + second)))
    return Dendrogram(experts, tuple(joins))


def complete_linkage(similarity: np.ndarray, experts: Group) -> np.ndarray:
    """[n - 1, 4] SciPy's linkage of n `experts` on 1 - similarity; arguments as `dendrogram`."""
    if len(experts) == 1:
        return np.empty((0, 4))
    distances = 1.0 - similarity[np.ix_(experts, experts)]
    np.fill_diagonal(distances, 0.0)
    tree: np.ndarray = linkage(squareform(distances, checks=False), method="complete")
    return tree


def layer_tree(similarity: Similarity, router_groups: Sequence[Group]) -> LayerTree:
    """The dendrograms of a layer, one for each group of neighbours that its router knows."""
    parts = tuple(dendrogram(similarity.total, group) for group in router_groups)
    return LayerTree(similarity.layer, parts)


def uniform_count(trees: Sequence[LayerTree], threshold: float) -> int:
    """Groups per router group that every layer can be cut to without going below `threshold`."""
    return max(part.groups_at(threshold) for tree in trees for part in tree.parts)


def threshold_for_share(trees: Sequence[LayerTree], share: float, fewest: int) -> float | None:
    """The largest threshold that saves `share` of the experts in every layer; None: none does.

    Args:
        trees: One for each layer.
        share: Between 0 and 1.
        fewest: The fewest experts one router group may keep.
    """
    size = len(trees[0].parts[0].experts)
    count = int(np.floor(size * (1.0 - share)))
    if count < fewest or count >= size:
        return None
    threshold = min(part.threshold_for(count) for tree in trees for part in tree.parts)
    # Rounded down, so that the number shown is one that works.
    shown = float(np.floor(threshold * 1000) / 1000)
    return shown if shown > 0 else None


def lowest_pair(similarity: Similarity, group: Group) -> tuple[int, int]:
    """The least similar pair of a group of at least two experts."""
    pairs = [(i, j) for place, i in enumerate(group) for j in group[place + 1 :]]
    return min(pairs, key=lambda pair: float(similarity.total[pair]))
