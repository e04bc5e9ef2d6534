"""Sums over the routing of many tokens, taken once after the forward.

They are computed from stacked ids [layers, tokens, k] and weights of the same shape:

- *counts*: how often each expert was chosen,
- *weight sums*: the sum of the weights it was given,
- *co-activation*: how often two experts were chosen by the same token,
- *transitions*: how often one expert was chosen in one layer and another in the next.

These are for numpy arrays on a CPU. Pairs are scattered into the table with ``np.add.at``;
``benchmarks/routing.py`` measures that against bincounts, sparse and dense products and bit sets.
[`lazy_route_sums`][moe_lens.kernels.lazy_route_sums] gives the same integers for ids that a GPU
still holds.

A slot that holds [`NO_EXPERT`][moe_lens.kernels.NO_EXPERT] is empty and counts nowhere.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Ids = NDArray[np.integer]
Counts = NDArray[np.int64]

NO_EXPERT = 65535
"""The id of an empty slot, where the layers of a stack differ in k."""

_CHUNK = 16384
"""Tokens scattered at a time where there are many, so that their cells stay in the cache."""

_SLOTS_AT_ONCE = 32768
"""Slots counted at a time: layers are joined up to here."""

_PAIRS_AT_ONCE = 8192
"""Pairs scattered at a time where there are few tokens: layers are joined up to here."""


@dataclass(frozen=True, eq=False)
class RouteSums:
    """The sums of [`route_sums`][moe_lens.kernels.route_sums], as numpy arrays.

    Attributes:
        counts: [layers, E] int64, slots that chose each expert.
        weight_sums: [layers, E] float64. Of float16 weights it is exact, whatever their order,
            below 2^29; of float32 weights it is rounded to float64.
        coactivation: [layers, E, E] int64, see [`coactivation`][moe_lens.kernels.coactivation].
    """

    counts: Counts
    weight_sums: NDArray[np.float64]
    coactivation: Counts


def route_sums(ids: Ids, weights: NDArray[np.floating], num_experts: int) -> RouteSums:
    """Counts, weight sums and co-activation in one call.

    Args:
        ids: [layers, tokens, k] expert ids, any integer dtype; ``NO_EXPERT`` is an empty slot.
        weights: [layers, tokens, k] expert weights; those of empty slots are left out.
        num_experts: E, the number of experts the ids count.

    Raises:
        ValueError: The shapes do not fit, or an id is neither below `num_experts` nor empty.
    """
    return RouteSums(
        expert_counts(ids, num_experts),
        weight_sums(ids, weights, num_experts),
        coactivation(ids, num_experts),
    )


def expert_counts(ids: Ids, num_experts: int) -> Counts:
    """[layers, E] how many slots chose each expert.

    Args:
        ids: [layers, tokens, k], any integer dtype; ``NO_EXPERT`` is an empty slot.
        num_experts: E.

    Raises:
        ValueError: As for [`route_sums`][moe_lens.kernels.route_sums].
    """
    table = np.empty((len(_checked(ids, num_experts)), num_experts), dtype=np.int64)
    for part in _joined_layers(ids):
        table[part] = _by_expert(ids[part], None, num_experts)
    return table


def weight_sums(ids: Ids, weights: NDArray[np.floating], num_experts: int) -> NDArray[np.float64]:
    """[layers, E] the sum of the weights each expert was given, added in float64.

    Args:
        ids: [layers, tokens, k], any integer dtype; ``NO_EXPERT`` is an empty slot.
        weights: [layers, tokens, k].
        num_experts: E.

    Raises:
        ValueError: As for [`route_sums`][moe_lens.kernels.route_sums].
    """
    if weights.shape != ids.shape:
        raise ValueError(
            f"weights of shape {weights.shape} do not fit ids of shape {ids.shape}: give one "
            "weight for each id"
        )
    table = np.empty((len(_checked(ids, num_experts)), num_experts), dtype=np.float64)
    for part in _joined_layers(ids):
        table[part] = _by_expert(ids[part], weights[part].ravel(), num_experts)
    return table


def coactivation(ids: Ids, num_experts: int) -> Counts:
    """[layers, E, E] how many tokens chose both expert i and expert j.

    The diagonal is `expert_counts`. A token that names an expert in several slots, which only
    explicit ids can, counts once for each pair of slots: the table is M^T M of the matrix
    M [tokens, E] of how many slots of a token name an expert.

    Args:
        ids: [layers, tokens, k], any integer dtype; ``NO_EXPERT`` is an empty slot.
        num_experts: E.

    Raises:
        ValueError: As for [`route_sums`][moe_lens.kernels.route_sums].
    """
    layers, tokens, k = _checked(ids, num_experts).shape
    if _few(tokens, k, num_experts):
        return _all_pairs(ids, ids, num_experts)
    table = np.empty((layers, num_experts, num_experts), dtype=np.int64)
    half = _scratch(num_experts)
    every = np.arange(num_experts)
    for layer in range(layers):
        half[:] = 0
        chosen = np.zeros(len(half), dtype=np.int64)
        for start in range(0, tokens, _CHUNK):
            columns = _slots_first(ids[layer, start : start + _CHUNK], num_experts)
            rows = columns * len(half)
            # A pair of slots a < b is scattered once; its other half is the transpose.
            for distance in range(1, k):
                _add_pairs(half, rows[: k - distance], columns[distance:])
            chosen += np.bincount(columns.reshape(-1), minlength=len(half))
        pairs = half[:num_experts, :num_experts]
        np.add(pairs, pairs.T, out=table[layer])
        table[layer, every, every] += chosen[:num_experts]
    return table


def transitions(ids: Ids, num_experts: int) -> Counts:
    """[layers - 1, E, E] how many tokens chose expert i in one layer and expert j in the next.

    Every pair of a slot of the one and a slot of the other counts once, so a token whose slots
    are all filled adds k x k, and row i sums to k times the count of expert i.

    Args:
        ids: [layers, tokens, k], any integer dtype; ``NO_EXPERT`` is an empty slot.
        num_experts: E.

    Raises:
        ValueError: As for [`route_sums`][moe_lens.kernels.route_sums].
    """
    layers, tokens, k = _checked(ids, num_experts).shape
    if _few(tokens, k, num_experts):
        return _all_pairs(ids[:-1], ids[1:], num_experts)
    table = np.empty((max(layers - 1, 0), num_experts, num_experts), dtype=np.int64)
    pairs = _scratch(num_experts)
    for layer in range(len(table)):
        pairs[:] = 0
        for start in range(0, tokens, _CHUNK):
            part = slice(start, start + _CHUNK)
            rows = _slots_first(ids[layer, part], num_experts) * len(pairs)
            columns = _slots_first(ids[layer + 1, part], num_experts)
            for slot in range(k):
                _add_pairs(pairs, rows[slot], columns)
        table[layer] = pairs[:num_experts, :num_experts]
    return table


def _checked(ids: Ids, num_experts: int) -> Ids:
    if ids.ndim != 3:
        raise ValueError(
            f"ids have shape {ids.shape}, not [layers, tokens, k]: stack the layers, or give "
            "ids[None] for one"
        )
    if not 1 <= num_experts <= NO_EXPERT:
        raise ValueError(f"{num_experts} experts cannot be counted: give 1 to {NO_EXPERT}")
    if ids.size and (ids.max() >= num_experts or ids.min() < 0):
        unknown = ((ids >= num_experts) | (ids < 0)) & (ids != NO_EXPERT)
        if unknown.any():
            raise ValueError(
                f"id {int(ids[unknown][0])} is no expert of {num_experts}: give the width of the "
                f"router, and mark an empty slot with {NO_EXPERT}"
            )
    return ids


def _joined_layers(ids: Ids) -> list[slice]:
    """Groups of layers that are small enough together for the cache, or one layer each."""
    layers, tokens, k = ids.shape
    size = max(1, _SLOTS_AT_ONCE // max(1, tokens * k))
    return [slice(start, start + size) for start in range(0, layers, size)]


def _by_expert(ids: Ids, weights: NDArray[np.floating] | None, num_experts: int) -> NDArray:
    """[layers, E] how many slots name each expert, or the sum of their flat `weights`."""
    side = num_experts + 1  # one column more than experts takes the empty slots
    cells = np.minimum(ids, num_experts, dtype=np.intp)
    cells += (np.arange(len(ids)) * side)[:, None, None]
    table = np.bincount(cells.ravel(), weights, minlength=len(ids) * side)
    return table.reshape(len(ids), side)[:, :num_experts]


def _few(tokens: int, k: int, num_experts: int) -> bool:
    """Whether a layer's pairs are no more than the cells of its table."""
    return tokens * k**2 <= num_experts**2


def _all_pairs(first: Ids, second: Ids, num_experts: int) -> Counts:
    """[layers, E, E] every pair of a slot of `first` and a slot of `second`, layer by layer.

    For few pairs: as many layers at once as make a scatter worth its call, and no work goes over
    whole tables. Pages of zeros that no pair touches are never even mapped.
    """
    layers, tokens, k = first.shape
    empty = first.size > 0 and max(first.max(), second.max()) >= num_experts
    side = num_experts + int(empty)
    table = np.zeros((layers, side, side), dtype=np.int64)
    group = max(1, _PAIRS_AT_ONCE // max(1, tokens * k**2))
    for start in range(0, layers, group):
        part = slice(start, start + group)
        columns = _slots_first(second[part], num_experts)
        rows = columns if first is second else _slots_first(first[part], num_experts)
        rows = rows * side + (np.arange(rows.shape[1]) * side**2)[:, None]
        _add_pairs(table[part], rows[:, None], columns)
    return np.ascontiguousarray(table[:, :num_experts, :num_experts])


def _slots_first(ids: Ids, num_experts: int) -> NDArray[np.intp]:
    """`ids` [..., tokens, k] as [k, ..., tokens] to index with, an empty slot as E.

    The slots come first because pairs are formed of whole slots.
    """
    slots = np.ascontiguousarray(np.moveaxis(ids, -1, 0))
    return np.minimum(slots, num_experts, dtype=np.intp)


def _scratch(num_experts: int) -> Counts:
    """A table [E + 1, E + 1] that is used for one layer after the other and stays in the cache.

    Its last row and column take the empty slots. A side other than E matters for speed, too:
    numbers of experts are mostly powers of two, and with such a stride all cells of a column
    would fall on the same few lines of the cache.
    """
    return np.empty((num_experts + 1, num_experts + 1), dtype=np.int64)


def _add_pairs(table: Counts, rows: NDArray[np.intp], columns: NDArray[np.intp]) -> None:
    """Add 1 to the cells `rows` + `columns`, broadcast, of the flattened `table`."""
    # One flat index of one axis takes numpy's fast path of `add.at`.
    np.add.at(table.reshape(-1), (rows + columns).reshape(-1), 1)
