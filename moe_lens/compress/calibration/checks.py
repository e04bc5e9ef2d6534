"""What must hold for a calibration to describe the model: all is shown, and nothing is NaN."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from moe_lens.checkpoint_files.finite import damaged_tensor
from moe_lens.compress.statistics.statistics import LayerStatistics
from moe_lens.errors import MoeLensError, UnsupportedModelError
from moe_lens.families import MoELayer


def check_finite(layers: Sequence[LayerStatistics], folder: Path | None) -> None:
    """Raise MoeLensError if an expert answered with NaN or infinity.

    Args:
        layers: What was seen.
        folder: Of the model, to find the tensor that is to blame.
    """
    for found in layers:
        sums = found.routed
        broken = np.flatnonzero(~np.isfinite(sums.weighted_norm_sums + sums.norm_sums))
        if len(broken):
            who = f"expert {broken[0]} of layer {found.layer}"
            raise not_finite(f"{who} answers with NaN or infinity", folder)


def not_finite(what: str, folder: Path | None) -> MoeLensError:
    """The refusal of a model in which something is NaN or infinite; reads all weights for it.

    Args:
        what: A clause that says what is.
        folder: Of the model; None where it has none.
    """
    tensor = None if folder is None else damaged_tensor(folder)
    if tensor is not None:
        return MoeLensError(
            f"{what}, because {tensor.name} in {tensor.file} holds some: the model is damaged, "
            "download or convert it again"
        )
    return MoeLensError(
        f"{what}, so nothing can be said about it; its weights are damaged or too large to "
        "compute with: download or convert the model again"
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
