"""The sizes that all tiny models share, and the pieces of config.json that several of them repeat.

Every model has 8 experts of width 64 behind a hidden size of 64, 2 of them active, 2 to 4 layers
and a vocabulary of 128, so that one forward takes milliseconds on any CPU.
"""

from __future__ import annotations

from typing import Any

Config = dict[str, Any]

VOCAB, HIDDEN, DENSE, EXPERTS, ACTIVE, EXPERT_WIDTH = 128, 64, 96, 8, 2, 64

SHAPE: Config = dict(
    vocab_size=VOCAB,
    hidden_size=HIDDEN,
    intermediate_size=DENSE,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=512,
    rms_norm_eps=1e-6,
    rope_theta=10000.0,
)
"""Transformer keys under the names that most of the configurations use."""

EXPERTS_QWEN: Config = dict(
    num_experts=EXPERTS, num_experts_per_tok=ACTIVE, moe_intermediate_size=EXPERT_WIDTH
)
"""Experts under the key names of Qwen and its relatives."""

EXPERTS_DEEPSEEK: Config = dict(
    n_routed_experts=EXPERTS, num_experts_per_tok=ACTIVE, moe_intermediate_size=EXPERT_WIDTH
)
"""Experts under the key names of DeepSeek and its relatives."""

EXPERTS_MIXTRAL: Config = dict(num_local_experts=EXPERTS, num_experts_per_tok=ACTIVE)
"""Experts under the key names of Mixtral and its relatives (their width is intermediate_size)."""

GROUPS: Config = dict(n_group=4, topk_group=2)
"""Group-limited routing: 4 groups of 2 experts, of which 2 groups stay in the choice."""

LATENT_ATTENTION: Config = dict(
    q_lora_rank=32, kv_lora_rank=32, qk_rope_head_dim=16, qk_nope_head_dim=16, v_head_dim=16
)
"""Multi-head latent attention."""


def changed(base: Config, **changes: Any) -> Config:
    """A copy of ``base`` with some keys set, for a model that differs in a few keys only."""
    return {**base, **changes}


def without(base: Config, *keys: str) -> Config:
    """A copy of ``base`` that lacks ``keys``, where their mere presence would matter."""
    return {key: value for key, value in base.items() if key not in keys}
