"""The model that a plan describes, built in memory: nothing is written to try it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import mlx.core as mx
import mlx.nn as nn

from moe_lens.compress.plan.plan import Plan
from moe_lens.compress.tensors.parameters import smaller_parameters
from moe_lens.compress.tensors.parent import open_parent
from moe_lens.loading import compute_in_float32

from .assemble import assemble
from .config import smaller_config

if TYPE_CHECKING:
    from moe_lens.router import ExpertRouter


def in_memory(router: ExpertRouter, plan: Plan, *, trust_remote_code: bool = False) -> ExpertRouter:
    """What stock mlx-lm would load if `plan` were applied to the checkpoint of `router`.

    Memory: the smaller model, beside what `router` holds. Where that is streamed, so is this one:
    each layer is made from the parent's when it runs.

    Raises:
        UnsupportedModelError: The model brings code of its own.
    """

    def build() -> tuple[nn.Module, dict[str, Any]]:
        parent = open_parent(router.path or router.name, trust_remote_code=trust_remote_code)
        config = smaller_config(parent, plan)
        return assemble(parent.path, config, smaller_parameters(parent, plan)), config

    def again() -> nn.Module:
        model, _ = build()
        compute_in_float32(model)
        return model

    model, config = build()
    if not router.streamed:
        mx.eval(model.parameters())
    fresh = again if router.streamed else None
    return type(router)(model, router.tokenizer, config, name=router.name, fresh=fresh)
