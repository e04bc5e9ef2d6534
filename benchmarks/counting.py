"""Ways to count which experts the same tokens chose, to measure `coactivation` against.

Each takes ids [layers, tokens, k] and E, and gives [layers, E, E] int64. All but `ours` and the
MLX operations work on one layer after the other.
"""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray
from scipy import sparse
from scipy.linalg import blas

from moe_lens.kernels.lazy_statistics import lazy_route_sums
from moe_lens.kernels.statistics import coactivation

Ids = NDArray[np.uint16]
Table = NDArray[np.int64]
Way = Callable[[Ids, int], Table]


def bincount_per_slot(ids: Ids, experts: int) -> Table:
    chosen = ids.astype(np.int64)
    table = np.zeros(experts**2, np.int64)
    for slot in range(ids.shape[1]):
        cells = chosen[:, slot, None] * experts + chosen
        table += np.bincount(cells.ravel(), minlength=experts**2)
    return table.reshape(experts, experts)


def bincount_at_once(ids: Ids, experts: int) -> Table:
    chosen = ids.astype(np.int64)
    cells = chosen[:, :, None] * experts + chosen[:, None]
    return np.bincount(cells.ravel(), minlength=experts**2).reshape(experts, experts)


def bincount_of_half(ids: Ids, experts: int) -> Table:
    """Pairs of slots a < b, all in one bincount; the other half is the transpose."""
    columns = np.ascontiguousarray(ids.T, dtype=np.int64)
    rows, k = columns * experts, len(columns)
    cells = np.concatenate([rows[: k - gap] + columns[gap:] for gap in range(1, k)])
    half = np.bincount(cells.ravel(), minlength=experts**2).reshape(experts, experts)
    return half + half.T + np.diag(np.bincount(columns.ravel(), minlength=experts))


def scatter_in_full(ids: Ids, experts: int) -> Table:
    columns = np.ascontiguousarray(ids.T, dtype=np.int64)
    table = np.zeros(experts**2, np.int64)
    for rows in columns * experts:
        np.add.at(table, (rows + columns).ravel(), 1)
    return table.reshape(experts, experts)


def sparse_product(ids: Ids, experts: int) -> Table:
    tokens, k = ids.shape
    ones = np.ones(ids.size, np.int64)
    starts = np.arange(0, ids.size + 1, k)
    named = sparse.csr_array((ones, ids.ravel().astype(np.int64), starts), (tokens, experts))
    return (named.T @ named).toarray()


def dense_product(ids: Ids, experts: int) -> Table:
    named = _one_hot(ids, experts)
    return (named.T @ named).astype(np.int64)


def symmetric_product(ids: Ids, experts: int) -> Table:
    upper = blas.ssyrk(1.0, _one_hot(ids, experts).T).astype(np.int64)
    return upper + np.triu(upper, 1).T


def bit_sets(ids: Ids, experts: int) -> Table:
    """One bit per token and expert; a pair is counted by the bits two experts share."""
    words = -(-len(ids) // 64)
    named = np.zeros((experts, words * 64), np.bool_)
    named[ids, np.arange(len(ids))[:, None]] = True
    packed = np.packbits(named, axis=1).view(np.uint64)
    return np.stack([np.bitwise_count(own & packed).sum(1, dtype=np.int64) for own in packed])


def mlx_operations(ids: Ids, experts: int) -> Table:
    held = mx.array(ids)
    table = lazy_route_sums(held, mx.zeros(held.shape), experts).coactivation
    return np.array(table).astype(np.int64)


def layer_by_layer(way: Way) -> Way:
    """`way`, which counts one layer [tokens, k], for a stack of layers."""
    return lambda ids, experts: np.stack([way(layer, experts) for layer in ids])


def _one_hot(ids: Ids, experts: int) -> NDArray[np.float32]:
    named = np.zeros((len(ids), experts), np.float32)
    named[np.arange(len(ids))[:, None], ids] = 1.0
    return named


_OF_ONE_LAYER: dict[str, Way] = {
    "bincount per slot": bincount_per_slot,
    "bincount at once": bincount_at_once,
    "bincount of half": bincount_of_half,
    "scatter in full": scatter_in_full,
    "sparse product": sparse_product,
    "dense product": dense_product,
    "symmetric product": symmetric_product,
    "bit sets": bit_sets,
}

WAYS: dict[str, Way] = {
    "ours": coactivation,
    **{name: layer_by_layer(way) for name, way in _OF_ONE_LAYER.items()},
    "MLX operations": mlx_operations,
}
