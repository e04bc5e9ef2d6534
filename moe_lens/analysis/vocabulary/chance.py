"""What the largest share of a token id would be if experts were chosen without looking at it."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

__all__ = ["expected_largest_share"]

_EXACT = 16
_DRAWS = 200


def expected_largest_share(
    loads: NDArray[np.float64], occurrences: NDArray[np.int64], *, slots: int = 1, seed: int = 0
) -> NDArray[np.float64]:
    """[layers, ids] expected largest share of an id, if each token takes experts by their load.

    An id that occurs once always has a share of 1, so a mean over ids says nothing without this.
    Simulated for each number of occurrences up to 16 and on a grid above, between which it is
    interpolated. With one slot a token takes expert e with probability loads[e]; with more, each
    expert is taken or not with that probability by itself, which leaves out that the slots of a
    token differ. Tokens are drawn one by one, so an expectation that kept whole prompts together
    would lie higher.

    Args:
        loads: [layers, R] share of the tokens that each expert got; sums to the slots.
        occurrences: [ids] how often each id occurs.
        slots: How many choices of a token count.
        seed: Of the draws.
    """
    random = np.random.default_rng(seed)
    highest = int(occurrences.max())
    grid = np.unique(
        np.concatenate(
            [np.arange(1, min(_EXACT, highest) + 1), np.geomspace(1, highest, 24).round()]
        )
    ).astype(np.int64)
    found = np.empty((len(loads), len(occurrences)))
    for place, layer in enumerate(loads):
        share = [_largest(random, layer, int(size), slots) for size in grid]
        found[place] = np.interp(np.log(occurrences), np.log(grid), share)
    return found


def _largest(random: np.random.Generator, loads: NDArray, size: int, slots: int) -> float:
    if slots == 1:
        total = loads.sum()
        taken = random.multinomial(size, loads / total, size=_DRAWS) if total > 0 else loads[None]
    else:
        taken = random.binomial(size, np.minimum(loads, 1.0), size=(_DRAWS, len(loads)))
    return float(taken.max(axis=1).mean() / size)
