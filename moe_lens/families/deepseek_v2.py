"""Softmax scores and group-limited top-k (DeepSeek-V2, arXiv:2405.04434, section 2.2.2)."""

from __future__ import annotations

from typing import Any

from moe_lens.kernels import Groups, Rule

from .declaration import Block


def _deepseek_v2(block: Any) -> Rule:
    gate = block.gate
    grouped = gate.topk_method == "group_limited_greedy"
    return Rule(
        "softmax_precise",
        groups=Groups(gate.n_group, gate.topk_group, "max", zero_scores=True) if grouped else None,
        scale=gate.routed_scaling_factor,
    )


def _mistral4(block: Any) -> Rule:
    args = block.args
    return Rule(
        "softmax_float32",
        groups=Groups(args.n_group, args.topk_group) if args.n_group > 1 else None,
        normalise="sum" if args.norm_topk_prob else "no",
        epsilon=1e-20,
        scale=args.routed_scaling_factor,
    )


BLOCKS = (
    Block(
        "deepseek_v2",
        "DeepseekV2MoE",
        _deepseek_v2,
        logits="gate",
        k="gate.top_k",
        seam="router",
        router="gate",
        raw=True,
        shared="shared_experts",
        experts_key="n_routed_experts",
    ),
    Block(
        "mistral4",
        "Mistral4MoE",
        _mistral4,
        logits="gate",
        k="num_experts_per_tok",
        shared="shared_experts",
        experts_key="n_routed_experts",
        also=("mistral3",),
    ),
)
