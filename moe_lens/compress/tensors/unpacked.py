"""A model as it runs fastest here: packed weights unpacked, experts computed by segment.

MLX's CPU backend multiplies packed weights one by one: on the bundled model a forward takes seven
times as long as with the same weights in float32. It multiplies the weights of experts row by row,
packed or not, which takes several times as long as by segment (`RoutedModel.cpu_experts`). Every
number is the same up to the order of sums. A GPU does both fast, and unpacking would only take
memory.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten
from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchLinear

from moe_lens.experts.quantisation import Quantisation
from moe_lens.families import AUTO, STOCK, decide
from moe_lens.machine.facts import memory

if TYPE_CHECKING:
    from moe_lens.router import ExpertRouter

MEMORY_SHARE = 0.25
"""Of the available memory that the unpacked weights of one model may take."""


def fastest(router: ExpertRouter, cpu_experts: str = AUTO) -> ExpertRouter:
    """A copy of `router` that runs as fast as it can here; itself where it does already.

    What is not unpacked is shared with `router`, which stays as it is.

    Args:
        router: The model.
        cpu_experts: How its experts are computed: ``stock``, ``segmented``, or ``auto``.

    Raises:
        UsageError: ``segmented`` on a GPU.
    """
    how = decide(cpu_experts)
    if how == router.cpu_experts and not _packed(router.model, _worth_unpacking(router)):
        return router
    copy = router.twin()
    run_fastest(copy, how)
    return copy


def run_fastest(router: ExpertRouter, how: str) -> None:
    """Make `router` itself run as fast as it can here, with its experts computed as `how` says.

    The layers of a model that is streamed are unpacked when they are read.
    """
    router.cpu_experts = STOCK
    kinds = _worth_unpacking(router)
    if _packed(router.model, kinds):
        router.change_modules(lambda model: unpack(model, _packed(model, kinds)))
        if not router.streamed:
            mx.eval(router.model.parameters())
    router.cpu_experts = how


def unpack(model: nn.Module, only: Collection[nn.Module] | None = None) -> None:
    """Replace quantised modules by plain ones with the same weights in float32, in place, lazily.

    Modules that scale all of a weight by one more number, and kinds that mlx-lm has for single
    architectures, stay packed.

    Args:
        model: The model.
        only: Modules of it; None for all.
    """
    wanted = None if only is None else {id(module) for module in only}
    plain = [
        (name, new)
        for name, old in model.named_modules()
        if (wanted is None or id(old) in wanted) and (new := _plain(old)) is not None
    ]
    if plain:
        model.update_modules(tree_unflatten(plain))


def _worth_unpacking(router: ExpertRouter) -> tuple[type, ...]:
    """The kinds of packed modules that run faster unpacked, as far as they fit.

    All of them, or all but the experts, which may be many times larger.
    """
    available = memory().available
    if mx.default_device() != mx.cpu or available is None:
        return ()
    for kinds in (_PACKED, tuple(kind for kind in _PACKED if kind is not QuantizedSwitchLinear)):
        if _unpacked_bytes(router, kinds) < MEMORY_SHARE * available:
            return kinds
    return ()


def _packed(model: nn.Module, kinds: tuple[type, ...]) -> list[nn.Module]:
    return [module for module in model.modules() if isinstance(module, kinds)]


def _unpacked_bytes(router: ExpertRouter, kinds: tuple[type, ...]) -> int:
    """What these modules take unpacked; of a streamed model one layer is there at a time."""

    def size(model: nn.Module) -> int:
        return sum(4 * each.scales.size * each.group_size for each in _packed(model, kinds))

    total = size(router.model)
    if not router.streamed:
        return total
    layers = [size(layer) for layer in router.model.layers]
    return total - sum(layers) + max(layers)


_PACKED = (nn.QuantizedLinear, nn.QuantizedEmbedding, QuantizedSwitchLinear)


def packed_modules(model: nn.Module) -> int:
    """How many modules compute from packed weights, which decides how numbers are rounded."""
    return sum(isinstance(module, _PACKED) for module in model.modules())


def _plain(module: nn.Module) -> nn.Module | None:
    if type(module) not in _PACKED or "global_scale" in module:
        return None
    packed = Quantisation.of(module)
    assert packed is not None
    weight = mx.dequantize(
        module.weight,
        module.scales,
        module.get("biases"),
        packed.group_size,
        packed.bits,
        packed.mode,
        dtype=mx.float32,
    )
    made: nn.Module
    if isinstance(module, nn.QuantizedEmbedding):
        made = nn.Embedding(1, 1)
    elif isinstance(module, nn.QuantizedLinear):
        made = nn.Linear(1, 1, bias="bias" in module)
    else:
        made = SwitchLinear(1, 1, 1, bias="bias" in module)
    made.weight = weight
    if "bias" in module:
        made.bias = module.bias
    return made
