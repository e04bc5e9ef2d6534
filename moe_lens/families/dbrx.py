"""DBRX: a Python list of experts, called token by token.

The block's own forward runs untouched; each expert of the list is observed. When the routing is
overridden, the block's few lines are run here with the new ids and weights, in the same order.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn

from moe_lens.kernels import Rule

from .class_swap import call_original
from .declaration import Block
from .seams import Attachment, SeamError


def _rule(block: Any) -> Rule:
    return Rule("softmax_float32", normalise="l1", cast="input")


def _attach(attachment: Attachment) -> None:
    layer = attachment.layer
    called: list[tuple[int, mx.array]] = []

    def block(module: nn.Module, x: mx.array) -> mx.array:
        flat = x.reshape(-1, x.shape[-1])
        logits = layer.logits(flat)
        called.clear()
        if attachment.changes is None:
            output: mx.array = call_original(module, x)
            ids = mx.array([expert for expert, _ in called]).reshape(len(flat), -1)
            _, weights = layer.route(logits, x.dtype, ids=ids)
            if attachment.verifying:
                _verify(layer.path, output, called, weights)
        else:
            ids, weights = attachment.route(logits, x.dtype)
            output = _combine(module, flat, ids, weights).reshape(x.shape)
        attachment.emit("router_inputs", flat)
        attachment.emit("router_logits", logits)
        attachment.emit("expert_inputs", flat)
        attachment.emit("expert_ids", ids)
        attachment.emit("expert_weights", weights)
        if attachment.wants("expert_outputs"):
            outputs = mx.stack([output for _, output in called]).reshape(*ids.shape, -1)
            attachment.emit("expert_outputs", outputs)
        attachment.channels.emit_listed(ids.shape)
        called.clear()
        attachment.emit("routed_output", output)
        return output

    def observe(index: int, module: nn.Module) -> None:
        def expert(module: nn.Module, x: mx.array) -> mx.array:
            output: mx.array = call_original(module, x)
            called.append((index, output))
            return output

        attachment.swap(module, expert)

    attachment.swap(layer.block, block)
    for index, module in enumerate(layer.experts):
        observe(index, module)


def _verify(
    path: str, output: mx.array, called: list[tuple[int, mx.array]], weights: mx.array
) -> None:
    """The weights of the rule, times the outputs the block asked for, are its own output."""
    outputs = mx.stack([out for _, out in called]).reshape(*weights.shape, -1)
    summed = (outputs.swapaxes(-1, -2) * weights[:, None, :]).sum(axis=-1)
    if not bool(mx.array_equal(summed, output.reshape(summed.shape))):
        raise SeamError(f"{path} does not weigh its experts by the rule of its family")


def _combine(block: Any, x: mx.array, ids: mx.array, weights: mx.array) -> mx.array:
    """The block's own loop: each token's experts, stacked, times their weights, summed."""
    outputs = []
    chosen_by_token: Any = ids.tolist()
    for token, weight, chosen in zip(x, weights, chosen_by_token, strict=True):
        stacked = mx.stack([block.experts[expert](token) for expert in chosen], axis=-1)
        outputs.append((stacked * weight).sum(axis=-1))
    return mx.stack(outputs, axis=0)


BLOCKS = (
    Block(
        "dbrx",
        "SparseMoeBlock",
        _rule,
        logits="router.layer",
        k="num_experts_per_tok",
        experts="experts",
        seam="special",
        attach=_attach,
        experts_key="moe_num_experts",
        k_key="moe_top_k",
        note="experts are a Python list that mlx-lm walks token by token: slow for long prompts",
    ),
)
