"""How much each expert matters on the calibration text, for removing the least of them."""

from __future__ import annotations

from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from moe_lens.errors import UsageError

from .statistics import LayerStatistics

Method = Literal["reap", "frequency"]
METHODS: tuple[str, ...] = get_args(Method)

DEFINITIONS: dict[str, str] = {
    "reap": (
        "REAP (arXiv:2510.13999): mean over the calibration tokens routed to the expert of the "
        "weight the block gives it x the L2 norm of its output"
    ),
    "frequency": "share of the calibration tokens that are routed to the expert",
}


def saliency(statistics: LayerStatistics, method: str, tokens: int) -> NDArray[np.float64]:
    """[E] the saliency of every expert of a layer; NaN where no token reached it (REAP).

    Args:
        statistics: The layer's sums.
        method: ``"reap"`` or ``"frequency"``.
        tokens: Calibration tokens, the denominator of the frequency.

    Raises:
        UsageError: `method` is neither.
    """
    if method == "frequency":
        return statistics.counts / max(1, tokens)
    if method != "reap":
        raise UsageError(f"there is no method {method!r}; choose one of {', '.join(METHODS)}")
    unknown = np.full(statistics.num_experts, np.nan)
    reached = statistics.counts > 0
    return np.divide(statistics.weighted_norm_sums, statistics.counts, out=unknown, where=reached)


def least_salient(values: NDArray[np.float64], experts: tuple[int, ...], count: int) -> set[int]:
    """The `count` experts of `experts` that go first: unreached ones, then by rising saliency.

    Equal values are decided by the lower id, so that the choice is reproducible.
    """
    order = sorted(experts, key=lambda e: (-np.inf if np.isnan(values[e]) else values[e], e))
    return set(order[:count])
