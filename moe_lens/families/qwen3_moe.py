"""Softmax over all experts, then the k best, renormalised where the config says so.

Qwen1.5/2/3-MoE (arXiv:2505.09388), OLMoE (arXiv:2409.02060), DeepSeekMoE (arXiv:2401.06066).
"""

from __future__ import annotations

from typing import Any

import mlx.nn as nn

from moe_lens.kernels import Rule

from .declaration import Block


def _low(block: Any) -> Rule:
    return Rule("softmax_precise", normalise=_sum(block))


def _high(block: Any) -> Rule:
    return Rule("softmax_precise", side="high", normalise=_sum(block))


def _sum(block: Any) -> Any:
    return "sum" if getattr(block, "norm_topk_prob", False) else "no"


def _plain(block: Any) -> Rule:
    return Rule("softmax_precise")


def _ernie(block: Any) -> Rule:
    return Rule(
        "sigmoid_float32" if isinstance(block.gate_act, nn.Sigmoid) else "softmax_float32",
        normalise="sum_floor",
        epsilon=1e-12,
    )


BLOCKS = (
    Block(
        "qwen2_moe",
        "Qwen2MoeSparseMoeBlock",
        _plain,
        logits="gate",
        k="top_k",
        shared="shared_expert",
        note="the shared expert is gated by sigmoid(shared_expert_gate)",
    ),
    Block(
        "qwen3_moe",
        "Qwen3MoeSparseMoeBlock",
        _high,
        logits="gate",
        k="top_k",
        also=("qwen3_vl_moe",),
    ),
    Block(
        "qwen3_next",
        "Qwen3NextSparseMoeBlock",
        _high,
        logits="gate",
        k="top_k",
        shared="shared_expert",
        also=("qwen3_5", "qwen3_5_moe"),
        note="the shared expert is gated by sigmoid(shared_expert_gate)",
    ),
    Block("mellum", "MellumSparseMoeBlock", _high, logits="gate", k="top_k"),
    Block("olmoe", "OlmoeSparseMoeBlock", _low, logits="gate", k="top_k"),
    Block(
        "hunyuan",
        "MoeBlock",
        _plain,
        logits="gate.wg",
        k="top_k",
        shared="shared_mlp",
        k_key="moe_topk",
        note="one expert only makes mlx-lm build a dense layer",
    ),
    Block(
        "ernie4_5_moe",
        "Ernie4_5_MoeMLP",
        _ernie,
        logits="gate",
        k="k",
        shared="shared_experts",
        experts_key="moe_num_experts",
        k_key="moe_k",
    ),
    Block(
        "deepseek",
        "DeepseekMoE",
        _plain,
        logits="gate",
        k="gate.top_k",
        seam="router",
        router="gate",
        raw=True,
        shared="shared_experts",
        experts_key="n_routed_experts",
    ),
)
