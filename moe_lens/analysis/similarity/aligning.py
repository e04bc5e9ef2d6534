"""Cosines of the weights of two experts once the channels of one stand in the order of the other.

An assignment of channels costs the cube of their number, so not every pair gets one: those that
look nearest do, by their weights as they lie, and by a sketch that does not depend on the order of
channels. For what chance would give, an expert is aligned with another whose hidden dimensions
are permuted and flipped in sign at random: its singular values stay, and what the two have in
common is gone, while the assignment still picks the best of all orders.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import lru_cache

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from moe_lens.experts.channels import Order, match, unit_rows, weight_rows
from moe_lens.experts.cosines import cosines
from moe_lens.experts.matrices import expert_modules
from moe_lens.families import MoELayer, down_name

from .measures import Floats, Pairs

__all__ = ["ALL", "ChannelRows", "Together", "candidates"]

ALL = "all"
"""Name of the cosine over all projections together."""

FEW_PAIRS = 120
"""A layer with at most so many pairs (16 experts) gets all of them aligned."""

PAIRS = 64
"""Pairs that are aligned in a larger layer, unless more are asked for."""

WIDEST = 4096
"""Experts with more channels are aligned only when asked for: each pair would take minutes."""

NULLS = 4
"""Pairs of a layer that are compared with one of them scrambled."""

_SKETCH = 48
_HELD = 8


@dataclass(frozen=True)
class Together:
    """Two experts side by side.

    Attributes:
        order: Of the second one's channels.
        lying: Cosines as they lie, by projection, and `ALL`.
        aligned: The same in that order.
    """

    order: Order
    lying: dict[str, float]
    aligned: dict[str, float]


@dataclass
class ChannelRows:
    """All weights of each channel of the experts of a layer, a few experts at a time.

    Use it inside of `MoELayer.reading`.
    """

    layer: MoELayer
    parts: dict[str, slice] = field(init=False)
    """Columns of each projection; those of biases are in none."""
    rows: Callable[[int], mx.array] = field(init=False)
    """[width, n] of an expert."""

    def __post_init__(self) -> None:
        layer, start = self.layer, 0
        down = down_name(layer.experts[0] if layer.list_experts else layer.experts)
        self.parts = {}
        for name, matrix in expert_modules(layer, 0).items():
            stop = start + matrix.shape[0 if name == down else 1]
            self.parts[name] = slice(start, stop)
            start = stop + (name != down and matrix.bias is not None)

        def read(expert: int) -> mx.array:
            found = weight_rows(layer, expert)
            mx.eval(found)
            return found

        self.rows = lru_cache(maxsize=_HELD)(read)

    def compare(self, one: int, two: int) -> Together:
        """Align expert `two` with expert `one`."""
        return self._together(self.rows(one), self.rows(two))

    def scrambled(self, one: int, two: int, draw: np.random.Generator) -> Together:
        """Align `two` with `one` after its hidden dimensions are permuted and flipped in sign."""
        rows = self.rows(two)
        for part in self.parts.values():
            width = part.stop - part.start
            order = mx.array(draw.permutation(width).astype(np.uint32))
            sign = mx.array(draw.choice([-1.0, 1.0], width).astype(np.float32))
            moved = rows[:, part][:, order] * sign
            rows = mx.concatenate([rows[:, : part.start], moved, rows[:, part.stop :]], axis=1)
        return self._together(self.rows(one), rows)

    def sketches(self, draw: np.random.Generator) -> NDArray[np.float64]:
        """[E, E] cosines of what experts hold in whatever order their channels are.

        Channels are projected to a few random directions; the products of these, summed over
        channels, do not depend on their order. What all experts have in common is taken out.
        """
        found: list[NDArray[np.float64]] = []
        for expert in range(self.layer.num_experts):
            rows = unit_rows(self.rows(expert))
            if not found:
                directions = mx.array(draw.normal(size=(rows.shape[1], _SKETCH)).astype(np.float32))
            seen = rows @ directions
            found.append(np.array(seen.T @ seen, np.float64).ravel())
        sums = np.stack(found)
        return cosines(sums - sums.mean(axis=0))

    def _together(self, one: mx.array, two: mx.array) -> Together:
        order = match([unit_rows(one)], [unit_rows(two)])
        return Together(order, self._cosines(one, two), self._cosines(one, two[mx.array(order)]))

    def _cosines(self, one: mx.array, two: mx.array) -> dict[str, float]:
        sums = {
            name: np.array(
                [
                    float((a[:, part] * b[:, part]).sum())
                    for a, b in ((one, two), (one, one), (two, two))
                ]
            )
            for name, part in self.parts.items()
        }
        sums[ALL] = sum(sums.values(), np.zeros(3))
        return {
            name: float(product / np.sqrt(max(square * other, 1e-300)))
            for name, (product, square, other) in sums.items()
        }


def candidates(
    layer: MoELayer,
    lying: Floats,
    sketches: Callable[[], Floats],
    most: int | None,
) -> Pairs:
    """The pairs of a layer to align.

    Args:
        layer: The layer.
        lying: [E, E] cosines as they lie.
        sketches: Gives [E, E] cosines without order; called where not all pairs are aligned.
        most: How many; None: `PAIRS`, and none where experts are wider than `WIDEST`.
    """
    experts = len(lying)
    everything = list(zip(*np.triu_indices(experts, 1), strict=True))
    pairs = [(int(one), int(two)) for one, two in everything]
    if most is None:
        if layer.expert_width > WIDEST:
            return []
        most = len(pairs) if len(pairs) <= FEW_PAIRS else PAIRS
    if most >= len(pairs):
        return pairs
    if most == 0:
        return []
    chosen: dict[tuple[int, int], None] = {}
    for pair in _alternating(_ranked(lying, pairs), _ranked(sketches(), pairs)):
        chosen[pair] = None
        if len(chosen) == most:
            break
    return sorted(chosen)


def _ranked(table: Floats, pairs: Pairs) -> Pairs:
    """The most similar first."""
    order = np.argsort([-table[pair] for pair in pairs], kind="stable")
    return [pairs[place] for place in order]


def _alternating(one: Pairs, two: Pairs) -> Iterable[tuple[int, int]]:
    for first, second in zip(one, two, strict=True):
        yield first
        yield second
