"""How the experts of a live model are computed: as mlx-lm does, or by segment on a CPU.

The numbers by segment are those of stock MLX up to the order of sums, so they are never what runs
unless that was asked for. The *class* of the Switch modules is swapped, as the seams do, and the
seams go on top: what they call as the original is the class that stands here.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.switch_layers import (
    QuantizedSwitchLinear,
    SwitchGLU,
    SwitchLinear,
    SwitchMLP,
)

from moe_lens.errors import UsageError

from .layer import MoELayer
from .segments import answered, multiplied

AUTO, STOCK, SEGMENTED = "auto", "stock", "segmented"


LIST_NOTE = (
    "the experts of this model are modules in a list, not one stack of weights, so they are "
    "computed as mlx-lm does (stock), not by segment"
)


def decide(asked: str, layers: Sequence[MoELayer] | None = None) -> str:
    """``stock`` or ``segmented``: what was asked for; of ``auto`` what is faster on this device.

    Args:
        asked: What was asked for.
        layers: Of the model, if it is known: experts in a list are ``stock`` (`LIST_NOTE`).

    Raises:
        UsageError: It is none of the three, or ``segmented`` where MLX computes on a GPU.
    """
    if asked not in (AUTO, STOCK, SEGMENTED):
        raise UsageError(f"experts are computed auto, stock or segmented, not {asked!r}")
    on_cpu = mx.default_device() == mx.cpu
    if asked == SEGMENTED and not on_cpu:
        raise UsageError(
            "experts are computed by segment on MLX's CPU backend only, and this is a GPU, whose "
            "own product of gathered weights is faster; use auto or stock"
        )
    possible = on_cpu and (layers is None or any(_switches(layers)))
    return SEGMENTED if possible and asked != STOCK else STOCK


def segment(layers: Iterable[MoELayer]) -> None:
    """Compute the experts of `layers` by segment from now on; a list of experts stays as it is."""
    _change(layers, _SEGMENTED)


def unsegment(layers: Iterable[MoELayer]) -> None:
    """Compute the experts of `layers` as mlx-lm does again."""
    _change(layers, {made: stock for stock, made in _SEGMENTED.items()})


def segmented(layers: Iterable[MoELayer]) -> bool:
    """Whether experts of `layers` are computed by segment."""
    return any(type(module) in _LINEAR for module in _switches(layers))


def _change(layers: Iterable[MoELayer], classes: dict[type, type]) -> None:
    for module in _modules(layers):
        made = classes.get(type(module))
        if made is not None:
            module.__class__ = made  # type: ignore[assignment]


def _modules(layers: Iterable[MoELayer]) -> list[nn.Module]:
    """The modules of the experts; none of experts in a list."""
    return [
        module for layer in layers if not layer.list_experts for module in layer.experts.modules()
    ]


def _switches(layers: Iterable[MoELayer]) -> list[nn.Module]:
    """The projections of the experts that hold the weights of all of them."""
    known = (SwitchLinear, QuantizedSwitchLinear)
    return [module for module in _modules(layers) if isinstance(module, known)]


class SegmentedSwitchLinear(SwitchLinear):
    """A SwitchLinear computed by segment."""

    def __call__(self, x: mx.array, indices: mx.array, sorted_indices: bool = False) -> mx.array:
        found = multiplied(self, x, indices)
        if found is None:
            return super().__call__(x, indices, sorted_indices)
        return _without_gradients(x, found)


class SegmentedQuantizedSwitchLinear(QuantizedSwitchLinear):
    """A QuantizedSwitchLinear computed by segment, unpacked one expert at a time."""

    def __call__(self, x: mx.array, indices: mx.array, sorted_indices: bool = False) -> mx.array:
        found = multiplied(self, x, indices)
        if found is None:
            return super().__call__(x, indices, sorted_indices)
        return _without_gradients(x, found)


class SegmentedSwitchGLU(SwitchGLU):
    """A SwitchGLU computed by segment."""

    def __call__(self, x: mx.array, indices: mx.array) -> mx.array:
        found = _answers(self, (self.up_proj, self.gate_proj), self.down_proj, x, indices)
        return super().__call__(x, indices) if found is None else found


class SegmentedSwitchMLP(SwitchMLP):
    """A SwitchMLP computed by segment."""

    def __call__(self, x: mx.array, indices: mx.array) -> mx.array:
        found = _answers(self, (self.fc1,), self.fc2, x, indices)
        return super().__call__(x, indices) if found is None else found


def _answers(
    experts: Any, before: Sequence[nn.Module], after: nn.Module, x: mx.array, ids: mx.array
) -> mx.array | None:
    """What a whole Switch module answers; None where mlx-lm's own code must run, step by step."""
    if x.shape[:-1] != ids.shape[:-1] or not all(type(each) in _LINEAR for each in before):
        return None
    call_after = type(after) not in _LINEAR
    found = answered(before, experts.activation, after, x, ids, call_after=call_after)
    return None if found is None else _without_gradients(x, found)


_found: Any = mx.custom_function(lambda x, found: found)


@_found.vjp
def _refuse(primals: Any, cotangents: Any, outputs: Any) -> Any:
    raise UsageError(
        "experts that are computed by segment give no gradients; set `cpu_experts` to stock"
    )


def _without_gradients(x: mx.array, found: mx.array) -> mx.array:
    """`found`, which NumPy made of `x`: MLX would take it for a constant, with gradients of 0."""
    kept: mx.array = _found(x, found)
    return kept


_LINEAR = (SegmentedSwitchLinear, SegmentedQuantizedSwitchLinear)
_SEGMENTED: dict[type, type] = {
    SwitchLinear: SegmentedSwitchLinear,
    QuantizedSwitchLinear: SegmentedQuantizedSwitchLinear,
    SwitchGLU: SegmentedSwitchGLU,
    SwitchMLP: SegmentedSwitchMLP,
}
