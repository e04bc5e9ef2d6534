"""Checkpoints of random weights that benchmarks make for themselves: their config and tokenizer."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from moe_lens.demo import model_path


def qwen3_moe_config(
    *,
    layers: int,
    hidden: int,
    width: int,
    experts: int,
    active: int,
    vocabulary: int,
    heads: tuple[int, int, int],
) -> dict[str, Any]:
    """config.json of a Qwen3-MoE whose layers all have experts.

    Args:
        layers: Of the model.
        hidden: Size of the hidden states.
        width: Channels of an expert.
        experts: In each layer.
        active: Per token.
        vocabulary: Tokens.
        heads: Of the queries, of keys and values, and the size of each.
    """
    return {
        "model_type": "qwen3_moe",
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "intermediate_size": 2 * hidden,
        "num_attention_heads": heads[0],
        "num_key_value_heads": heads[1],
        "head_dim": heads[2],
        "vocab_size": vocabulary,
        "num_experts": experts,
        "num_experts_per_tok": active,
        "moe_intermediate_size": width,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "norm_topk_prob": True,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": False,
    }


def copy_tokenizer(folder: Path) -> None:
    """The demo's tokenizer, for a model of at least as many tokens."""
    for file in model_path().glob("*token*"):
        shutil.copyfile(file, folder / file.name)
