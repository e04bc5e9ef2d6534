"""Super experts: the few whose outputs hold massive activations, without which a model breaks.

The rule of "Unveiling Super Experts" (arXiv:2507.23279), as REAP (arXiv:2510.13999) applies it:
the largest |activation| of the expert lies above the 99.5th percentile of that of all experts of
the model, and above a tenth of the largest; only the first three quarters of the MoE layers count.
Layers are named by their index in the model, dense layers counted, and the *absolute* maximum is
taken.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .statistics import LayerStatistics

DEFINITION = (
    "super experts: largest |output| above the 99.5th percentile over all experts and above a "
    "tenth of the largest, in the first three quarters of the MoE layers (arXiv:2510.13999)"
)

PERCENTILE = 99.5
LEAST_SHARE = 0.1
FIRST_LAYERS = 0.75


def super_experts(layers: Sequence[LayerStatistics]) -> dict[int, tuple[int, ...]]:
    """Layer index -> its super experts; layers without any left out.

    Of few experts (below 200 in all layers together) the 99.5th percentile lies between the two
    largest, so that the largest alone can be one.
    """
    if not layers:
        return {}
    ordered = sorted(layers, key=lambda each: each.layer)
    peaks = np.stack([each.routed.max_activations for each in ordered])
    bar = max(float(np.percentile(peaks, PERCENTILE)), LEAST_SHARE * float(peaks.max()))
    first = ordered[: max(1, int(FIRST_LAYERS * len(ordered)))]
    found = {
        each.layer: tuple(np.flatnonzero(row > bar).tolist())
        for each, row in zip(first, peaks, strict=False)
    }
    return {layer: experts for layer, experts in found.items() if experts}
