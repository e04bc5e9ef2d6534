"""Capture for a block class that no family declares.

Any block that multiplies the output of a ``SwitchGLU`` or ``SwitchMLP`` by its own weights and
sums can be watched by the expert seam alone. Its rule is not known, so nothing is overridden.
"""

from __future__ import annotations

from typing import Any

import mlx.nn as nn

from moe_lens.kernels import Rule

from .declaration import OVERRIDES, Block
from .layer import MoELayer, enclosing
from .seams import Attachment, observe_experts

NO_RULE = "the block's routing rule is not known to moe-lens; only capture works"
NO_PATH = "what stands between this unknown block and the stream is not declared"


def _rule(block: Any) -> Rule:
    raise ValueError(NO_RULE)


def _attach(attachment: Attachment) -> None:
    observe_experts(attachment)


def unknown_block(model_type: str, block: nn.Module, experts: str) -> Block:
    """A declaration for `block`, whose Switch module is its child `experts`."""
    return Block(
        model_type,
        type(block).__name__,
        _rule,
        logits="",
        k="",
        experts=experts,
        seam="inline",
        attach=_attach,
        not_written=NO_PATH,
        without={"router_logits": NO_RULE, "router_inputs": NO_RULE, "shared_output": NO_RULE}
        | dict.fromkeys(OVERRIDES, NO_RULE),
        note="unknown architecture: ids, weights and outputs by the expert seam alone",
    )


def find_unknown(model: nn.Module, known: set[str]) -> list[MoELayer]:
    """MoE layers of undeclared block classes: every Switch module below no path of `known`."""
    from mlx_lm.models.switch_layers import SwitchGLU, SwitchMLP

    modules = dict(model.named_modules())
    layers = []
    for path, module in modules.items():
        if not isinstance(module, SwitchGLU | SwitchMLP):
            continue
        owner, _, name = path.rpartition(".")
        if any(path.startswith(f"{block}.") for block in known):
            continue
        block = modules[owner]
        parent = enclosing(modules, owner)
        index = next((int(part) for part in path.split(".") if part.isdigit()), -1)
        model_type = type(block).__module__.rpartition(".")[2]
        declaration = unknown_block(model_type, block, name)
        layers.append(MoELayer(index, owner, block, parent, declaration))
    return layers
