"""Gemma 4: the k best logits of a normed input, softmax, and a learned scale for each expert.

Router and experts stand beside a dense MLP in the decoder layer, which is the block here.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx

from moe_lens.kernels import Rule

from .declaration import Block


def _rule(block: Any) -> Rule:
    return Rule(
        "identity",
        score_chosen="softmax",
        side="high",
        per_expert_scale=block.router.per_expert_scale,
    )


def _router_input(block: Any, x: mx.array) -> mx.array:
    router = block.router
    return mx.fast.rms_norm(x, router.scale * router._root_size, router.eps)


BLOCKS = (
    Block(
        "gemma4_text",
        "DecoderLayer",
        _rule,
        logits="router.proj",
        k="router.config.top_k_experts",
        experts="experts.switch_glu",
        seam="router",
        router="router",
        router_input=_router_input,
        per_expert_scale="router.per_expert_scale",
        shared="mlp",
        routed="experts",
        written=("post_feedforward_layernorm_2", "post_feedforward_layernorm"),
        also=("gemma4", "gemma4_unified"),
        k_key="top_k_experts",
        note="the dense MLP that runs beside the experts stands for the shared expert",
    ),
)
