"""Muse Spark: routing and combination are Metal kernels of mlx-lm, called through its module.

The two kernel functions are wrapped while a layer is attached; the block's own class says which
layer is running. mlx-lm has no CPU path for them.
"""

from __future__ import annotations

import importlib
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from moe_lens.kernels import Rule

from .class_swap import call_original
from .declaration import Block
from .seams import Attachment

_running: list[Attachment] = []
"""The attachments whose blocks are running, innermost last."""


def _rule(block: Any) -> Rule:
    return Rule(
        "sigmoid_float32",
        multiplier=block.router_multiplier,
        selection_bias=block.gate.e_score_correction_bias,
        side="sorted",
        normalise="sum",
        epsilon=block.score_eps,
        scale=block.route_scale,
    )


def _attach(attachment: Attachment) -> None:
    layer = attachment.layer
    _wrap_kernels()

    def block(module: nn.Module, x: mx.array) -> mx.array:
        attachment.emit("router_inputs", x)
        _running.append(attachment)
        try:
            output: mx.array = call_original(module, x)
            return output
        finally:
            _running.pop()

    def experts(module: nn.Module, x: mx.array, ids: mx.array) -> mx.array:
        outputs = attachment.call_experts(module, x, ids)
        attachment.emit("expert_inputs", x)
        attachment.emit("expert_outputs", outputs)
        return outputs

    attachment.swap(layer.block, block)
    attachment.swap(layer.experts_module, experts)


def _wrap_kernels() -> None:
    """Let the two functions of mlx-lm's module pass through the running attachment.

    Outside an attached block they are what they were, so they stay wrapped.
    """
    module: Any = importlib.import_module("mlx_lm.models.muse_spark")
    if hasattr(module.expert_routing, "_moe_lens"):
        return
    native_routing, native_combine = module.expert_routing, module.post_expert_norm_combine

    def expert_routing(logits: mx.array, bias: mx.array, **kwargs: Any) -> Any:
        if not _running:
            return native_routing(logits, bias, **kwargs)
        attachment = _running[-1]
        attachment.emit("router_logits", logits)
        if attachment.changes is None:
            ids, weights = native_routing(logits, bias, **kwargs)
        else:
            ids, weights = attachment.route(logits, mx.float32)
        attachment.emit("expert_ids", ids)
        attachment.emit("expert_weights", weights)
        return ids, weights

    def post_expert_norm_combine(outputs: mx.array, weights: mx.array, **kwargs: Any) -> Any:
        routed = native_combine(outputs, weights, **kwargs)
        if _running:
            _running[-1].emit("routed_output", routed)
        return routed

    expert_routing._moe_lens = True  # type: ignore[attr-defined]
    module.expert_routing = expert_routing
    module.post_expert_norm_combine = post_expert_norm_combine


BLOCKS = (
    Block(
        "muse_spark",
        "MoE",
        _rule,
        logits="gate",
        k="top_k",
        experts="experts",
        seam="special",
        raw=True,
        float32_logits=True,
        selection_bias="gate.e_score_correction_bias",
        attach=_attach,
        experts_key="num_local_experts",
        not_written="the block's output is normed and gated channel by channel on its way into "
        "the stream, and so is the stream itself in every later layer",
        note="Metal only in mlx-lm; each expert output is normed before its weight, in a latent "
        "width, so the routed output is the sum of weights times normed outputs",
    ),
)
