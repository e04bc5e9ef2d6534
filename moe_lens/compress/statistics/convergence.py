"""Whether more calibration text would still change which experts matter.

The prompts are split into two random halves whose sums are kept apart. Where both halves rank the
experts of a layer alike, more text of the same kind will hardly rank them otherwise; where they do
not, the ranking is still the text's and not yet the model's.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.stats import rankdata

from moe_lens.errors import UsageError

from .saliency import FORMULAS
from .statistics import LayerStatistics

DEFINITION = (
    "rank stability: Spearman correlation of the saliencies of a layer's experts in two random "
    "halves of the calibration prompts; experts that a half did not reach rank lowest in it"
)


def rank_stability(layers: Sequence[LayerStatistics], method: str = "reap") -> dict[int, float]:
    """Layer -> how alike two halves of the text rank its experts: 1 the same, 0 unrelated.

    A half ranks worse than the whole, so this is a lower bound of how stable the whole is.
    Layers of which a half saw no token, or all of whose saliencies are equal, have 0.

    Args:
        layers: Statistics of a calibration.
        method: One of `saliency.FORMULAS`.

    Raises:
        UsageError: The method does not come from sums, or the halves were not kept.
    """
    if method not in FORMULAS:
        raise UsageError(
            f"{method} does not come from the sums of a text; choose one of {', '.join(FORMULAS)}"
        )
    found = {}
    for each in layers:
        if each.halves is None:
            raise UsageError(f"the halves of the text were not kept apart in layer {each.layer}")
        first, second = (FORMULAS[method].value([(1.0, half)]) for half in each.halves)
        read = all(half.tokens for half in each.halves)
        found[each.layer] = _spearman(first, second) if read else 0.0
    return found


def _spearman(first: NDArray[np.float64], second: NDArray[np.float64]) -> float:
    ranks = [rankdata(np.where(np.isnan(values), -np.inf, values)) for values in (first, second)]
    a, b = (rank - rank.mean() for rank in ranks)
    scale = float(np.sqrt((a @ a) * (b @ b)))
    return float(a @ b) / scale if scale > 0 else 0.0
