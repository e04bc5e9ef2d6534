"""The model that a plan describes, built in memory: nothing is written to try it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import mlx.core as mx

from moe_lens.compress.plan.plan import Plan
from moe_lens.compress.tensors.parameters import smaller_parameters
from moe_lens.compress.tensors.parent import open_parent

from .assemble import assemble
from .config import smaller_config

if TYPE_CHECKING:
    from moe_lens.router import ExpertRouter


def in_memory(router: ExpertRouter, plan: Plan, *, trust_remote_code: bool = False) -> ExpertRouter:
    """What stock mlx-lm would load if `plan` were applied to the checkpoint of `router`.

    Memory: the smaller model, beside what `router` holds.

    Raises:
        UnsupportedModelError: The model brings code of its own.
    """
    parent = open_parent(router.path or router.name, trust_remote_code=trust_remote_code)
    config = smaller_config(parent, plan)
    model = assemble(parent.path, config, smaller_parameters(parent, plan))
    mx.eval(model.parameters())
    return type(router)(model, router.tokenizer, config, name=router.name)
