"""Layers with numbers of experts of their own, by what each layer is measured to lose.

The measure is in the parent, by masks: all layers keep the equal number of experts except one,
which keeps another number. What that does to the loss is the sensitivity of this one layer at the
size asked for. Losses of layers add up as long as numbers stay near the equal one (layers that lose
much lose more together), so they are found within several distances from it, and each time all
layers are measured together. The best is compared with equal layers on text that made neither.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache

import numpy as np

from moe_lens.compress.plan.identity import ModelIdentity
from moe_lens.compress.plan.limits import Limits
from moe_lens.compress.plan.plan import ExpertGroup, LayerPlan, Plan
from moe_lens.compress.statistics.statistics import Calibration
from moe_lens.compress.statistics.super_experts import super_experts
from moe_lens.telling import Progress

from .layer_allocation import allocate, curve
from .trials import TrialBench, lead

PlanAt = Callable[[int], Plan]
"""The plan in which every layer keeps so many experts."""


POINTS = 15
"""Numbers of experts that each layer is measured with; straight lines lie between them."""

TOKENS = 4096
"""Of calibration text that each of them is measured on, or a little more: whole prompts."""

DEFINITION = (
    "sensitivity of a layer: mean KL(parent || smaller) per token in nats on calibration text, by "
    "the number of experts it keeps, with all other layers at the equal number (masks in the "
    "parent); the numbers are those with the least sum over layers within the bytes that equal "
    "layers take, at most 1, 2, 4, ... experts away from the equal number, whichever distance "
    "loses least when all layers have their numbers"
)


@dataclass(frozen=True)
class Budget:
    """A plan for the size asked for, and a sentence on what unequal layers are worth."""

    plan: Plan
    text: str


def possible_counts(statistics: Calibration, k: int | None, *, protect: bool = False) -> list[int]:
    """How many experts a layer can keep, ascending: equally many of each router group.

    Args:
        statistics: Of the parent.
        k: Experts per token of the smaller model; None for the parent's.
        protect: Whether super experts stay.
    """
    model = statistics.model
    fewest = Limits(model).group_for(k or model.experts_per_token)
    protected = super_experts(statistics.layers) if protect else {}
    for kept in protected.values():
        for group in model.router_groups():
            fewest = max(fewest, len(set(group) & set(kept)))
    groups = model.group_count
    return list(range(fewest * groups, model.num_experts + 1, groups))


def measured_counts(possible: Sequence[int], equal: int) -> list[int]:
    """At most `POINTS` of the possible numbers, evenly spaced, the ends and the equal one in it."""
    places = np.linspace(0, len(possible) - 1, POINTS)
    places[np.argmin(np.abs(places[1:-1] - possible.index(equal))) + 1] = possible.index(equal)
    return sorted({possible[round(place)] for place in places})


def budget_layers(
    plan_at: PlanAt,
    start: Plan,
    possible: Sequence[int],
    expert_bytes: Mapping[int, int],
    measure: TrialBench,
    compare: TrialBench,
    progress: Progress | None = None,
) -> Budget:
    """Give every layer a number of experts of its own, at the bytes of equal layers.

    Args:
        plan_at: For any of `possible` below the parent's number.
        start: The plan with equal layers.
        possible: The numbers that a layer can keep, ascending; the parent's is the last.
        expert_bytes: By layer, what one expert takes.
        measure: With calibration text, on which sensitivities are measured.
        compare: With text that made no plan, on which both plans are compared.
        progress: Called with measurements done and in all.

    Returns:
        The plan with unequal layers, or the equal one where that loses no more.
    """
    plan_at = cache(plan_at)
    equal = start.num_experts
    layers = [layer.layer for layer in start.layers]
    points = measured_counts(possible, equal)
    losses: dict[int, dict[int, float]] = {layer: {} for layer in layers}
    distances = _distances(possible, equal)
    done, total = 0, len(layers) * (len(points) - 1) + len(distances)
    at_equal = measure.mean_kl(start)
    for layer in layers:
        for count in points:
            if count == equal:
                losses[layer][count] = at_equal
                continue
            counts = {**dict.fromkeys(layers, equal), layer: count}
            losses[layer][count] = measure.mean_kl(mixed(plan_at, start, counts))
            done += 1
            if progress is not None:
                progress(done, total)
    best, least, by_distance = start, at_equal, {}
    for distance in distances:
        near = [count for count in possible if abs(count - equal) <= distance]
        counts = allocate(
            {layer: curve(measured, near) for layer, measured in losses.items()},
            near,
            expert_bytes,
            equal * sum(expert_bytes[layer] for layer in layers),
        )
        tried = mixed(plan_at, start, counts)
        loss = measure.mean_kl(tried) if tried.per_layer else at_equal
        by_distance[distance] = {"counts": list(counts.values()), "kl": float(f"{loss:.6g}")}
        if loss < least:
            best, least = tried, loss
        done += 1
        if progress is not None:
            progress(done, total)
    found = _compared(best, start, compare)
    evidence = {
        "text": found.text,
        "definition": DEFINITION,
        "equal": equal,
        "equal_kl": float(f"{at_equal:.6g}"),
        "by_distance": {str(distance): tried for distance, tried in by_distance.items()},
        "sensitivity": {
            str(layer): {str(count): float(f"{loss:.6g}") for count, loss in measured.items()}
            for layer, measured in losses.items()
        },
    }
    settings = {**found.plan.settings, "per_layer": True}
    plan = replace(
        found.plan, settings=settings, evidence={**found.plan.evidence, "layer_budget": evidence}
    )
    return replace(found, plan=plan)


def _distances(possible: Sequence[int], equal: int) -> list[int]:
    """How far numbers of experts may be from the equal one: one step, two, four, ... to all."""
    step = possible[1] - possible[0]
    furthest = max(equal - possible[0], possible[-1] - equal)
    found = [step]
    while found[-1] < furthest:
        found.append(2 * found[-1])
    return found


def mixed(plan_at: PlanAt, start: Plan, counts: Mapping[int, int]) -> Plan:
    """The plan whose layers are those of the equal plans with `counts` experts."""
    layers = tuple(
        _whole(layer, start.model)
        if counts[layer.layer] == start.model.num_experts
        else _layer(plan_at(counts[layer.layer]), layer.layer)
        for layer in start.layers
    )
    unequal = len(set(counts.values())) > 1
    return replace(start, num_experts=max(counts.values()), per_layer=unequal, layers=layers)


def _layer(plan: Plan, index: int) -> LayerPlan:
    found = plan.layer(index)
    assert found is not None
    return found


def _whole(layer: LayerPlan, model: ModelIdentity) -> LayerPlan:
    """A layer that keeps all of its experts."""
    groups = tuple(ExpertGroup.single(expert) for expert in range(model.num_experts))
    return LayerPlan(layer.layer, groups, saliency=layer.saliency)


def _compared(unequal: Plan, equal: Plan, bench: TrialBench) -> Budget:
    """The better of both plans on text that made neither."""
    alone = bench.try_plan("equal layers", equal)[0]
    if not unequal.per_layer:
        text = (
            f"equal layers are used: on calibration text nothing loses less than "
            f"{equal.num_experts} experts in each"
        )
        return Budget(equal, text)
    own = bench.try_plan("unequal layers", unequal)[0]
    ahead = lead(own, alone, bench.seed)
    numbers = f"KL {own.loss.kl} with {unequal.experts_text} experts, {alone.loss.kl} with " + (
        f"{equal.num_experts} in each ({own.loss.tokens} validation tokens)"
    )
    if own.loss.kl.value >= alone.loss.kl.value:
        return Budget(
            equal,
            f"equal layers are used: layers with numbers of their own lose no less, {numbers}",
        )
    sure = "" if ahead.low is None or ahead.low > 0 else "; that lead is within its error"
    return Budget(unequal, f"layers keep numbers of experts of their own: {numbers}{sure}")
