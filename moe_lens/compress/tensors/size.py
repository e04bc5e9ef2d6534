"""How large a model is: bytes and weights, counted without reading them."""

from __future__ import annotations

from dataclasses import dataclass

import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm.utils import get_total_parameters


@dataclass(frozen=True)
class Size:
    """How large a model is."""

    bytes: int
    """Of all tensors, as stored."""
    parameters: int
    """Weights, packed ones counted one by one."""

    @classmethod
    def of(cls, model: nn.Module) -> Size:
        """Without reading a single weight."""
        arrays = tree_flatten(model.parameters())
        stored = sum(value.nbytes for _, value in arrays)
        return cls(stored, int(get_total_parameters(model)))
