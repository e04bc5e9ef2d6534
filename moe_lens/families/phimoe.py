"""Phi-3.5-MoE's sparsemixer: one expert after another, each weighed among its near rivals.

SparseMixer, arXiv:2310.00811; mlx-lm holds the inference path. The weights are not renormalised.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx

from moe_lens.kernels import Rule

from .declaration import Block

NEGATIVE_INFINITY = -float("inf")


def _rule(block: Any) -> Rule:
    return Rule("identity")


def sparsemixer(
    block: Any,
    logits: mx.array,
    k: int,
    *,
    mask: mx.array | None = None,
    force: mx.array | None = None,
    bias: mx.array | None = None,
    scale: mx.array | None = None,
    ids: mx.array | None = None,
) -> tuple[mx.array, mx.array]:
    """Ids and weights [..., k] of `logits` [..., E], with the changes of an override.

    The j-th expert is the best not yet taken. Its weight is its softmax among those whose
    distance to it, relative to the larger magnitude of the two, is at most twice the jitter.
    """
    if bias is not None:
        logits = logits + bias.astype(logits.dtype)
    if mask is not None:
        logits = mx.where(mask, mx.array(NEGATIVE_INFINITY, logits.dtype), logits)
    choice = logits
    if force is not None:
        choice = mx.where(force, mx.array(float("inf"), logits.dtype), logits)
    left, chosen, weights = logits, [], []
    for slot in range(k):
        if ids is None:
            best = mx.stop_gradient(mx.argmax(choice, axis=-1, keepdims=True))
        else:
            best = ids[..., slot : slot + 1]
        top = mx.take_along_axis(left, best, axis=-1)
        distance = (top - logits) / mx.maximum(mx.abs(logits), top)
        rivals = mx.where(distance > 2 * block.jitter_eps, NEGATIVE_INFINITY, left)
        share = mx.softmax(rivals, axis=-1, precise=True)
        weights.append(mx.take_along_axis(share, best, axis=-1))
        chosen.append(best)
        gone = mx.array(NEGATIVE_INFINITY, logits.dtype)
        left = mx.put_along_axis(left, best, gone, axis=-1)
        choice = mx.put_along_axis(choice, best, gone, axis=-1)
    all_ids, all_weights = mx.concatenate(chosen, axis=-1), mx.concatenate(weights, axis=-1)
    if scale is not None:
        all_weights = all_weights * scale[all_ids].astype(all_weights.dtype)
    return all_ids, all_weights


BLOCKS = (
    Block(
        "phimoe",
        "PhiMoESparseMoeBlock",
        _rule,
        logits="gate",
        k="top_k",
        route=sparsemixer,
        experts_key="num_local_experts",
        note="sparsemixer: the experts are taken one after another, no rule as data",
    ),
)
