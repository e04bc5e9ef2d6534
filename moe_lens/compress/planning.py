"""From calibration statistics to a plan: merging by a threshold, or removing by saliency."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from moe_lens.errors import MoeLensError, UsageError

from .grouping import Group, LayerTree, layer_tree, lowest_pair, threshold_for_share, uniform_count
from .limits import Limits
from .plan import ExpertGroup, LayerPlan, Plan
from .plan_json import validate
from .saliency import METHODS, least_salient, saliency
from .similarity import SCALE, Similarity, similarity
from .statistics import Calibration, LayerStatistics

SHARES = (0.25, 0.5)
"""Shares of the experts for which the threshold that would save them is shown."""

HALF = 0.5
"""A similarity below which either the outputs or the tokens of two experts hardly agree."""

_QUANTILES = (0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 1.0)


class NothingToMergeError(MoeLensError):
    """No expert less at this threshold. Carries what would have been needed as `evidence`."""

    def __init__(self, message: str, evidence: dict[str, object]) -> None:
        super().__init__(message)
        self.evidence = evidence


def plan_merge(
    calibration: Calibration, threshold: float, *, experts_per_token: int | None = None
) -> Plan:
    """Merge experts whose similarity reaches `threshold`, as far as all layers can follow.

    Every layer is grouped by complete linkage, so every pair of a group reaches the threshold.
    Stock mlx-lm takes one number of experts, so all layers are cut to the number of groups of the
    layer that has most; the others merge their most similar experts only.

    Args:
        calibration: Statistics with output similarities.
        threshold: Above 0, at most 1; see `similarity.SCALE` for what it means.
        experts_per_token: Of the smaller model; None keeps it, as far as that is possible
            (`experts_per_token.candidates` says which are worth measuring).

    Raises:
        UsageError: The threshold is out of range, or `experts_per_token` is not possible.
        NothingToMergeError: No layer, or not every layer, has a pair that reaches the threshold.
    """
    if not 0.0 < threshold <= 1.0:
        raise UsageError(f"the threshold is {threshold:g}; it must be above 0 and at most 1")
    model, limits = calibration.model, Limits(calibration.model)
    similarities = [similarity(layer) for layer in calibration.layers]
    router_groups = model.router_groups()
    trees = [layer_tree(one, router_groups) for one in similarities]
    fewest = limits.group_for(experts_per_token or 1)
    per_group = max(uniform_count(trees, threshold), fewest)
    evidence = merge_evidence(similarities, trees, fewest)
    if per_group >= model.group_size:
        raise NothingToMergeError(_nothing(threshold, trees, calibration, evidence), evidence)
    num_experts = per_group * model.group_count
    k = experts_per_token or min(model.experts_per_token, limits.largest_k(num_experts))
    plan = Plan(
        kind="merge",
        model=model,
        corpus=calibration.corpus,
        num_experts=num_experts,
        experts_per_token=k,
        layers=tuple(
            _merge_layer(statistics, found, tree, per_group, threshold)
            for statistics, found, tree in zip(calibration.layers, similarities, trees, strict=True)
        ),
        settings={"threshold": threshold, "experts_per_token": experts_per_token},
        evidence=evidence,
    )
    validate(plan)
    return plan


def _merge_layer(
    statistics: LayerStatistics,
    found: Similarity,
    tree: LayerTree,
    per_group: int,
    threshold: float,
) -> LayerPlan:
    groups = tuple(_merged(group, statistics, found) for group in tree.cut(per_group))
    return LayerPlan(tree.layer, groups, groups_reached=tree.groups_at(threshold))


def _merged(group: Group, statistics: LayerStatistics, found: Similarity) -> ExpertGroup:
    if len(group) == 1:
        return ExpertGroup.single(group[0])
    counts = statistics.counts[list(group)].astype(np.float64)
    shares = counts / counts.sum() if counts.sum() > 0 else np.full(len(group), 1 / len(group))
    pair = lowest_pair(found, group)
    return ExpertGroup(
        experts=group,
        weights=tuple(shares.tolist()),
        similarity=round(float(found.total[pair]), 6),
        output_similarity=round(float(found.outputs[pair]), 6),
        activation_overlap=round(float(found.overlap[pair]), 6),
    )


def merge_evidence(
    similarities: Sequence[Similarity], trees: Sequence[LayerTree], fewest: int
) -> dict[str, object]:
    """How similar the experts are at best, and which threshold would save how many."""
    best = np.concatenate([found.best_partner() for found in similarities])
    quantiles = np.quantile(best, _QUANTILES)
    pairs = {}
    for found in similarities:
        place = np.unravel_index(int(np.argmax(_off_diagonal(found.total))), found.total.shape)
        pair = sorted(int(expert) for expert in place)
        i, j = pair
        pairs[str(found.layer)] = {
            "experts": pair,
            "similarity": round(float(found.total[i, j]), 6),
            "output_similarity": round(float(found.outputs[i, j]), 6),
            "activation_overlap": round(float(found.overlap[i, j]), 6),
        }
    return {
        "scale": SCALE,
        "best_partner_quantiles": {
            f"{q:.0%}": round(float(v), 4) for q, v in zip(_QUANTILES, quantiles, strict=True)
        },
        "best_pair_by_layer": pairs,
        "threshold_that_saves": {
            f"{share:.0%}": threshold_for_share(trees, share, fewest) for share in SHARES
        },
    }


def _off_diagonal(matrix: np.ndarray) -> np.ndarray:
    others = matrix.copy()
    np.fill_diagonal(others, -1.0)
    return others


def _nothing(
    threshold: float,
    trees: Sequence[LayerTree],
    calibration: Calibration,
    evidence: dict[str, object],
) -> str:
    experts = calibration.model.num_experts
    reached = {tree.layer: experts - tree.groups_at(threshold) for tree in trees}
    if not any(reached.values()):
        first = f"No pair of experts reaches a similarity of {threshold:g}"
    else:
        stuck = next(layer for layer, merges in reached.items() if _stuck(layer, trees, threshold))
        able = sum(merges > 0 for merges in reached.values())
        first = (
            f"{able} of {len(trees)} layers have experts that reach a similarity of {threshold:g}, "
            f"but layer {stuck} cannot lose one, and stock mlx-lm takes one number of experts for "
            "all layers"
        )
    quantiles = evidence["best_partner_quantiles"]
    saves = evidence["threshold_that_saves"]
    assert isinstance(quantiles, dict) and isinstance(saves, dict)
    spread = ", ".join(f"{name} {value:.2f}" for name, value in quantiles.items())
    remedy = ", ".join(
        f"{share} of the experts: " + ("none" if value is None else f"--threshold {value:g}")
        for share, value in saves.items()
    )
    weak = [value for value in saves.values() if value is not None and value < HALF]
    advice = (
        f" Below {HALF:g} experts with little in common are merged: removing some (--ratio) "
        "usually costs less."
    )
    return (
        f"{first}; nothing was written. Similarity of each expert to its most similar one, over "
        f"all layers, by quantile: {spread}. What would save {remedy}." + (advice if weak else "")
    )


def _stuck(layer: int, trees: Sequence[LayerTree], threshold: float) -> bool:
    tree = next(tree for tree in trees if tree.layer == layer)
    return any(part.groups_at(threshold) == len(part.experts) for part in tree.parts)


def plan_prune(
    calibration: Calibration,
    ratio: float,
    method: str = "reap",
    *,
    experts_per_token: int | None = None,
) -> Plan:
    """Remove the share `ratio` of the experts of each layer, least salient first.

    The number removed is rounded down (as REAP does), and from a group-limited router each group
    loses equally many. An expert that no calibration token reached goes first; the plan's
    evidence names it.

    Raises:
        UsageError: The ratio is not between 0 and 1, removes no expert, or leaves fewer than the
            experts per token need; or there is no such method.
    """
    if not 0.0 < ratio < 1.0:
        raise UsageError(f"the ratio is {ratio:g}; it must lie between 0 and 1")
    if method not in METHODS:
        raise UsageError(f"there is no method {method!r}; choose one of {', '.join(METHODS)}")
    model, limits = calibration.model, Limits(calibration.model)
    fewer = math.floor(model.group_size * ratio + 1e-9)
    if fewer == 0:
        raise UsageError(
            f"A ratio of {ratio:g} removes none of {model.group_size} experts"
            + (" of a router group" if model.group_count > 1 else "")
            + f"; the smallest that does is {1 / model.group_size:.4g}."
        )
    num_experts = model.num_experts - fewer * model.group_count
    k = experts_per_token or model.experts_per_token
    limits.check_k(k, num_experts)
    plan = Plan(
        kind="prune",
        model=model,
        corpus=calibration.corpus,
        num_experts=num_experts,
        experts_per_token=k,
        layers=tuple(
            _prune_layer(layer, calibration, method, fewer) for layer in calibration.layers
        ),
        settings={"ratio": ratio, "method": method, "experts_per_token": experts_per_token},
        evidence={
            "unreached": {str(layer): list(ids) for layer, ids in calibration.unreached().items()}
        },
    )
    validate(plan)
    return plan


def _prune_layer(
    statistics: LayerStatistics, calibration: Calibration, method: str, fewer: int
) -> LayerPlan:
    values = saliency(statistics, method, calibration.tokens)
    removed: set[int] = set()
    for group in calibration.model.router_groups():
        removed |= least_salient(values, group, fewer)
    kept = [expert for expert in range(statistics.num_experts) if expert not in removed]
    return LayerPlan(
        layer=statistics.layer,
        groups=tuple(ExpertGroup.single(expert) for expert in kept),
        removed=tuple(sorted(removed)),
        saliency=tuple(None if np.isnan(v) else float(f"{v:.6g}") for v in values),
    )
