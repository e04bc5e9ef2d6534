"""Plans that remove experts: which go from each layer, by any of the saliencies."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from moe_lens.compress.plan.identity import ModelIdentity
from moe_lens.compress.plan.limits import Limits
from moe_lens.compress.plan.plan import ExpertGroup, LayerPlan, Plan
from moe_lens.compress.plan.plan_json import validate
from moe_lens.compress.statistics.blending import Blend
from moe_lens.compress.statistics.convergence import DEFINITION as STABILITY
from moe_lens.compress.statistics.convergence import rank_stability
from moe_lens.compress.statistics.saliency import (
    FORMULAS,
    METHODS,
    WITHOUT_TEXT,
    check_method,
    least_salient,
    saliency,
)
from moe_lens.compress.statistics.statistics import Calibration
from moe_lens.compress.statistics.super_experts import DEFINITION as SUPER_EXPERTS
from moe_lens.compress.statistics.super_experts import super_experts
from moe_lens.errors import UsageError
from moe_lens.experts.layer_sample import LayerSample
from moe_lens.telling import Progress

from .greedy import remove_greedily
from .weight_shape import aimer

if TYPE_CHECKING:
    from moe_lens.router import ExpertRouter

Floats = NDArray[np.float64]
Protected = dict[int, tuple[int, ...]]


def plan_prune(
    calibration: Calibration,
    ratio: float | None = None,
    method: str = "reap",
    *,
    experts: int | None = None,
    experts_per_token: int | None = None,
    blend: Blend | None = None,
    protect: bool = False,
    seed: int = 0,
    router: ExpertRouter | None = None,
    samples: Sequence[LayerSample] | None = None,
    progress: Progress | None = None,
) -> Plan:
    """Remove experts from each layer, least salient first.

    The number removed by a ratio is rounded down (as REAP does), and from a group-limited router
    each group loses equally many. An expert that no calibration token reached goes first; the
    plan's evidence names it.

    Args:
        calibration: The statistics.
        ratio: The share of the experts of each layer that goes, between 0 and 1.
        method: One of `saliency.METHODS`.
        experts: In place of `ratio`, how many experts each layer keeps.
        experts_per_token: Of the smaller model; None keeps it.
        blend: How the labels of the text count; None for each token alike.
        protect: Keep the super experts (`super_experts.DEFINITION`).
        seed: Of ``random``.
        router: The model, which ``aimer`` reads.
        samples: What `layer_sample.sample_layers` kept, on which ``greedy`` judges.
        progress: Called with layers planned and in all by ``greedy``; the others take no time.

    Raises:
        UsageError: Neither or both of `ratio` and `experts`, or one out of range: no expert goes,
            fewer stay than the experts per token need, or than are protected; there is no such
            method, it takes no blend, or lacks the router or the samples it needs.
    """
    check_method(method)
    _check_blend(method, blend, calibration)
    model, limits = calibration.model, Limits(calibration.model)
    fewer = removed_per_group(model, ratio, experts)
    num_experts = model.num_experts - fewer * model.group_count
    k = experts_per_token or model.experts_per_token
    limits.check_k(k, num_experts)
    protected = super_experts(calibration.layers) if protect else {}
    _check_protected(model, fewer, protected)
    if method == "greedy":
        layers = _greedy(calibration, fewer, k, protected, samples, progress)
    else:
        values = _saliencies(calibration, method, blend, seed, router)
        layers = [
            _prune_layer(each.layer, values[each.layer], model, fewer, protected)
            for each in calibration.layers
        ]
    plan = Plan(
        kind="prune",
        model=model,
        corpus=calibration.corpus,
        num_experts=num_experts,
        experts_per_token=k,
        layers=tuple(layers),
        settings=_settings(ratio, experts, method, experts_per_token, blend, protect, seed),
        evidence=_evidence(calibration, method, protected, protect),
    )
    validate(plan)
    return plan


def plan_every_prune(
    calibration: Calibration,
    ratio: float | None = None,
    *,
    router: ExpertRouter,
    samples: Sequence[LayerSample] | None = None,
    experts: int | None = None,
    methods: Iterable[str] = METHODS,
    experts_per_token: int | None = None,
    blend: Blend | None = None,
    protect: bool = False,
    seed: int = 0,
) -> dict[str, Plan]:
    """The plan of each method at one size, all from one calibration.

    Args:
        calibration: The statistics.
        ratio: As in `plan_prune`, whose other arguments these are as well.
        router: The model that was calibrated.
        samples: As in `plan_prune`. Without them, or with a blend, ``greedy`` is left out.
        methods: Which methods. What no blend changes is planned without it.

    Raises:
        UsageError: As `plan_prune`, for a size that cannot be.
    """
    found = {}
    for method in methods:
        if method == "greedy" and (samples is None or blend is not None):
            continue
        found[method] = plan_prune(
            calibration,
            ratio,
            method,
            experts=experts,
            experts_per_token=experts_per_token,
            blend=None if method in WITHOUT_TEXT else blend,
            protect=protect,
            seed=seed,
            router=router,
            samples=samples,
        )
    return found


def removed_per_group(model: ModelIdentity, ratio: float | None, experts: int | None) -> int:
    """How many experts each router group loses (all experts are one group where there are none).

    Raises:
        UsageError: Not exactly one of both is given, or it cannot be met.
    """
    if (ratio is None) == (experts is None):
        raise UsageError("give either a ratio of experts to remove or a number of experts to keep")
    groups = model.group_count
    if experts is not None:
        fewer, rest = divmod(model.num_experts - experts, groups)
        if rest:
            raise UsageError(
                f"{experts} experts cannot be kept equally in the router's {groups} groups; "
                f"give a multiple of {groups}"
            )
        if not 0 < experts < model.num_experts:
            raise UsageError(
                f"{experts} experts of {model.num_experts} cannot be kept; give a number from 1 "
                f"to {model.num_experts - 1}"
            )
        return fewer
    assert ratio is not None
    if not 0.0 < ratio < 1.0:
        raise UsageError(f"the ratio is {ratio:g}; it must lie between 0 and 1")
    fewer = math.floor(model.group_size * ratio + 1e-9)
    if fewer == 0:
        raise UsageError(
            f"a ratio of {ratio:g} removes none of {model.group_size} experts"
            + (" of a router group" if groups > 1 else "")
            + f"; the smallest that does is {1 / model.group_size:.4g}"
        )
    return fewer


def _check_blend(method: str, blend: Blend | None, calibration: Calibration) -> None:
    if blend is None:
        return
    if method in WITHOUT_TEXT:
        raise UsageError(f"{method} reads no text, so no blend of labels changes it; leave it out")
    if method == "greedy":
        raise UsageError(
            "greedy judges by a sample of all tokens alike, which no blend of labels changes; "
            "leave the blend out, or choose another method"
        )
    blend.check(calibration.labels)


def _check_protected(model: ModelIdentity, fewer: int, protected: Protected) -> None:
    for layer, kept in protected.items():
        for group in model.router_groups():
            least = len(set(group) & set(kept))
            if len(group) - fewer < least:
                raise UsageError(
                    f"{least} super experts of layer {layer} are protected, but only "
                    f"{len(group) - fewer} experts would stay there; remove fewer, or leave the "
                    "protection out"
                )


def _saliencies(
    calibration: Calibration,
    method: str,
    blend: Blend | None,
    seed: int,
    router: ExpertRouter | None,
) -> dict[int, Floats]:
    """By layer, [E] the saliency of every expert."""
    if method == "aimer":
        if router is None:
            raise UsageError("aimer reads the weights; give the router")
        return aimer(router.layers)
    return {
        each.layer: saliency(each, method, blend=blend, seed=seed) for each in calibration.layers
    }


def _prune_layer(
    layer: int, values: Floats, model: ModelIdentity, fewer: int, protected: Protected
) -> LayerPlan:
    removed: set[int] = set()
    for group in model.router_groups():
        free = tuple(expert for expert in group if expert not in protected.get(layer, ()))
        removed |= least_salient(values, free, fewer)
    return _layer_plan(layer, removed, values)


def _greedy(
    calibration: Calibration,
    fewer: int,
    k: int,
    protected: Protected,
    samples: Sequence[LayerSample] | None,
    progress: Progress | None,
) -> list[LayerPlan]:
    if samples is None:
        raise UsageError("greedy judges by what the layers read; give it `sample_layers(...)`")
    quotas = [(group, fewer) for group in calibration.model.router_groups()]
    found = {}
    for sample in samples:
        layer = sample.layer.index
        removal = remove_greedily(sample, quotas, k=k, protected=protected.get(layer, ()))
        found[layer] = _layer_plan(layer, set(removal.order), removal.values)
        if progress is not None:
            progress(len(found), len(samples))
    return [found[each.layer] for each in calibration.layers]


def _layer_plan(layer: int, removed: set[int], values: Floats) -> LayerPlan:
    kept = [expert for expert in range(len(values)) if expert not in removed]
    return LayerPlan(
        layer=layer,
        groups=tuple(ExpertGroup.single(expert) for expert in kept),
        removed=tuple(sorted(removed)),
        saliency=tuple(None if np.isnan(v) else float(f"{v:.6g}") for v in values),
    )


def _settings(
    ratio: float | None,
    experts: int | None,
    method: str,
    experts_per_token: int | None,
    blend: Blend | None,
    protect: bool,
    seed: int,
) -> dict[str, Any]:
    size: dict[str, Any] = {"ratio": ratio} if experts is None else {"experts": experts}
    settings = {**size, "method": method, "experts_per_token": experts_per_token}
    if blend is not None:
        settings["blend"] = str(blend)
    if protect:
        settings["protect"] = True
    if method == "random":
        settings["seed"] = seed
    return settings


def _evidence(
    calibration: Calibration, method: str, protected: Protected, protect: bool
) -> dict[str, Any]:
    evidence: dict[str, Any] = {
        "unreached": {str(layer): list(ids) for layer, ids in calibration.unreached().items()},
        "uncertain": {str(layer): list(ids) for layer, ids in calibration.uncertain().items()},
    }
    if all(each.halves is not None for each in calibration.layers):
        stability = rank_stability(calibration.layers, method if method in FORMULAS else "reap")
        evidence["rank_stability"] = {
            str(layer): round(value, 4) for layer, value in stability.items()
        }
        evidence["stability"] = STABILITY
    if protect:
        evidence["protected"] = {str(layer): list(ids) for layer, ids in protected.items()}
        evidence["protection"] = SUPER_EXPERTS
    return evidence
