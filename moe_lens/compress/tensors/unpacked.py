"""A quantised model computed from unpacked weights, where that is many times faster.

MLX's CPU backend multiplies packed weights one by one: on the bundled model a forward takes seven
times as long as with the same weights in float32. Every number is the same up to the order of
sums, so plans are tried on unpacked weights there. A GPU multiplies packed weights fast, and
unpacking would only take memory.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten
from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchLinear

from moe_lens.loading import compute_in_float32, load
from moe_lens.machine.facts import memory

from .quantisation import Quantisation
from .size import Size

if TYPE_CHECKING:
    from moe_lens.router import ExpertRouter

MEMORY_SHARE = 0.25
"""Of the available memory that the unpacked weights of one model may take."""


def unpacked(router: ExpertRouter) -> ExpertRouter:
    """A copy of `router` that computes from float32 weights; itself where that is not faster.

    It is itself on a GPU, where nothing is quantised, where the copy would not fit into a quarter
    of the available memory, and where the model is not from a folder that can be read again.
    """
    if router.path is None or not _worth_it(router.model):
        return router
    model, tokenizer, config, path = load(
        router.path, trust_remote_code=bool(router.config.get("model_file"))
    )
    compute_in_float32(model)
    unpack(model)
    return type(router)(model, tokenizer, config, name=router.name, path=path)


def unpack_if_faster(model: nn.Module) -> None:
    """Unpack the weights of a model in place, where that makes it faster and they fit."""
    if _worth_it(model):
        unpack(model)


def unpack(model: nn.Module, only: Collection[nn.Module] | None = None) -> None:
    """Replace quantised modules by plain ones with the same weights in float32, in place.

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
        mx.eval(model.parameters())


def _worth_it(model: nn.Module) -> bool:
    if mx.default_device() != mx.cpu:
        return False
    if not any(isinstance(each, _PACKED) for _, each in model.named_modules()):
        return False
    available = memory().available
    return available is not None and 4 * Size.of(model).parameters < MEMORY_SHARE * available


_PACKED = (nn.QuantizedLinear, nn.QuantizedEmbedding, QuantizedSwitchLinear)


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
