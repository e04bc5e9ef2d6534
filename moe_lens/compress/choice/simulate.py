"""A plan tried in the live model, before anything is written."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

import mlx.core as mx
import numpy as np

from moe_lens.compress.plan.plan import Plan
from moe_lens.compress.plan.plan_json import validate
from moe_lens.errors import UsageError
from moe_lens.override import Override

if TYPE_CHECKING:
    from moe_lens.router import ExpertRouter


@contextmanager
def simulated(router: ExpertRouter, plan: Plan) -> Iterator[None]:
    """Make the parent compute what the smaller model of `plan` would.

    Removed experts are masked in the routing, channels that go are set to 0. In float32 the
    logits are those of the written model up to the order of sums; where a quantised down
    projection must be quantised again, that rounding is not seen.

    Raises:
        UsageError: The plan merges experts or changes router rows, which no mask can show, or is
            for another model.
    """
    validate(plan)
    if plan.kind == "merge":
        raise UsageError(
            "a merge makes new experts, which masks cannot simulate; write it and verify that"
        )
    if any(group.router_row is not None for layer in plan.layers for group in layer.groups):
        raise UsageError(
            "the plan brings router rows of its own, which masks cannot simulate; write it and "
            "verify that"
        )
    before, after = plan.model.experts_per_token, plan.experts_per_token
    with ExitStack() as stack:
        if any(each.removed for each in plan.layers) or before != after:
            k = None if before == after else after
            overrides = {each.layer: Override(k=k, mask=each.removed) for each in plan.layers}
            stack.enter_context(router.override(overrides))
        masks = channel_masks(plan)
        if masks:
            stack.enter_context(router.channel_masks(masks))
        yield


def channel_masks(plan: Plan) -> dict[int, mx.array]:
    """By layer, [experts, width] of the parent: 1 for channels that stay, 0 for those that go."""
    masks = {}
    for layer in plan.layers:
        if layer.channels is None:
            continue
        mask = np.zeros((plan.model.num_experts, plan.model.expert_width), np.float32)
        for group, kept in zip(layer.groups, layer.channels, strict=True):
            mask[group.experts[0], list(kept)] = 1.0
        masks[layer.layer] = mx.array(mask)
    return masks
