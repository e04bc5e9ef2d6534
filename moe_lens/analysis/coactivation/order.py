"""Experts of a layer by the company they keep: strongest partners, and an order for pictures."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from .communities import Communities

__all__ = ["PARTNERS", "partner_graph", "side_by_side"]

PARTNERS = 6
"""Strongest partners of each expert that the graph of communities holds."""

Floats = NDArray[np.float64]


def partner_graph(lift: Floats, claimed: NDArray[np.bool_]) -> Floats:
    """[R, R] log2 lift of each expert's strongest partners, those of either kept; 0 elsewhere."""
    weight = np.where(claimed, np.log2(np.where(claimed, lift, 1.0)), 0.0)
    if len(weight) <= PARTNERS:
        return weight
    least = np.partition(weight, -PARTNERS, axis=1)[:, -PARTNERS][:, None]
    kept = (weight >= least) & claimed
    return np.where(kept | kept.T, weight, 0.0)


def side_by_side(lift: Floats, groups: Communities) -> NDArray[np.int64]:
    """Communities first, largest first; within and after them by clustering of the lifts."""
    from scipy.cluster.hierarchy import leaves_list, linkage, optimal_leaf_ordering
    from scipy.spatial.distance import squareform

    width = len(lift)
    if width < 3:
        return np.arange(width)
    apart = 1 / (1 + np.nan_to_num(lift))
    np.fill_diagonal(apart, 0.0)
    condensed = squareform(apart, checks=False)
    tree = optimal_leaf_ordering(linkage(condensed, "average"), condensed)
    place = np.empty(width, dtype=np.int64)
    place[leaves_list(tree)] = np.arange(width)
    group = np.full(width, len(groups.members))
    for number, members in enumerate(groups.members):
        group[list(members)] = number
    return np.lexsort((place, group))
