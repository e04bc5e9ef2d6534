"""Sigmoid (or sqrt-softplus) scores, a bias for the selection only, the k best, normalised.

The selection bias balances the load without an auxiliary loss (arXiv:2408.15664).
"""

from __future__ import annotations

from typing import Any

from moe_lens.kernels import Rule, Score

from .declaration import Block, parameter


def _klear(block: Any) -> Rule:
    return Rule(
        "sigmoid_float32",
        selection_bias=block.expert_bias,
        normalise="sum" if block.norm_topk_prob else "no",
        cast="input",
    )


def _lfm2(block: Any) -> Rule:
    return Rule(
        "sigmoid",
        selection_bias=parameter(block, "expert_bias"),
        side="high",
        normalise="sum" if block.norm_topk_prob else "no",
        epsilon=1e-6,
        scale=block.routed_scaling_factor,
        cast="input",
    )


def _minimax(block: Any) -> Rule:
    return Rule(
        "sigmoid",
        selection_bias=block.e_score_correction_bias,
        normalise="sum",
        epsilon=1e-20,
        cast="input",
    )


def _minimax_m3(block: Any) -> Rule:
    return Rule(
        "sigmoid_float32",
        selection_bias=block.e_score_correction_bias,
        normalise="sum",
        epsilon=1e-20,
        scale=block.routed_scaling_factor,
        cast="input",
    )


def _step3p5(block: Any) -> Rule:
    return Rule(
        "sigmoid_float32",
        selection_bias=block.gate.router_bias,
        normalise="sum" if block.gate.norm_topk_prob else "no",
        epsilon=1e-20,
        scale=block.gate.routed_scaling_factor,
    )


def _laguna(block: Any) -> Rule:
    scores: dict[str, Score] = {
        "sigmoid": "sigmoid_float32",
        "sqrtsoftplus": "sqrt_softplus_float32",
    }
    return Rule(
        scores[block.gate.score_func],
        softcap=block.gate.softcap,
        selection_bias=block.gate.e_score_correction_bias,
        normalise="sum",
    )


def _deepseek_v41(block: Any) -> Rule:
    gate = block.gate
    scores: dict[str, Score] = {"sigmoid": "sigmoid_float32", "softmax": "softmax_float32"}
    return Rule(
        scores.get(gate.score_func, "sqrt_softplus_float32"),
        temperature=gate.gate_temp,
        selection_bias=gate.e_score_correction_bias,
        normalise="sum" if gate.norm_topk_prob else "no",
        normalise_from_k=2,
        epsilon=1e-20,
        scale=gate.route_scale,
    )


BLOCKS = (
    Block(
        "Klear",
        "KlearSparseMoeBlock",
        _klear,
        logits="gate",
        k="top_k",
        experts="experts",
        selection_bias="expert_bias",
        shared="shared_experts",
        note="routed and shared outputs are mixed by softmax(coefficient(x))",
    ),
    Block(
        "lfm2_moe",
        "Lfm2MoeSparseMoeBlock",
        _lfm2,
        logits="gate",
        k="top_k",
        selection_bias="expert_bias",
    ),
    Block(
        "minimax",
        "MiniMaxSparseMoeBlock",
        _minimax,
        logits="gate",
        k="num_experts_per_tok",
        float32_logits=True,
        selection_bias="e_score_correction_bias",
        experts_key="num_local_experts",
        also=("minimax_m2",),
    ),
    Block(
        "minimax_m3_vl",
        "SparseMoeBlock",
        _minimax_m3,
        logits="gate",
        k="num_experts_per_tok",
        selection_bias="e_score_correction_bias",
        shared="shared_experts",
        experts_key="num_local_experts",
    ),
    Block(
        "step3p5",
        "Step3p5MoE",
        _step3p5,
        logits="gate.gate",
        k="gate.top_k",
        seam="router",
        router="gate",
        selection_bias="gate.router_bias",
        shared="share_expert",
        experts_key="moe_num_experts",
        k_key="moe_top_k",
    ),
    Block(
        "laguna",
        "MoE",
        _laguna,
        logits="gate.proj",
        k="gate.top_k",
        seam="router",
        router="gate",
        selection_bias="gate.e_score_correction_bias",
        shared="shared_expert",
        note="the block scales the routed output, after the sum, by routed_scaling_factor",
    ),
    Block(
        "deepseek_v41",
        "MoE",
        _deepseek_v41,
        logits="gate",
        k="gate.top_k",
        experts="experts.switch_mlp",
        seam="router",
        router="gate",
        raw=True,
        float32_logits=True,
        selection_bias="gate.e_score_correction_bias",
        shared="shared_experts",
        routed="experts",
        experts_key="n_routed_experts",
        also=("deepseek_v41_text",),
    ),
)
