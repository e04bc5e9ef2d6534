"""What must hold for a calibration to describe the model: nothing is changed, nothing is NaN."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import mlx.core as mx
import numpy as np

from moe_lens.compress.statistics.statistics import LayerStatistics
from moe_lens.errors import CaptureError, MoeLensError, UnsupportedModelError
from moe_lens.families import MoELayer
from moe_lens.instrument import Forward

if TYPE_CHECKING:
    from moe_lens.router import ExpertRouter

CHECKED_TOKENS = 64
"""Tokens on which the watched model is compared with the plain one."""


class _Discard:
    """Takes the values of a calibration and keeps none."""

    def __init__(self, values: frozenset[str]) -> None:
        self.values = values

    def record(self, forward: Forward) -> None:
        """Ask for every value, so that all are computed."""
        mx.eval([forward.value(name, layer) for layer in forward.layers for name in self.values])


def check_untouched(
    router: ExpertRouter, values: frozenset[str], tokens: Sequence[Sequence[int]]
) -> None:
    """Compare the logits with and without a watcher, bit for bit, on the first tokens."""
    ids = [list(max(tokens, key=len)[:CHECKED_TOKENS])] if any(map(len, tokens)) else []
    if not ids:
        return
    plain = router.forward(ids)
    mx.eval(plain)
    with router.recording(_Discard(values)):
        watched = router.forward(ids)
        mx.eval(watched)
    if not bool(mx.array_equal(plain, watched, equal_nan=True)):
        raise CaptureError(
            "the model gives other logits while it is watched, so a calibration would describe "
            "another model; please report the model type "
            f"({router.info.model_type}) and the version of mlx-lm"
        )


def check_finite(layers: Sequence[LayerStatistics]) -> None:
    """Raise MoeLensError if an expert answered with NaN or infinity."""
    for found in layers:
        sums = found.routed
        broken = np.flatnonzero(~np.isfinite(sums.weighted_norm_sums + sums.norm_sums))
        if len(broken):
            raise MoeLensError(
                f"expert {broken[0]} of layer {found.layer} answers with NaN or infinity, so "
                "nothing can be said about it; its weights are damaged: download or convert the "
                "model again"
            )


def check_values(layers: Sequence[MoELayer], values: frozenset[str]) -> None:
    """Raise UnsupportedModelError unless every layer shows all `values`."""
    for layer in layers:
        for name in sorted(values):
            reason = layer.reason(name)
            if reason is not None:
                raise UnsupportedModelError(
                    f"layer {layer.index} cannot show {name}, which calibration needs: {reason}"
                )
