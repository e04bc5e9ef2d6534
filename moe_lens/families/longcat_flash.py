"""LongCat-Flash: zero experts that return their input stand behind the real ones in the router.

The block remaps the ids of zero experts to 0 with weight 0 before the experts run, and adds the
input times their weights at the end (arXiv:2509.01322, section 2.1). The true ids are those of
the router; the output of a zero expert is the input of the block.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn

from moe_lens.kernels import Rule

from .declaration import Block
from .seams import Attachment, observe_router


def _rule(block: Any) -> Rule:
    router = block.router
    return Rule(
        "softmax",
        selection_bias=router.e_score_correction_bias,
        side="high",
        normalise="sum" if router.norm_topk_prob else "no",
        epsilon=1e-20,
        scale=router.routed_scaling_factor,
        cast="input",
    )


def _zero_experts(block: Any) -> int:
    return int(block.zero_expert_num)


def _attach(attachment: Attachment) -> None:
    layer = attachment.layer
    observe_router(attachment)
    seen: dict[str, mx.array] = {}
    route = type(layer.router_module).__call__

    def router(module: nn.Module, x: mx.array) -> tuple[mx.array, mx.array]:
        ids, weights = route(module, x)
        seen["ids"] = ids
        return ids, weights

    def experts(module: nn.Module, x: mx.array, ids: mx.array) -> mx.array:
        outputs = attachment.call_experts(module, x, ids)
        is_zero = seen.pop("ids") >= layer.num_experts
        attachment.emit("expert_inputs", x)
        attachment.emit(
            "expert_outputs", mx.where(is_zero[..., None], mx.expand_dims(x, -2), outputs)
        )
        return outputs

    attachment.swap(layer.router_module, router)
    attachment.swap(layer.experts_module, experts)


BLOCKS = (
    Block(
        "longcat_flash",
        "LongcatFlashMoE",
        _rule,
        logits="router.classifier",
        k="router.top_k",
        seam="special",
        router="router",
        selection_bias="router.e_score_correction_bias",
        routed=".",
        zero_experts=_zero_experts,
        attach=_attach,
        also=("longcat_flash_ngram",),
        experts_key="n_routed_experts",
        k_key="moe_topk",
        note="expert ids from the number of experts on are zero experts, which return their input",
    ),
)
