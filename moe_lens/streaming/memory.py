"""How much memory a model takes, as a whole and layer by layer, and which of the two it gets."""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from moe_lens.machine.facts import memory

SHARE = 0.6
"""Of the free memory: a model with more weights than that is streamed. The rest is for a second,
smaller model, activations, and other programs."""

READING = 2
"""Times the largest tensor that reading it may take beside itself: the pieces that a checkpoint
stores it in, and the same in another dtype."""


@dataclass(frozen=True)
class WeightMemory:
    """Bytes of a model's weights, in the dtypes it computes with."""

    total: int
    outside: int
    """Of the weights outside of the layers: embedding, last norm, head. They stay in memory."""
    layer: int
    """Of the largest layer."""
    tensor: int
    """Of the largest tensor of a layer."""

    @classmethod
    def of(cls, model: nn.Module) -> WeightMemory:
        """Count; lazily loaded weights are not read for that."""
        layers = [
            [_computed(value) for _, value in tree_flatten(layer.parameters())]
            for layer in getattr(model, "layers", [])
        ]
        total = sum(_computed(value) for _, value in tree_flatten(model.parameters()))
        return cls(
            total=total,
            outside=total - sum(map(sum, layers)),
            layer=max(map(sum, layers), default=0),
            tensor=max((size for sizes in layers for size in sizes), default=0),
        )

    @property
    def streamed(self) -> int:
        """The most that is in memory at a time when the model is streamed."""
        return self.outside + self.layer + READING * self.tensor

    @property
    def too_large(self) -> bool:
        """Whether the model should be streamed on this machine."""
        free = free_memory()
        return free is not None and self.total > SHARE * free


def _computed(value: mx.array) -> int:
    """Bytes as `compute_in_float32` has it: MLX's CPU backend computes in float32."""
    half = value.dtype in (mx.bfloat16, mx.float16)
    return value.size * 4 if half and mx.default_device() == mx.cpu else value.nbytes


def free_memory() -> int | None:
    """Bytes that MLX's default device can still take; None where the system does not say."""
    if mx.default_device() == mx.cpu:
        return memory().available
    most = mx.device_info().get("max_recommended_working_set_size")
    return None if most is None else int(most) - mx.get_active_memory()
