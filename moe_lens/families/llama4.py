"""Llama 4: one expert, and its sigmoid weight multiplies the experts' *input*.

The block's own code holds for one expert per token only; with another k its experts run once
for each slot here and their outputs are added.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn

from moe_lens.kernels import Rule, route

from .class_swap import call_original
from .declaration import Block
from .seams import Attachment, SeamError, observe_gate


def _rule(block: Any) -> Rule:
    return Rule("identity", score_chosen="sigmoid_float32", cast="input")


def _attach(attachment: Attachment) -> None:
    layer = attachment.layer
    observe_gate(attachment)

    def experts(module: nn.Module, scaled: mx.array, ids: mx.array) -> mx.array:
        logits, x = attachment.logits, attachment.block_input
        assert logits is not None and x is not None
        attachment.emit("expert_inputs", x)
        if attachment.changes is None:
            outputs = attachment.call_experts(module, scaled, ids)
            _, weights = route(layer.rule(), logits, 1, input_dtype=x.dtype, ids=ids)
            routed = outputs
            if attachment.verifying and not bool(mx.array_equal(scaled, x * weights)):
                raise SeamError(f"{layer.path} does not scale its input by the weights of its rule")
        else:
            ids, weights = attachment.route(logits, x.dtype)
            slots = [
                call_original(module, x * weights[..., slot, None], ids[..., slot, None])
                for slot in range(ids.shape[-1])
            ]
            outputs = mx.concatenate(slots, axis=-2)
            routed = outputs.sum(axis=-2, keepdims=True)
        attachment.emit("expert_ids", ids)
        attachment.emit("expert_weights", weights)
        attachment.emit("expert_outputs", outputs)
        if attachment.wants("routed_output"):
            attachment.emit("routed_output", routed.squeeze(-2))
        return routed

    attachment.swap(layer.experts_module, experts)


BLOCKS = (
    Block(
        "llama4",
        "MoE",
        _rule,
        logits="router",
        k="top_k",
        experts="experts",
        seam="special",
        shared="shared_expert",
        weights_on_input=True,
        attach=_attach,
        experts_key="num_local_experts",
        note="weights multiply the experts' input: expert outputs carry them already",
    ),
)
