"""The network of the demo model and a faster forward pass for training it on a CPU.

The model is mlx_lm's own ``qwen3_moe``; nothing of it is redefined. Only while training, the
forward pass of the mixture-of-experts block is exchanged for one that computes the same function
with one batched matrix product over all experts, and that keeps what the balance loss needs.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm.models.activations import swiglu
from mlx_lm.models.qwen3_moe import Model, ModelArgs, Qwen3MoeSparseMoeBlock

from moe_lens.demo.tokenizer import END_OF_TEXT_ID, VOCABULARY

LAYERS = 4
DENSE_LAYERS = (0,)
HIDDEN = 128
BALANCE_WEIGHT = 0.01
ROUTER_Z_WEIGHT = 1e-4

Weights = dict[str, mx.array]
"""Parameters by their full name, such as ``model.layers.1.mlp.gate.weight``."""


def configuration(experts: int, top_k: int) -> dict[str, Any]:
    """The ``config.json`` of a stage: the stages differ in nothing but experts and top-k.

    The first layer is dense, as in several large models: a routed first layer sees little more
    than the token itself and would carry most of the damage of any pruning. The router's
    probabilities are not renormalised over the chosen experts, since with one expert per token a
    renormalised weight is always 1 and gives the router no gradient.
    """
    return {
        "model_type": "qwen3_moe",
        "architectures": ["Qwen3MoeForCausalLM"],
        "hidden_size": HIDDEN,
        "num_hidden_layers": LAYERS,
        "intermediate_size": 384,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "num_experts": experts,
        "num_experts_per_tok": top_k,
        "norm_topk_prob": False,
        "moe_intermediate_size": 192,
        "decoder_sparse_step": 1,
        "mlp_only_layers": list(DENSE_LAYERS),
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "vocab_size": VOCABULARY,
        "tie_word_embeddings": True,
        "max_position_embeddings": 512,
        "bos_token_id": None,
        "eos_token_id": END_OF_TEXT_ID,
        "torch_dtype": "float32",
    }


def build(config: dict[str, Any]) -> Model:
    """An untrained model of a configuration."""
    return Model(ModelArgs.from_dict(config))


def moe_blocks(model: Model) -> dict[int, Qwen3MoeSparseMoeBlock]:
    """The routed blocks by layer number."""
    return {
        number: layer.mlp
        for number, layer in enumerate(model.layers)
        if isinstance(layer.mlp, Qwen3MoeSparseMoeBlock)
    }


def flat_weights(model: Model) -> Weights:
    """All parameters of a model by name, in the order of the parameter tree."""
    pairs: Any = tree_flatten(model.parameters())
    return dict(pairs)


def initialise(model: Model) -> None:
    """Small router weights, and residual branches scaled by 1/sqrt(2 x layers) as in GPT-2.

    A router that starts almost uniform lets the balance loss spread the tokens before any expert
    has a lead.
    """
    scale = 1 / math.sqrt(2 * LAYERS)
    for layer in model.layers:
        layer.self_attn.o_proj.weight = layer.self_attn.o_proj.weight * scale
        if isinstance(layer.mlp, Qwen3MoeSparseMoeBlock):
            layer.mlp.gate.weight = mx.random.normal(layer.mlp.gate.weight.shape) * 0.02
            down = layer.mlp.switch_mlp.down_proj
        else:
            down = layer.mlp.down_proj
        down.weight = down.weight * scale
    mx.eval(model.parameters())


@dataclass
class RouterLosses:
    """Sums over the routed layers of one forward pass."""

    layers: int = 0
    balance: mx.array | float = 0.0
    z: mx.array | float = 0.0

    def add(self, logits: mx.array, probabilities: mx.array, counts: mx.array) -> None:
        """Add one layer: logits and probabilities (tokens, experts), assignments per expert.

        Balance is Switch Transformer's (arXiv:2101.03961, eq. 4), experts x sum_e f_e P_e with
        f_e the share of assignments and P_e the mean probability, 1 when uniform. z is ST-MoE's
        (arXiv:2202.08906, eq. 5), the mean squared log-sum-exp of the logits.
        """
        share = mx.stop_gradient(counts / counts.sum())
        self.layers += 1
        self.balance += counts.size * (share * probabilities.mean(0)).sum()
        self.z += mx.square(mx.logsumexp(logits, axis=-1)).mean()


def bucketed_forward(block: Qwen3MoeSparseMoeBlock, x: mx.array, losses: RouterLosses) -> mx.array:
    """The stock block's function of ``x`` (batch, length, hidden), as one batched product.

    Each expert gets a bucket of equal size, as large as the fullest one; empty places point to a
    row of zeros. Equal up to the order of summation to the stock forward pass, and several times
    faster on a CPU, where gathered products do not go through the BLAS library.
    """
    batch, length, width = x.shape
    flat = x.reshape(-1, width)
    tokens, experts, top_k = batch * length, block.num_experts, block.top_k
    logits = block.gate(flat)
    probabilities = mx.softmax(logits, axis=-1)
    chosen = mx.stop_gradient(mx.argpartition(-probabilities, kth=top_k - 1, axis=-1)[:, :top_k])
    weights = mx.take_along_axis(probabilities, chosen, axis=-1)

    assigned = chosen.flatten()
    counts = (assigned[:, None] == mx.arange(experts)).sum(0)
    losses.add(logits, probabilities, counts)
    size: Any = counts.max().item()
    order = mx.argsort(assigned)
    place_in_order = mx.argsort(order)
    first = mx.cumsum(counts) - counts
    by_expert = assigned[order]
    slot = by_expert * size + (mx.arange(tokens * top_k) - first[by_expert])
    source = mx.full((experts * size,), tokens, dtype=mx.int32)
    source[slot] = (order // top_k).astype(mx.int32)

    padded = mx.concatenate([flat, mx.zeros((1, width), flat.dtype)])
    buckets = padded[source].reshape(experts, size, width)
    switch = block.switch_mlp
    gate = buckets @ switch.gate_proj.weight.swapaxes(1, 2)
    up = buckets @ switch.up_proj.weight.swapaxes(1, 2)
    down = swiglu(gate, up) @ switch.down_proj.weight.swapaxes(1, 2)
    outputs = down.reshape(experts * size, width)[slot[place_in_order]]
    outputs = outputs.reshape(tokens, top_k, width)
    mixed: mx.array = (outputs * weights[..., None]).sum(1)
    return mixed.reshape(batch, length, width)


@contextmanager
def training_forward() -> Iterator[RouterLosses]:
    """Exchange the block's forward pass inside the ``with``; yields the losses it collects."""
    stock = Qwen3MoeSparseMoeBlock.__call__
    losses = RouterLosses()

    def forward(block: Qwen3MoeSparseMoeBlock, x: mx.array) -> mx.array:
        return bucketed_forward(block, x, losses)

    Qwen3MoeSparseMoeBlock.__call__ = forward
    try:
        yield losses
    finally:
        Qwen3MoeSparseMoeBlock.__call__ = stock


def training_loss(model: Model, windows: mx.array) -> tuple[mx.array, mx.array, mx.array]:
    """Total loss, cross entropy in nats per token and load balance of windows (rows, length+1)."""
    with training_forward() as losses:
        logits = model(windows[:, :-1])
        entropy = nn.losses.cross_entropy(logits, windows[:, 1:], reduction="mean")
    balance = losses.balance / losses.layers
    total = entropy + BALANCE_WEIGHT * balance + ROUTER_Z_WEIGHT * losses.z / losses.layers
    return total, entropy, mx.stop_gradient(mx.array(balance))
