"""The k best logits, then softmax over the chosen alone (Mixtral, arXiv:2401.04088, eq. 2)."""

from __future__ import annotations

from typing import Any

from moe_lens.kernels import Rule

from .declaration import Block


def _low(block: Any) -> Rule:
    return Rule("identity", score_chosen="softmax_precise")


def _high(block: Any) -> Rule:
    return Rule("identity", score_chosen="softmax_precise", side="high")


def _granite(block: Any) -> Rule:
    return Rule("identity", score_chosen="softmax_float32", side="high")


BLOCKS = (
    Block(
        "mixtral",
        "MixtralSparseMoeBlock",
        _low,
        logits="gate",
        k="num_experts_per_tok",
        experts_key="num_local_experts",
    ),
    Block(
        "phixtral",
        "MOE",
        _low,
        logits="gate",
        k="num_experts_per_tok",
        also=("phi-msft",),
        experts_key="num_local_experts",
    ),
    Block(
        "jamba",
        "JambaSparseMoeBlock",
        _low,
        logits="router",
        k="num_experts_per_tok",
        note="one expert only makes mlx-lm build a dense layer",
    ),
    Block(
        "gpt_oss",
        "MLPBlock",
        _high,
        logits="router",
        k="num_experts_per_tok",
        experts="experts",
        experts_key="num_local_experts",
        note="router and experts have biases",
    ),
    Block(
        "granitemoe",
        "GraniteMoeMoE",
        _granite,
        logits="router.layer",
        k="router.top_k",
        seam="router",
        router="router",
        experts_key="num_local_experts",
    ),
    Block(
        "granitemoehybrid",
        "GraniteMoeHybridMoE",
        _high,
        logits="router.layer",
        k="router.top_k",
        seam="router",
        router="router",
        experts_key="num_local_experts",
        shared="../shared_mlp",
        note="the decoder layer, not the block, adds the shared expert",
    ),
)
