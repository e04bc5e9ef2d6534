"""How a packed weight is stored, and how it is read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

Leaves = dict[str, mx.array]
"""The tensors of one Linear by their last name: weight, scales, biases, bias, global_scale."""


@dataclass(frozen=True)
class Quantisation:
    """How the packed weight of one Linear is stored, as MLX names it."""

    group_size: int
    bits: int
    mode: str

    @classmethod
    def of(cls, module: Any) -> Quantisation | None:
        """That of a module; None where its weight is not packed."""
        if "scales" not in module:
            return None
        return cls(module.group_size, module.bits, getattr(module, "mode", "affine"))


def unpack(leaves: Mapping[str, mx.array], quantisation: Quantisation) -> mx.array:
    """The weight of a packed Linear (one expert, where there is a global scale) in float32."""
    scale = leaves.get("global_scale")
    return mx.dequantize(
        leaves["weight"],
        leaves["scales"],
        leaves.get("biases"),
        quantisation.group_size,
        quantisation.bits,
        quantisation.mode,
        global_scale=None if scale is None else scale.reshape(()),
        dtype=mx.float32,
    )
