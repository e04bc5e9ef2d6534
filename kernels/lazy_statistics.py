"""Sums over the routing of many tokens, as MLX operations that stay lazy.

The same integers as [`route_sums`][moe_lens.kernels.route_sums], for ids that a GPU still holds:
the graph of a forward can end in these sums, and only they come to the host.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import reduce

import mlx.core as mx

_EXACT_BELOW = 2**24
"""float32 counts by ones up to here."""

_ONE_HOT_BYTES = 2**28
"""How much memory the one-hot rows of one chunk of tokens may take on a device."""


@dataclass(frozen=True, eq=False)
class LazyRouteSums:
    """The sums of [`lazy_route_sums`][moe_lens.kernels.lazy_route_sums], lazy.

    Attributes:
        counts: [layers, E] int32.
        weight_sums: [layers, E] float32, added in the order of the device.
        coactivation: [layers, E, E] int32.
    """

    counts: mx.array
    weight_sums: mx.array
    coactivation: mx.array


def lazy_route_sums(ids: mx.array, weights: mx.array, num_experts: int) -> LazyRouteSums:
    """Counts, weight sums and co-activation as MLX operations; nothing is evaluated.

    Each token becomes a row of E numbers, how many of its slots name each expert, and
    co-activation is the product of that matrix with its transpose. Products and sums of such
    small integers are exact in float32 (in TF32, too) as long as a sum stays below 2^24, which
    the chunks of tokens see to; the chunks are added in int32.

    Args:
        ids: [layers, tokens, k], any integer dtype; ``NO_EXPERT`` is an empty slot. Any other id
            that is not below `num_experts` counts nowhere either: to refuse it would mean to
            evaluate it.
        weights: [layers, tokens, k], any float dtype; added in float32.
        num_experts: E.

    Raises:
        ValueError: The shapes do not fit, or there are so many tokens that int32 could overflow.
    """
    if ids.ndim != 3 or weights.shape != ids.shape:
        raise ValueError(
            f"ids of shape {ids.shape} and weights of shape {weights.shape} do not fit: both "
            "are [layers, tokens, k]"
        )
    layers, tokens, k = ids.shape
    if tokens * k * k >= 2**31:
        raise ValueError(
            f"{tokens} tokens with {k} slots could overflow a 32-bit count: give the tokens in "
            "several calls and add the results"
        )
    if ids.size == 0:
        table = mx.zeros((layers, num_experts), mx.int32)
        pairs = mx.zeros((layers, num_experts, num_experts), mx.int32)
        return LazyRouteSums(table, table.astype(mx.float32), pairs)
    memory = _ONE_HOT_BYTES // (4 * layers * (num_experts + 1))
    chunk = max(1, min(memory, (_EXACT_BELOW - 1) // k**2))
    parts = [
        _of_chunk(
            ids[:, start : start + chunk].astype(mx.uint32),
            weights[:, start : start + chunk].astype(mx.float32),
            num_experts,
        )
        for start in range(0, tokens, chunk)
    ]
    counts, sums, pairs = (reduce(mx.add, each) for each in zip(*parts, strict=True))
    return LazyRouteSums(counts, sums, pairs)


def _of_chunk(
    ids: mx.array, weights: mx.array, num_experts: int
) -> tuple[mx.array, mx.array, mx.array]:
    """Counts int32, weight sums float32 and co-activation int32 of one chunk of tokens."""
    layers, tokens, _ = ids.shape
    side = num_experts + 1  # one column more than experts takes the empty slots
    rows = layers * tokens
    # One flat 32-bit index, so that no index is widened or broadcast on the device.
    first = mx.arange(0, rows * side, side, dtype=mx.uint32).reshape(layers, tokens, 1)
    cells = (first + mx.minimum(ids, mx.array(num_experts, mx.uint32))).reshape(-1)

    def spread(values: mx.array) -> mx.array:
        """[layers, tokens, E] the sum of the `values` of the slots that name each expert."""
        table = mx.zeros(rows * side).at[cells].add(values)
        return table.reshape(layers, tokens, side)[..., :num_experts]

    named = spread(mx.array(1.0))
    counts = named.sum(axis=1).astype(mx.int32)
    sums = spread(weights.reshape(-1)).sum(axis=1)
    return counts, sums, (named.swapaxes(1, 2) @ named).astype(mx.int32)
