"""All parameters of the smaller model, made from those of the parent, by name and lazily."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence

import mlx.core as mx

from moe_lens.compress.plan.plan import ExpertGroup, LayerPlan, Plan
from moe_lens.errors import UsageError
from moe_lens.experts.quantisation import Leaves, Quantisation

from .merge import Side, merge_members, merge_rows
from .narrow import Channels, narrow_down, narrow_rows
from .parent import LayerTensors, Parent
from .regroup import checked_groups
from .router_tensors import smaller_router


def smaller_parameters(parent: Parent, plan: Plan) -> dict[str, mx.array]:
    """The parameters of the model that `plan` describes, in the order of the parent's.

    The parent lets go of its own, so that every tensor can be freed once it is written.

    Raises:
        UsageError: The plan is for other layers, or for another number of experts.
    """
    check_fits(parent, plan)
    parameters = parent.take_parameters()
    made: dict[str, dict[str, mx.array]] = {}
    for layer in parent.layers:
        layer_plan = plan.layer(layer.layer)
        assert layer_plan is not None
        if layer.listed is None:
            new = _rows(parameters, layer, parent, layer_plan.groups)
            made |= _one_by_one(_narrow(new, layer, parent, layer_plan.channels))
        else:
            # All new experts stand where the first old one stood; the other names are gone.
            made |= {name: {} for name in layer.experts}
            made[layer.experts[0]] = _list(parameters, layer, parent, layer_plan)
        rows = router_rows(layer_plan.groups, plan)
        made |= _one_by_one(_router(parameters, layer, parent, rows))
    smaller: dict[str, mx.array] = {}
    for name in list(parameters):
        value = parameters.pop(name)
        smaller |= made.pop(name, {name: value})
    return smaller


def router_rows(groups: Sequence[ExpertGroup], plan: Plan) -> tuple[ExpertGroup, ...]:
    """What each router row is made of: the new experts, then the identity experts as they are."""
    identity = range(plan.model.num_experts, plan.model.router_width)
    return (*groups, *(ExpertGroup.single(row) for row in identity))


def check_fits(parent: Parent, plan: Plan) -> None:
    """Raise UsageError unless the plan is for a model of this shape."""
    routed = {layer.layer for layer in parent.layers}
    planned = {layer.layer for layer in plan.layers}
    if routed != planned:
        raise UsageError(
            f"the plan is for the layers {sorted(planned)}, but this model routes in "
            f"{sorted(routed)}; make a plan for this model"
        )
    if plan.expert_width is not None:
        check_width(parent, plan.model.expert_width, plan.expert_width)
    shapes = {name: value.shape for name, value in _arrays(parent)}
    for layer in parent.layers:
        expected = [(name, plan.model.router_width) for name in layer.routers]
        if layer.listed is None:
            expected += [(name, plan.model.num_experts) for name in layer.experts]
        for name, rows in expected:
            if shapes[name][:1] != (rows,):
                raise UsageError(
                    f"the plan is for a model with {rows} rows in {name}, this one has "
                    f"{shapes[name][0]}; make a plan for this model"
                )


def check_width(parent: Parent, old: int, new: int) -> None:
    """Raise UsageError unless the experts are `old` channels wide and `new` can be stored."""
    for layer in parent.layers:
        if layer.width != old:
            raise UsageError(
                f"the plan is for experts of {old} channels, those of layer {layer.layer} have "
                f"{layer.width}; make a plan for this model"
            )
    for packed in parent.down_quantisations().values():
        checked_groups(packed, new)


def _arrays(parent: Parent) -> list[tuple[str, mx.array]]:
    from mlx.utils import tree_flatten

    arrays: list[tuple[str, mx.array]] = tree_flatten(parent.model.parameters())
    return arrays


def _one_by_one(values: Leaves) -> dict[str, dict[str, mx.array]]:
    return {name: {name: value} for name, value in values.items()}


def _by_module(names: Iterable[str]) -> dict[str, list[str]]:
    """Module path -> last names of its parameters."""
    found: dict[str, list[str]] = defaultdict(list)
    for name in names:
        module, _, leaf = name.rpartition(".")
        found[module].append(leaf)
    return found


def _rows(
    parameters: dict[str, mx.array],
    layer: LayerTensors,
    parent: Parent,
    groups: Sequence[ExpertGroup],
) -> Leaves:
    """New rows for stacked experts."""
    made: Leaves = {}
    for module, leaves in _by_module(layer.experts).items():
        old = {leaf: parameters[f"{module}.{leaf}"] for leaf in leaves}
        side = _side(module, layer)
        new = merge_rows(old, groups, parent.quantisations.get(module), side)
        made |= {f"{module}.{leaf}": value for leaf, value in new.items()}
    return made


def _side(module: str, layer: LayerTensors) -> Side:
    return "in" if module.rpartition(".")[2] == layer.down else "out"


def _router(
    parameters: dict[str, mx.array],
    layer: LayerTensors,
    parent: Parent,
    groups: Sequence[ExpertGroup],
) -> Leaves:
    """New rows for the router and what stands beside it."""
    made: Leaves = {}
    for module, leaves in _by_module(layer.routers).items():
        named = {f"{module}.{leaf}": leaf for leaf in leaves}
        new = smaller_router(
            {leaf: parameters[name] for name, leaf in named.items()},
            groups,
            parent.quantisations.get(module),
            place=module,
            projection=module == layer.projection,
            selection_bias=named.get(layer.selection_bias or ""),
            scale=named.get(layer.scale or ""),
        )
        made |= {f"{module}.{leaf}": value for leaf, value in new.items()}
    return made


def _narrow(
    values: Leaves, layer: LayerTensors, parent: Parent, channels: Channels | None
) -> Leaves:
    """Stacked experts with the channels that stay; None: all."""
    if channels is None:
        return values
    made: Leaves = {}
    for module, leaves in _by_module(values).items():
        old = {leaf: values[f"{module}.{leaf}"] for leaf in leaves}
        is_down = module.rpartition(".")[2] == layer.down
        new = _narrow_module(old, is_down, channels, parent.quantisations.get(module))
        made |= {f"{module}.{leaf}": value for leaf, value in new.items()}
    return made


def _narrow_module(
    leaves: Leaves, is_down: bool, channels: Channels, quantisation: Quantisation | None
) -> Leaves:
    if is_down:
        return narrow_down(leaves, channels, quantisation)
    return narrow_rows(leaves, channels)


def _list(
    parameters: dict[str, mx.array],
    layer: LayerTensors,
    parent: Parent,
    plan: LayerPlan,
) -> Leaves:
    """New experts where each is a module of its own (DBRX): kept ones only change their number."""
    assert layer.listed is not None
    first = f"{layer.listed}.0."
    modules = _by_module(
        name.removeprefix(first) for name in layer.experts if name.startswith(first)
    )
    made: Leaves = {}
    for number, group in enumerate(plan.groups):
        for module, leaves in modules.items():
            paths = [f"{layer.listed}.{expert}.{module}" for expert in group.experts]
            members = [{leaf: parameters[f"{path}.{leaf}"] for leaf in leaves} for path in paths]
            new = members[0]
            if group.merged:
                packed = parent.quantisations.get(paths[0])
                if any(parent.quantisations.get(path) != packed for path in paths):
                    raise UsageError(
                        f"experts {group.experts} of layer {layer.layer} are quantised in "
                        "different ways and cannot be merged; remove experts instead (--ratio)"
                    )
                new = merge_members(members, group, packed, _side(module, layer))
            if plan.channels is not None:
                stacked = {leaf: value[None] for leaf, value in new.items()}
                packed = parent.quantisations.get(paths[0])
                kept = plan.channels[number]
                stacked = _narrow_module(stacked, module == layer.down, [kept], packed)
                new = {leaf: value[0] for leaf, value in stacked.items()}
            for leaf, value in new.items():
                made[f"{layer.listed}.{number}.{module}.{leaf}"] = value
    return made
