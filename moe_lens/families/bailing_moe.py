"""Bailing (Ling) MoE: grouped sigmoid or softmax, combined by a function that mlx-lm compiles.

``aggregate_expert_outputs`` takes arrays only, so no stand-in can pass through it, and with one
expert per token its shapeless graph crashes MLX's CPU backend (0.32.4): one slot of weight 0
is added there.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn

from moe_lens.kernels import Rule

from .class_swap import call_original
from .declaration import Block, parameter, top2_groups
from .layer import MoELayer
from .seams import Attachment


def _rule(block: Any) -> Rule:
    gate = block.gate
    return Rule(
        "sigmoid_float32" if gate.score_function == "sigmoid" else "softmax_float32",
        selection_bias=parameter(gate, "expert_bias"),
        groups=top2_groups(gate),
        side="high",
        normalise="sum" if gate.norm_topk_prob else "no",
        normalise_from_k=2,
        epsilon=1e-20,
        scale=gate.routed_scaling_factor,
        cast="logits",
    )


def _attach(attachment: Attachment) -> None:
    layer = attachment.layer
    chosen: dict[str, mx.array] = {}

    def router(module: nn.Module, x: mx.array) -> tuple[mx.array, mx.array]:
        if attachment.wants("router_logits"):
            attachment.emit("router_logits", layer.logits(x))
        attachment.emit("router_inputs", x)
        if attachment.changes is None:
            ids, weights = call_original(module, x)
        else:
            ids, weights = attachment.route(layer.logits(x), x.dtype)
        attachment.emit("expert_ids", ids)
        attachment.emit("expert_weights", weights)
        chosen["weights"] = weights
        return _fill_slots(layer, ids, weights)

    def experts(module: nn.Module, x: mx.array, ids: mx.array) -> mx.array:
        outputs = attachment.call_experts(module, x, ids)
        weights = chosen.pop("weights")
        real = outputs[..., : weights.shape[-1], :]
        attachment.emit("expert_inputs", x)
        attachment.emit("expert_outputs", real)
        if attachment.wants("routed_output"):
            # What the compiled sum computes, by the same operations.
            routed = (real * weights[..., None]).sum(axis=-2).astype(outputs.dtype)
            attachment.emit("routed_output", routed)
        return outputs

    attachment.swap(layer.router_module, router)
    attachment.swap(layer.experts_module, experts)


def _fill_slots(layer: MoELayer, ids: mx.array, weights: mx.array) -> tuple[mx.array, mx.array]:
    """Slots of weight 0 where the block cannot combine as few experts as were chosen."""
    missing = layer.family.smallest_k - ids.shape[-1]
    if missing <= 0:
        return ids, weights
    width = [(0, 0)] * (ids.ndim - 1) + [(0, missing)]
    return mx.pad(ids, width, mode="edge"), mx.pad(weights, width)


BLOCKS = (
    Block(
        "bailing_moe",
        "BailingMoeSparseMoeBlock",
        _rule,
        logits="gate.gate_proj",
        k="gate.top_k",
        seam="special",
        router="gate",
        selection_bias="gate.expert_bias",
        shared="shared_experts",
        smallest_k=2,
        attach=_attach,
        note="the routed output is summed again by the block's own formula (the sum is compiled)",
    ),
)
