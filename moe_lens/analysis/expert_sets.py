"""The experts of a token as bits, so that sets are intersected a word of 64 experts at a time."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

__all__ = ["expert_sets", "shared_experts"]


def expert_sets(ids: NDArray[np.unsignedinteger], router_width: int) -> NDArray[np.uint64]:
    """[tokens, words] uint64: bit e % 64 of word e // 64 is set where the token chose expert e.

    Args:
        ids: [tokens, k] expert ids; what is not below `router_width` is an empty slot.
        router_width: R, the experts a router can choose from.
    """
    words = -(-router_width // 64)
    table = np.zeros((len(ids), words), dtype=np.uint64)
    cells = table.reshape(-1)
    rows = np.arange(len(ids)) * words
    may_be_empty = ids.dtype.itemsize > 1
    for slot in range(ids.shape[1]):
        expert = ids[:, slot].astype(np.uint64)
        bit = np.left_shift(np.uint64(1), expert & np.uint64(63))
        if may_be_empty:
            bit[expert >= router_width] = 0
            np.minimum(expert, router_width - 1, out=expert)
        cells[rows + (expert >> np.uint64(6)).astype(np.int64)] |= bit
    return table


def shared_experts(one: NDArray[np.uint64], two: NDArray[np.uint64]) -> NDArray[np.uint16]:
    """[tokens] how many experts two `expert_sets` share, row by row."""
    counts = np.bitwise_count(one & two)
    shared = counts[:, 0].astype(np.uint16)
    for word in range(1, counts.shape[1]):
        shared += counts[:, word]
    return shared
