"""Counting routes: the sums of a profile, from arrays of expert ids.

No function here loops over tokens. What concerns routing alone is counted by
`moe_lens.kernels.statistics`; here stand the names of a profile for it, and the counts by label,
block and token id, which are one ``np.bincount`` on a combined index for each layer.

Empty slots (``NO_EXPERT``) are counted into one extra column, which is then dropped.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from moe_lens import kernels
from moe_lens.trace import Routes

__all__ = [
    "coactivation",
    "expert_counts",
    "first_counts",
    "group_counts",
    "transitions",
    "vocabulary_counts",
    "weight_sums",
]

Counts = NDArray[np.int64]


def expert_counts(routes: Routes) -> Counts:
    """[layers, R] how often each expert was chosen."""
    return kernels.expert_counts(routes.expert_ids, routes.router_width)


def first_counts(routes: Routes) -> Counts:
    """[layers, R] how often each expert was the first choice (slot 0)."""
    return kernels.expert_counts(routes.expert_ids[..., :1], routes.router_width)


def weight_sums(routes: Routes) -> NDArray[np.float64]:
    """[layers, R] sum of the expert weights."""
    return kernels.weight_sums(routes.expert_ids, routes.expert_weights, routes.router_width)


def coactivation(routes: Routes) -> Counts:
    """[layers, R, R] tokens that chose both i and j; the diagonal is `expert_counts`."""
    return kernels.coactivation(routes.expert_ids, routes.router_width)


def transitions(routes: Routes) -> Counts:
    """[layers - 1, R, R] tokens that chose i in one MoE layer and j in the next.

    Every pair of a chosen expert of the one and a chosen expert of the other counts once, so a
    token adds k x k, and row i sums to k times the count of expert i.
    """
    return kernels.transitions(routes.expert_ids, routes.router_width)


def group_counts(routes: Routes, group: NDArray[np.integer], groups: int) -> Counts:
    """[groups, layers, R] `expert_counts` of each group of tokens.

    Args:
        group: [tokens] group of each token, 0 to ``groups`` - 1; negative: in no group.
    """
    width = routes.router_width
    kept = group >= 0
    base = group[kept].astype(np.int64)[:, None] * (width + 1)
    tables = []
    for layer in routes.expert_ids:
        columns = np.minimum(layer[kept], width, dtype=np.int64) + base
        table = _count(columns.ravel(), groups * (width + 1))
        tables.append(table.reshape(groups, width + 1)[:, :width])
    return np.stack(tables, axis=1)


def vocabulary_counts(routes: Routes) -> sparse.csr_array:
    """[highest token id + 1, layers x R] how often each token id was routed to each expert.

    Column ``place x R + expert``, where ``place`` is the place of the layer among the MoE layers.
    """
    width = routes.router_width
    ids, compact = np.unique(routes.token_ids, return_inverse=True)
    rows, columns, values = [], [], []
    for place, layer in enumerate(routes.expert_ids):
        index = (np.minimum(layer, width, dtype=np.int64) + compact[:, None] * (width + 1)).ravel()
        table = _count(index, len(ids) * (width + 1)).reshape(len(ids), width + 1)[:, :width]
        token, expert = np.nonzero(table)
        rows.append(ids[token])
        columns.append(expert + place * width)
        values.append(table[token, expert])
    shape = (int(ids[-1]) + 1 if len(ids) else 0, len(routes.layers) * width)
    triples = (np.concatenate(values), (np.concatenate(rows), np.concatenate(columns)))
    return sparse.csr_array(triples, shape=shape, dtype=np.int64)


def _count(index: NDArray[np.integer], length: int) -> Counts:
    return np.bincount(index, minlength=length).astype(np.int64, copy=False)
