"""Which experts of a smaller model the experts of its parent became, layer by layer."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from moe_lens.compress.plan.identity import fingerprint_folder
from moe_lens.compress.plan.plan import Plan
from moe_lens.compress.plan.plan_json import read_plan
from moe_lens.errors import UsageError
from moe_lens.families import MoELayer

if TYPE_CHECKING:
    from moe_lens.routed_model import RoutedModel

_ROUTING = ("expert_ids", "expert_weights")


@dataclass(frozen=True)
class ExpertMap:
    """From the parent's router outputs to the child's.

    `layers` holds, for each MoE layer that can be compared, [parent's router width] the number
    that each expert has in the child, -1 where it was removed. `text` says where the map is from.
    `reason` says why layers are missing; None where none is.
    """

    layers: dict[int, NDArray[np.int64]]
    widths: dict[int, int] = field(default_factory=dict)
    text: str | None = None
    reason: str | None = None

    def width(self, layer: int) -> int:
        """Router outputs of the child in this layer."""
        return self.widths[layer]


def map_experts(before: RoutedModel, after: RoutedModel, plan: Plan | None) -> ExpertMap:
    """The map from `before` to `after`, or none with the reason.

    A plan counts if it was made from the checkpoint of `before`. Without one, experts keep their
    numbers where both models have equally many. A child that names another checkpoint as the
    source of its plan is compared one to one only with a model of the very same plan.

    Args:
        before: The parent.
        after: The child.
        plan: The child's ``plan.json``, or None where it has none.
    """
    if plan is None:
        return _by_layer(before, after, None, "experts keep their numbers")
    if before.path is not None and plan.model.fingerprint == fingerprint_folder(before.path):
        return _by_layer(before, after, plan, "plan.json of the smaller model")
    own = stored_plan(before)
    if own is not None and (own.model, own.layers) == (plan.model, plan.layers):
        return _by_layer(before, after, None, "experts keep their numbers: both have one plan")
    return ExpertMap(
        {},
        reason=f"plan.json of {after.name} was made from another checkpoint "
        f"({plan.model.name}) than {before.name}, so which experts correspond is not known",
    )


def stored_plan(router: RoutedModel) -> Plan | None:
    """``plan.json`` in the model's folder; None where there is none.

    Raises:
        UsageError: There is one, and it cannot be read.
    """
    if router.path is None or not (router.path / "plan.json").is_file():
        return None
    try:
        return read_plan(router.path / "plan.json")
    except UsageError as error:
        raise UsageError(
            f"plan.json in the folder of {router.name} cannot be used ({error}); correct it or "
            "take it away"
        ) from error


def _by_layer(before: RoutedModel, after: RoutedModel, plan: Plan | None, text: str) -> ExpertMap:
    children = {layer.index: layer for layer in after.layers}
    found: dict[int, NDArray[np.int64]] = {}
    missing: list[str] = []
    for layer in before.layers:
        child = children.get(layer.index)
        reason = _reason(layer, child, plan)
        if reason is not None or child is None:
            missing.append(f"layer {layer.index}: {reason}")
            continue
        found[layer.index] = _numbers(layer, child, plan)
    return ExpertMap(
        found,
        {index: children[index].router_width for index in found},
        text if found else None,
        "; ".join(missing) or None,
    )


def _reason(layer: MoELayer, child: MoELayer | None, plan: Plan | None) -> str | None:
    """Why this layer cannot be compared; None: it can."""
    if child is None:
        return "the smaller model has no routed experts there"
    for each in (layer, child):
        for name in _ROUTING:
            if (reason := each.reason(name)) is not None:
                return f"{name}: {reason}"
    planned = None if plan is None else plan.layer(layer.index)
    if planned is None:
        if layer.num_experts != child.num_experts:
            return (
                f"{layer.num_experts} experts became {child.num_experts}, and no plan.json says "
                "which"
            )
    elif len(planned.groups) != child.num_experts:
        return f"plan.json says {len(planned.groups)} experts, the model has {child.num_experts}"
    return None


def _numbers(layer: MoELayer, child: MoELayer, plan: Plan | None) -> NDArray[np.int64]:
    planned = None if plan is None else plan.layer(layer.index)
    numbers = np.full(layer.router_width, -1, np.int64)
    if planned is None:
        numbers[: layer.num_experts] = np.arange(layer.num_experts)
    else:
        for number, group in enumerate(planned.groups):
            numbers[list(group.experts)] = number
    # Identity experts stand behind the real ones and are never merged or removed.
    identities = min(layer.zero_experts, child.zero_experts)
    start = layer.num_experts
    numbers[start : start + identities] = child.num_experts + np.arange(identities)
    return numbers
