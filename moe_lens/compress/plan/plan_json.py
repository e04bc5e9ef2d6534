"""Reading a plan from JSON, which a person may have edited: everything is checked.

Every message names the place in the file, so that a slip of the pen is found at once.
"""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import Any

from moe_lens.errors import UsageError
from moe_lens.json_shape import NUMBER, fits

from .evidence_json import check_evidence, check_settings
from .group_json import check_orders, read_orders, read_router_row
from .identity import CorpusIdentity, ModelIdentity
from .identity_json import read_identity
from .layer_counts import check_counts, check_equal
from .plan import FORMAT, VERSION, ExpertGroup, LayerPlan, Plan
from .ranges import read_ranges


def read_plan(source: str | Path | dict[str, Any]) -> Plan:
    """Read a plan and check that it can be applied.

    Args:
        source: A path to ``plan.json``, or its parsed content.

    Raises:
        UsageError: The file is not there, is no plan, or does not add up: an id out of range, an
            expert twice or nowhere, a layer with another number of groups than the rest, weights
            that are negative or missing, more experts per token than remain.
    """
    return _plan(source) if isinstance(source, dict) else _plan(_read(Path(source)))


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        json.dumps(content, ensure_ascii=False, allow_nan=False).encode()  # NaN, half characters
    except FileNotFoundError as error:
        raise UsageError(f"there is no plan at {path}") from error
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(f"{path} cannot be read as a plan: {error}") from error
    if not isinstance(content, dict):
        raise UsageError(f"{path} holds no plan: it must be a JSON object")
    return content


def _plan(content: dict[str, Any]) -> Plan:
    if content.get("format") != FORMAT:
        raise UsageError(f'this is no plan: "format" must be "{FORMAT}"')
    if content.get("version") != VERSION:
        raise UsageError(
            f"the plan has version {content.get('version')!r}, this moe-lens reads {VERSION}; "
            "make the plan again"
        )
    kind = _take(content, "kind", str, "plan")
    if kind not in ("merge", "prune", "channels"):
        raise UsageError(f'"kind" is {kind!r}; it must be "merge", "prune" or "channels"')
    model = _identity(ModelIdentity, _take(content, "model", dict, "plan"), "model")
    layers = _take(content, "layers", list, "plan")
    settings, evidence = content.get("settings") or {}, content.get("evidence") or {}
    check_settings(settings)
    check_evidence(evidence, model.num_experts)
    plan = Plan(
        kind=kind,
        model=model,
        corpus=_identity(CorpusIdentity, _take(content, "corpus", dict, "plan"), "corpus"),
        num_experts=_integer(content, "num_experts", "plan"),
        experts_per_token=_integer(content, "experts_per_token", "plan"),
        layers=tuple(_layer(entry, n) for n, entry in enumerate(layers)),
        settings=settings,
        evidence=evidence,
        expert_width=_optional_integer(content, "expert_width", "plan"),
        per_layer=_flag(content, "per_layer"),
    )
    validate(plan)
    return plan


def _identity(cls: Any, content: dict[str, Any], place: str) -> Any:
    try:
        return read_identity(cls, content)
    except ValueError as error:
        raise UsageError(f'"{place}" of the plan {error}') from error


def _layer(content: Any, number: int) -> LayerPlan:
    place = f"layers[{number}]"
    if not isinstance(content, dict):
        raise UsageError(f"{place} of the plan must be an object")
    index = _integer(content, "layer", place)
    groups = _take(content, "groups", list, place)
    saliency = content.get("saliency")
    if saliency is not None and not fits(saliency, [(NUMBER, type(None))]):
        raise UsageError(f'{place} of the plan: "saliency" must be a list of numbers; take it out')
    return LayerPlan(
        layer=index,
        groups=tuple(_group(group, f"layer {index}, group {n}") for n, group in enumerate(groups)),
        removed=tuple(_ids(content.get("removed", []), f'layer {index}, "removed"')),
        groups_reached=_optional_integer(content, "groups_reached", place),
        saliency=None if saliency is None else tuple(saliency),
        channels=None if "channels" not in content else _channels(content["channels"], index),
    )


def _channels(content: Any, layer: int) -> tuple[tuple[int, ...], ...]:
    place = f'layer {layer}, "channels"'
    if not isinstance(content, list) or any(not isinstance(each, str) for each in content):
        raise UsageError(
            f'{place} of the plan must be a list with one text such as "0-3 7" for each group'
        )
    try:
        return tuple(read_ranges(each) for each in content)
    except ValueError as error:
        raise UsageError(f"{place} of the plan: {error}") from error


def _group(content: Any, place: str) -> ExpertGroup:
    if not isinstance(content, dict):
        raise UsageError(f"{place} of the plan must be an object")
    experts = tuple(_ids(content.get("experts"), f'{place}, "experts"'))
    if not experts:
        raise UsageError(f"{place} of the plan has no experts")
    weights = content.get("weights", [1.0] if len(experts) == 1 else None)
    if not isinstance(weights, list) or len(weights) != len(experts):
        raise UsageError(f'{place} of the plan needs one of "weights" for each of "experts"')
    numbers = tuple(_weight(weight, place) for weight in weights)
    if not math.isclose(sum(numbers), 1.0, abs_tol=1e-6):
        raise UsageError(f'{place} of the plan: "weights" must add up to 1, not {sum(numbers):g}')
    evidence = ("similarity", "output_similarity", "activation_overlap")
    if not all(fits(content.get(name), (NUMBER, type(None))) for name in evidence):
        raise UsageError(f"{place} of the plan: its similarities must be numbers; take them out")
    return ExpertGroup(
        experts,
        numbers,
        **{name: content.get(name) for name in evidence},
        orders=read_orders(content.get("orders"), experts, place),
        router_row=read_router_row(content.get("router_row"), experts, place),
    )


def _weight(value: Any, place: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not value >= 0:
        raise UsageError(f'{place} of the plan: {value!r} in "weights" is no share of 0 or more')
    return float(value)


def _ids(value: Any, place: str) -> list[int]:
    if not isinstance(value, list) or any(type(item) is not int for item in value):
        raise UsageError(f"{place} of the plan must be a list of expert ids")
    return value


def _take(content: dict[str, Any], key: str, kind: type, place: str) -> Any:
    value = content.get(key)
    if not isinstance(value, kind):
        raise UsageError(f'"{key}" is missing in {place} of the plan, or of the wrong kind')
    return value


def _integer(content: dict[str, Any], key: str, place: str) -> int:
    value = content.get(key)
    if type(value) is not int:
        raise UsageError(f'"{key}" is missing in {place} of the plan, or no whole number')
    return value


def _optional_integer(content: dict[str, Any], key: str, place: str) -> int | None:
    return _integer(content, key, place) if key in content else None


def _flag(content: dict[str, Any], key: str) -> bool:
    value = content.get(key, False)
    if not isinstance(value, bool):
        raise UsageError(f'"{key}" of the plan must be true or false')
    return value


def validate(plan: Plan) -> None:
    """Raise UsageError unless the plan can be applied to the model it names."""
    model = plan.model
    if not plan.layers:
        raise UsageError("the plan has no layers")
    if len({layer.layer for layer in plan.layers}) != len(plan.layers):
        raise UsageError("the plan names a layer twice")
    for layer in plan.layers:
        _check_experts(layer, model.num_experts)
        _check_saliency(layer, model.num_experts)
        check_orders(layer, model.expert_width)
        check_equal(layer, plan)
        if model.group_count > 1:
            _check_router_groups(layer, plan)
        _check_channels(layer, plan)
    if plan.kind == "channels" and plan.expert_width is None:
        raise UsageError('a plan of kind "channels" needs "expert_width"')
    if plan.expert_width is not None and not 0 < plan.expert_width < model.expert_width:
        raise UsageError(
            f'"expert_width" of the plan is {plan.expert_width}; it must be above 0 and below the '
            f"{model.expert_width} channels of the model's experts"
        )
    check_counts(plan)


def _check_experts(layer: LayerPlan, num_experts: int) -> None:
    found = [expert for group in layer.groups for expert in group.experts] + list(layer.removed)
    outside = [expert for expert in found if not 0 <= expert < num_experts]
    if outside:
        raise UsageError(
            f"layer {layer.layer} of the plan names expert {outside[0]}; the model has experts 0 "
            f"to {num_experts - 1}"
        )
    twice = sorted({expert for expert in found if found.count(expert) > 1})
    if twice:
        raise UsageError(f"layer {layer.layer} of the plan names expert {twice[0]} twice")
    if len(found) < num_experts:
        known = set(found)
        missing = next(expert for expert in itertools.count() if expert not in known)
        raise UsageError(
            f"layer {layer.layer} of the plan says nothing about expert {missing}; put it into "
            'a group or into "removed"'
        )


def _check_saliency(layer: LayerPlan, num_experts: int) -> None:
    if layer.saliency is not None and len(layer.saliency) != num_experts:
        raise UsageError(
            f'layer {layer.layer} of the plan has {len(layer.saliency)} numbers in "saliency", not '
            f"one for each of {num_experts} experts; take it out"
        )


def _check_channels(layer: LayerPlan, plan: Plan) -> None:
    place = f"layer {layer.layer} of the plan"
    if (layer.channels is None) != (plan.expert_width is None):
        raise UsageError(f'{place}: "channels" and "expert_width" go together; one is missing')
    if layer.channels is None:
        return
    if len(layer.channels) != len(layer.groups):
        raise UsageError(
            f'{place} has "channels" for {len(layer.channels)} of {len(layer.groups)} groups; give '
            "one entry for each"
        )
    width = plan.model.expert_width
    for group, kept in zip(layer.groups, layer.channels, strict=True):
        expert = f"{place}, expert {group.experts[0]}"
        if group.merged:
            raise UsageError(
                f"{place} merges {group.experts}; only experts that stay as they are can lose "
                "channels"
            )
        if len(kept) != plan.expert_width:
            raise UsageError(
                f'{expert} keeps {len(kept)} channels, but "expert_width" is {plan.expert_width}: '
                "stock mlx-lm takes one width for all experts"
            )
        if any(not 0 <= channel < width for channel in kept):
            raise UsageError(f"{expert} names a channel outside 0 to {width - 1}")
        if any(a >= b for a, b in itertools.pairwise(kept)):
            raise UsageError(f"{expert}: channels must ascend, each once")


def _check_router_groups(layer: LayerPlan, plan: Plan) -> None:
    """Group-limited routing: neighbours stay neighbours, and every group stays equally large."""
    model = plan.model
    per_group, rest = divmod(len(layer.groups), model.group_count)
    wanted = [group for group in range(model.group_count) for _ in range(per_group)]
    found = [group.experts[0] // model.group_size for group in layer.groups]
    mixed = [
        group.experts
        for group in layer.groups
        if len({expert // model.group_size for expert in group.experts}) > 1
    ]
    if rest or found != wanted or mixed:
        raise UsageError(
            f"layer {layer.layer} of the plan does not keep the same number of experts in each of "
            f"the router's {model.group_count} groups of {model.group_size} neighbours, in order, "
            "each made of experts of one group; its routing would mean something else"
        )
