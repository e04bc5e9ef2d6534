"""Sigmoid scores, a bias for the selection only, and group-limited top-k.

DeepSeek-V3 (arXiv:2412.19437, eq. 12 to 16) and the many that follow it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from moe_lens.kernels import Groups, Rule, Score

from .declaration import Block, parameter, top2_groups

NEGATIVE_INFINITY = -float("inf")


def _deepseek_v3(epsilon: float = 0.0) -> Callable[[Any], Rule]:
    def rule(block: Any) -> Rule:
        gate = block.gate
        return Rule(
            "sigmoid_float32",
            selection_bias=gate.e_score_correction_bias,
            groups=top2_groups(gate),
            normalise="sum" if gate.norm_topk_prob else "no",
            normalise_from_k=2,
            epsilon=epsilon,
            scale=gate.routed_scaling_factor,
        )

    return rule


def _dots1(block: Any) -> Rule:
    gate = block.gate
    grouped = gate.n_group != gate.topk_group
    return Rule(
        "sigmoid_float32",
        selection_bias=gate.e_score_correction_bias,
        groups=Groups(gate.n_group, gate.topk_group) if grouped else None,
        normalise="sum" if gate.norm_topk_prob else "no",
        normalise_from_k=2,
        scale=gate.routed_scaling_factor,
    )


def _afmoe(block: Any) -> Rule:
    return Rule(
        _sigmoid_or_softmax(block.score_func),
        selection_bias=block.expert_bias,
        groups=top2_groups(block),
        normalise="sum" if block.route_norm else "no",
        normalise_from_k=2,
        scale=block.route_scale,
    )


def _bailing_hybrid(block: Any) -> Rule:
    gate = block.gate
    grouped = gate.n_group > gate.topk_group
    return Rule(
        _sigmoid_or_softmax(gate.score_function),
        selection_bias=parameter(gate, "expert_bias"),
        groups=Groups(gate.n_group, gate.topk_group, fill=NEGATIVE_INFINITY) if grouped else None,
        normalise="sum" if gate.norm_topk_prob else "no",
        normalise_from_k=2,
        epsilon=1e-20,
        scale=gate.routed_scaling_factor,
        cast="logits",
    )


def _bailing_moe_linear(block: Any) -> Rule:
    gate = block.gate
    return Rule(
        _sigmoid_or_softmax(gate.score_function),
        selection_bias=parameter(gate, "expert_bias"),
        groups=top2_groups(gate),
        normalise="sum" if gate.norm_topk_prob else "no",
        normalise_from_k=2,
        scale=gate.routed_scaling_factor,
        cast="logits",
    )


def _bailing_moe_v3(block: Any) -> Rule:
    gate = block.gate
    return Rule(
        "sigmoid_float32",
        selection_bias=gate.expert_bias,
        groups=Groups(gate.n_group, gate.topk_group, fill=NEGATIVE_INFINITY),
        normalise="sum",
        epsilon=1e-20,
        scale=gate.routed_scaling_factor,
    )


def _kimi(score: Callable[[Any], Score], cast: Any = "no") -> Callable[[Any], Rule]:
    def rule(block: Any) -> Rule:
        args = block.args
        grouped = args.num_expert_group > 1
        return Rule(
            score(args),
            selection_bias=block.e_score_correction_bias,
            bias_dtype="scores",
            groups=Groups(args.num_expert_group, args.topk_group) if grouped else None,
            normalise="sum" if args.moe_renormalize else "no",
            normalise_from_k=2,
            epsilon=1e-20,
            scale=args.routed_scaling_factor,
            cast=cast,
        )

    return rule


def _kimi_linear_score(args: Any) -> Score:
    return "sigmoid" if args.moe_router_activation_func == "sigmoid" else "softmax_precise"


def _sigmoid_or_softmax(name: str) -> Score:
    return "sigmoid_float32" if name == "sigmoid" else "softmax_float32"


def _gated(
    model_type: str,
    name: str,
    rule: Callable[[Any], Rule],
    *,
    experts: str = "switch_mlp",
    experts_key: str = "n_routed_experts",
    also: tuple[str, ...] = (),
    written: tuple[str, ...] = (),
    note: str = "",
) -> Block:
    """A block with DeepSeek-V3's `gate`: raw weight, correction bias, (ids, weights) returned."""
    return Block(
        model_type,
        name,
        rule,
        logits="gate",
        k="gate.top_k",
        experts=experts,
        seam="router",
        router="gate",
        raw=True,
        selection_bias="gate.e_score_correction_bias",
        shared="shared_experts",
        experts_key=experts_key,
        also=also,
        written=written,
        note=note,
    )


BLOCKS = (
    _gated(
        "deepseek_v3",
        "DeepseekV3MoE",
        _deepseek_v3(),
        also=("kimi_k2", "kimi_k25", "kimi_vl", "joyai_llm_flash"),
    ),
    _gated("deepseek_v32", "DeepseekV32MoE", _deepseek_v3(), also=("glm_moe_dsa",)),
    _gated("glm4_moe", "MoE", _deepseek_v3(), also=("solar_open",)),
    _gated("glm4_moe_lite", "Glm4MoeLiteMoE", _deepseek_v3(1e-20)),
    _gated("mimo_v2_flash", "MoE", _deepseek_v3(1e-20)),
    _gated("exaone_moe", "MoE", _deepseek_v3(1e-20), experts_key="num_experts"),
    _gated(
        "nemotron_h",
        "NemotronHMoE",
        _deepseek_v3(1e-20),
        written=("fc2_latent_proj",),
        note="experts may work in a latent width; the routed output is before the projection back",
    ),
    _gated("dots1", "Dots1MoE", _dots1, experts="experts"),
    Block(
        "afmoe",
        "AfmoeMoE",
        _afmoe,
        logits="router.gate",
        k="num_experts_per_tok",
        experts="experts",
        selection_bias="expert_bias",
        shared="shared_experts",
        written=("../post_mlp_layernorm",),
    ),
    Block(
        "bailing_hybrid",
        "SparseMoeBlock",
        _bailing_hybrid,
        logits="gate.gate_proj",
        k="gate.top_k",
        seam="router",
        router="gate",
        selection_bias="gate.expert_bias",
        shared="shared_experts",
    ),
    Block(
        "bailing_moe_linear",
        "SparseMoeBlock",
        _bailing_moe_linear,
        logits="gate.gate_proj",
        k="gate.top_k",
        seam="router",
        router="gate",
        selection_bias="gate.expert_bias",
        shared="shared_experts",
    ),
    Block(
        "bailing_moe_v3",
        "BailingSparseMoE",
        _bailing_moe_v3,
        logits="gate",
        k="gate.top_k",
        seam="router",
        router="gate",
        raw=True,
        float32_logits=True,
        selection_bias="gate.expert_bias",
        shared="shared_experts",
        note="chosen through `architectures` of a bailing_hybrid config",
    ),
    Block(
        "kimi_linear",
        "KimiSparseMoE",
        _kimi(_kimi_linear_score),
        logits="gate",
        k="args.num_experts_per_token",
        selection_bias="e_score_correction_bias",
        shared="shared_experts",
        k_key="num_experts_per_token",
    ),
    Block(
        "kimi_k3",
        "KimiK3SparseMoE",
        _kimi(lambda args: "sigmoid_float32", cast="logits"),
        logits="gate",
        k="args.num_experts_per_token",
        selection_bias="e_score_correction_bias",
        shared="shared_experts",
        written=("routed_expert_norm", "routed_expert_up_proj"),
        k_key="num_experts_per_token",
        note="experts may work in a latent width; the routed output is before the projection back",
    ),
)
