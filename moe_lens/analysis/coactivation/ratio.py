"""Ratios of counts, some of which are 0."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

__all__ = ["ratio_of", "without_diagonal"]


def ratio_of(one: NDArray, two: NDArray) -> NDArray[np.float64]:
    """`one` / `two`, broadcast; NaN where `two` is 0."""
    shape = np.broadcast_shapes(one.shape, two.shape)
    return np.divide(one, two, out=np.full(shape, np.nan), where=two > 0)


def without_diagonal(table: NDArray[np.float64]) -> NDArray[np.float64]:
    """`table` [layers, R, R] itself, its diagonal NaN: an expert is no pair."""
    every = np.arange(table.shape[1])
    table[:, every, every] = np.nan
    return table
