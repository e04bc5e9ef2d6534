"""How many directions the weights of an expert use, and the difference of two experts.

    stable rank    = sum of squared singular values / the largest one squared
    effective rank = exp(entropy of the shares of the squared singular values)

The effective rank (Roy and Vetterli 2007, there of the values themselves, here of their squares,
which add up to the squared norm) is the number of directions if all were used alike. A Gaussian
matrix of the same shape is what to compare it with.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

__all__ = ["Ranks", "Spectra", "experts_read", "random_ranks", "ranks"]

_WORK = 3e9
"""Multiplications that the spectra of the experts of a layer may take, about."""


@dataclass(frozen=True)
class Ranks:
    """Of one matrix."""

    stable: float
    effective: float


@dataclass(frozen=True, eq=False)
class Spectra:
    """The ranks of the projections of some experts, and of differences between experts.

    P projections, n experts read of each layer, d pairs of each layer.

    Attributes:
        projections: Their names.
        shapes: Outputs and inputs of each.
        experts: By layer, the experts read.
        stable: By layer [n, P].
        effective: By layer [n, P].
        random: [P] the ranks of a Gaussian matrix of that shape.
        pairs: By layer, the pairs whose difference was read: the nearest ones.
        difference: By layer [d, P] effective rank of the difference of a pair.
        apart: By layer [d, P] |A - B|^2 / (|A|^2 + |B|^2): 1 for unrelated matrices, 0 for equal.
    """

    projections: tuple[str, ...]
    shapes: tuple[tuple[int, int], ...]
    experts: tuple[tuple[int, ...], ...]
    stable: tuple[NDArray[np.float64], ...]
    effective: tuple[NDArray[np.float64], ...]
    random: tuple[Ranks, ...]
    pairs: tuple[tuple[tuple[int, int], ...], ...]
    difference: tuple[NDArray[np.float64], ...]
    apart: tuple[NDArray[np.float64], ...]


def ranks(weight: mx.array) -> Ranks:
    """Of a matrix [rows, columns] in float32; both 0 for a matrix of zeros.

    From the Gram matrix of its smaller side, so that small singular values are inexact; neither
    rank depends on them.
    """
    rows, columns = weight.shape
    gram = weight @ weight.T if rows <= columns else weight.T @ weight
    squares = np.linalg.eigvalsh(np.array(gram, np.float64)).clip(0)
    total = squares.sum()
    if total == 0:
        return Ranks(0.0, 0.0)
    share = squares / total
    entropy = -(share[share > 0] * np.log(share[share > 0])).sum()
    return Ranks(float(total / squares.max()), float(np.exp(entropy)))


@cache
def random_ranks(rows: int, columns: int) -> Ranks:
    """Of a Gaussian matrix of this shape."""
    return ranks(mx.random.normal((rows, columns), key=mx.random.key(0)))


def experts_read(
    shapes: Sequence[tuple[int, int]], experts: int, asked: int | None
) -> tuple[int, ...]:
    """Which experts of a layer to read: `asked` of them, or as many as is quick, evenly spread."""
    if asked is None:
        work = sum(float(min(shape)) ** 3 for shape in shapes)
        asked = max(1, min(experts, int(_WORK / max(work, 1.0))))
    places = np.linspace(0, experts - 1, min(asked, experts)).round().astype(int)
    return tuple(sorted({int(place) for place in places}))
