"""Second configurations of a model type that take another branch of its router or its block."""

from __future__ import annotations

from tiny_models.sizes import Config

NO_GROUPS: Config = dict(n_group=1, topk_group=1)

VARIANTS: dict[str, Config] = {
    "Klear/nonorm": dict(norm_topk_prob=False),
    "afmoe/softmax_nogroup": dict(NO_GROUPS, score_func="softmax"),
    "bailing_hybrid/nogroup": NO_GROUPS,
    "bailing_moe/softmax_nobias": dict(
        NO_GROUPS, score_function="softmax", moe_router_enable_expert_bias=False
    ),
    "bailing_moe_linear/softmax": dict(
        NO_GROUPS, score_function="softmax", moe_router_enable_expert_bias=False
    ),
    "deepseek_v2/greedy": dict(topk_method="greedy", n_group=None, topk_group=None),
    "deepseek_v3/nogroup": NO_GROUPS,
    "deepseek_v3/noshared": dict(n_shared_experts=None),
    "deepseek_v41/softmax": dict(scoring_func="softmax", gate_temp=1.7),
    "ernie4_5_moe/sigmoid": dict(moe_gate_act="sigmoid", use_bias=True),
    "kimi_linear/softmax": dict(
        moe_router_activation_func="softmax", num_expert_group=1, topk_group=1
    ),
    "laguna/sqrtsoftplus": dict(
        moe_router_score_func="sqrtsoftplus", moe_router_logit_softcapping=0.0
    ),
    "lfm2_moe/nobias": dict(use_expert_bias=False, norm_topk_prob=False),
    "longcat_flash/norm_bias": dict(norm_topk_prob=True, router_bias=True),
    "mistral4/nogroup": dict(NO_GROUPS, norm_topk_prob=False),
    "nemotron_h/nolatent": dict(NO_GROUPS, moe_latent_size=None),
    "olmoe/norm": dict(norm_topk_prob=True, mlp_bias=True),
    "qwen3_moe/nonorm": dict(norm_topk_prob=False),
    "step3p5/clamped": dict(swiglu_limits=[0, 7.0, 7.0], swiglu_limits_shared=[0, 5.0, 0]),
}
"""``model/what`` -> the keys that differ from ``model``."""
