"""What is summed about each expert over the tokens that were routed to it.

g is the weight the block gives the expert (after every normalisation and scale), f the expert's
output before that weight, ||f|| its L2 norm. Where the block weighs the experts' *input* (Llama
4), an output cannot be had without its weight: there f stands for the weighted output, and the
weight is not multiplied again.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moe_lens.errors import UsageError

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class RoutedSums:
    """Sums over the tokens of one text (or label) for the E experts of one layer.

    Everything adds, except that the larger of two `max_activations` holds. Counts are exact.
    """

    tokens: int
    """Tokens read, routed to the expert or not."""
    counts: NDArray[np.int64]
    """[E] tokens that were routed to the expert."""
    weight_sums: Floats
    """[E] sum of g."""
    norm_sums: Floats
    """[E] sum of ||f||."""
    square_sums: Floats
    """[E] sum of ||f||^2."""
    weighted_norm_sums: Floats
    """[E] sum of g ||f||."""
    weighted_square_sums: Floats
    """[E] sum of g^2 ||f||^2."""
    max_activations: Floats
    """[E] largest |value| of any f; 0 where no token came."""
    output_sums: Floats | None = None
    """[E, width of f] sum of f; None where it was not asked for."""

    @classmethod
    def empty(cls, experts: int) -> RoutedSums:
        """The sums over no token at all."""
        zero = np.zeros(experts)
        return cls(0, np.zeros(experts, np.int64), zero, zero, zero, zero, zero, zero)

    @classmethod
    def of(
        cls,
        tokens: NDArray[np.int64],
        experts: int,
        chosen: NDArray[np.int64],
        group: NDArray[np.int64],
        **values: Floats,
    ) -> list[RoutedSums]:
        """Sum the routed slots of several groups of tokens at once.

        Args:
            tokens: [groups] how many tokens of each were read.
            experts: E.
            chosen: [slots] the expert of each slot that went to one.
            group: [slots] the group of its token.
            values: [slots] each: `weight` g, `norm` ||f||, `weighted` g ||f||, `peak` max |f|.
        """
        groups = len(tokens)
        cells = group * experts + chosen

        def summed(each: Floats | None) -> NDArray[Any]:
            return np.bincount(cells, each, minlength=groups * experts).reshape(groups, experts)

        peaks = np.zeros(groups * experts)
        with np.errstate(invalid="ignore"):  # a NaN is kept, and reported by who reads it
            np.maximum.at(peaks, cells, values["peak"])
        sums = [values["weight"], values["norm"], values["norm"] ** 2]
        sums += [values["weighted"], values["weighted"] ** 2]
        parts = (summed(None).astype(np.int64), *map(summed, sums), peaks.reshape(groups, experts))
        return [cls(int(size), *rows) for size, *rows in zip(tokens, *parts, strict=True)]

    def __add__(self, other: RoutedSums) -> RoutedSums:
        """The sums over both texts."""
        return RoutedSums(
            tokens=self.tokens + other.tokens,
            counts=self.counts + other.counts,
            weight_sums=self.weight_sums + other.weight_sums,
            norm_sums=self.norm_sums + other.norm_sums,
            square_sums=self.square_sums + other.square_sums,
            weighted_norm_sums=self.weighted_norm_sums + other.weighted_norm_sums,
            weighted_square_sums=self.weighted_square_sums + other.weighted_square_sums,
            max_activations=np.maximum(self.max_activations, other.max_activations),
            output_sums=added(self.output_sums, other.output_sums, self.tokens, other.tokens),
        )

    def mean_outputs(self) -> Floats:
        """[E, width of f] mean of f over the routed tokens; NaN where there are none.

        Raises:
            UsageError: The outputs were not summed.
        """
        if self.output_sums is None:
            raise UsageError("the outputs were not summed; calibrate with `mean_outputs=True`")
        unknown = np.full(self.output_sums.shape, np.nan)
        counts = self.counts[:, None]
        return np.divide(self.output_sums, counts, out=unknown, where=counts > 0)


def added(first: Floats | None, second: Floats | None, n: int, m: int) -> Floats | None:
    """The sum of two sums over `n` and over `m` tokens; None is one that was not asked for.

    No token has no outputs either, so its sum is known without having been asked for.
    """
    if first is None or second is None:
        if n == 0:
            return second
        return first if m == 0 else None
    return first + second


def total(parts: Iterable[RoutedSums], experts: int) -> RoutedSums:
    """All of `parts` added up."""
    return sum(parts, RoutedSums.empty(experts))
