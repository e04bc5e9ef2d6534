"""How many experts each layer keeps, so that the sum of the layers' losses is least within bytes.

The sum is exact to minimise: a knapsack over layers with one choice in each, solved by dynamic
programming over the bytes that are spent.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from moe_lens.errors import UsageError

Floats = NDArray[np.float64]

MOST_UNITS = 50_000
"""Steps that a budget is divided into at most; beyond, bytes are rounded up to whole steps."""


def curve(measured: Mapping[int, float], counts: Sequence[int]) -> Floats:
    """[counts] the loss with each number of experts, of those that were measured.

    Between two of them it is a straight line. More experts never count as worse: where they were,
    by the noise of a short text, the loss with fewer is taken.

    Args:
        measured: Number of experts -> loss.
        counts: Ascending, within those measured.
    """
    known = sorted(measured)
    return np.interp(counts, known, np.minimum.accumulate([measured[count] for count in known]))


def allocate(
    losses: Mapping[int, Floats],
    counts: Sequence[int],
    expert_bytes: Mapping[int, int],
    budget: int,
) -> dict[int, int]:
    """The number of experts of each layer with the least sum of losses within `budget` bytes.

    Of equal sums, more experts are kept.

    Args:
        losses: By layer, [counts] what it loses with each number.
        counts: The possible numbers, ascending.
        expert_bytes: By layer, what one expert takes.
        budget: Bytes of all experts of all layers.

    Raises:
        UsageError: Not even the smallest number in every layer fits.
    """
    spare = budget - sum(counts[0] * expert_bytes[layer] for layer in losses)
    if spare < 0:
        raise UsageError(
            f"{counts[0]} experts in every layer, the fewest possible, take more than the budget "
            f"of {budget} bytes; give a larger size"
        )
    more = {
        layer: [(count - counts[0]) * expert_bytes[layer] for count in counts] for layer in losses
    }
    unit = max(math.gcd(*(each for costs in more.values() for each in costs)), 1)
    if spare // unit > MOST_UNITS:
        unit = -(-spare // MOST_UNITS)
    units = spare // unit
    least = np.zeros(units + 1)  # [spent at most] the sum of losses of the layers so far
    chosen = {}
    for layer, values in losses.items():
        best = np.full(units + 1, np.inf)
        choice = np.zeros(units + 1, np.int64)
        for number, (value, cost) in enumerate(zip(values, more[layer], strict=True)):
            start = -(-cost // unit)
            if start > units:
                break
            total = least[: units + 1 - start] + value
            better = total <= best[start:]
            best[start:][better] = total[better]
            choice[start:][better] = number
        least, chosen[layer] = best, choice
    found, left = {}, units
    for layer in reversed(list(losses)):
        number = int(chosen[layer][left])
        found[layer] = counts[number]
        left -= -(-more[layer][number] // unit)
    return {layer: found[layer] for layer in losses}
