"""From calibration statistics to a plan that merges experts, by a threshold or to a number."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from moe_lens.compress.plan.limits import Limits
from moe_lens.compress.plan.plan import LayerPlan, Plan
from moe_lens.compress.plan.plan_json import validate
from moe_lens.compress.pruning.pruning import removed_per_group
from moe_lens.compress.statistics.similarity import SCALE, Similarity, similarity
from moe_lens.compress.statistics.statistics import Calibration
from moe_lens.errors import MoeLensError, UsageError
from moe_lens.experts.layer_sample import LayerSample
from moe_lens.telling import Progress

from .grouping import LayerTree, layer_tree, threshold_for_share, uniform_count
from .merging import BY_THRESHOLD, TO_A_NUMBER, WITHOUT_SAMPLE, Merging
from .recipe import clusters_of, merged_groups
from .tree import EVIDENCE as TREE
from .tree import hardest_layer, merge_tree

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
    calibration: Calibration,
    threshold: float,
    *,
    experts_per_token: int | None = None,
    merging: Merging | None = None,
    samples: Sequence[LayerSample] | None = None,
    per_layer: bool = False,
    progress: Progress | None = None,
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
        merging: How the groups become experts; its grouping must be complete linkage by the
            similarity that thresholds are about. None for `merging.BY_THRESHOLD`, or
            `merging.WITHOUT_SAMPLE` where there are no samples.
        samples: What `layer_sample.sample_layers` kept, where `merging` needs it.
        per_layer: Each layer keeps the groups that it has alone; loading then needs trust (see
            `Plan.per_layer`).
        progress: Called with layers planned and in all.

    Raises:
        UsageError: The threshold is out of range, `experts_per_token` is not possible, or
            `merging` groups in another way or lacks its samples.
        NothingToMergeError: No layer, or not every layer, has a pair that reaches the threshold.
    """
    merging = _default(BY_THRESHOLD, samples) if merging is None else merging
    if not 0.0 < threshold <= 1.0:
        raise UsageError(f"the threshold is {threshold:g}; it must be above 0 and at most 1")
    merging.check_threshold()
    model, limits = calibration.model, Limits(calibration.model)
    similarities = [similarity(layer) for layer in calibration.layers]
    trees = [layer_tree(one, model.router_groups()) for one in similarities]
    fewest = limits.group_for(experts_per_token or 1)
    least = uniform_count(trees, threshold)
    per_group = {
        tree.layer: max(uniform_count([tree], threshold) if per_layer else least, fewest)
        for tree in trees
    }
    evidence = merge_evidence(similarities, trees, fewest)
    if min(per_group.values()) >= model.group_size:
        raise NothingToMergeError(_nothing(threshold, trees, calibration, evidence), evidence)
    reached = {tree.layer: tree.groups_at(threshold) for tree in trees}
    return _plan(
        calibration,
        per_group,
        similarities,
        merging,
        samples,
        experts_per_token,
        settings={"threshold": threshold, **({"per_layer": True} if per_layer else {})},
        evidence=evidence,
        reached=reached,
        progress=progress,
    )


def plan_merge_to(
    calibration: Calibration,
    num_experts: int,
    *,
    experts_per_token: int | None = None,
    merging: Merging | None = None,
    samples: Sequence[LayerSample] | None = None,
    progress: Progress | None = None,
) -> Plan:
    """Merge the experts of each layer down to a given number, however alike they are.

    Args:
        calibration: Statistics with output similarities.
        num_experts: How many stay in each layer; equally many of each group of a group-limited
            router.
        experts_per_token: As in `plan_merge`.
        merging: Which experts come together and how they become one; None for
            `merging.TO_A_NUMBER`, or `merging.WITHOUT_SAMPLE` where there are no samples.
        samples: What `layer_sample.sample_layers` kept, where `merging` needs it.
        progress: Called with layers planned and in all.

    Raises:
        UsageError: So many cannot stay, `experts_per_token` is not possible with them, or
            `merging` lacks its samples.
    """
    model, limits = calibration.model, Limits(calibration.model)
    fewer = removed_per_group(model, None, num_experts)
    per_group = model.group_size - fewer
    if experts_per_token is not None:
        limits.check_k(experts_per_token, num_experts)
    similarities = [similarity(layer) for layer in calibration.layers]
    trees = [layer_tree(one, model.router_groups()) for one in similarities]
    return _plan(
        calibration,
        {layer.layer: per_group for layer in calibration.layers},
        similarities,
        _default(TO_A_NUMBER, samples) if merging is None else merging,
        samples,
        experts_per_token,
        settings={"experts": num_experts},
        evidence=merge_evidence(similarities, trees, limits.group_for(experts_per_token or 1)),
        reached={},
        progress=progress,
    )


def _default(merging: Merging, samples: Sequence[LayerSample] | None) -> Merging:
    """`merging`, or without samples what the sums of a calibration allow."""
    return merging if samples is not None else WITHOUT_SAMPLE


def _plan(
    calibration: Calibration,
    per_group: Mapping[int, int],
    similarities: Sequence[Similarity],
    merging: Merging,
    samples: Sequence[LayerSample] | None,
    experts_per_token: int | None,
    *,
    settings: dict[str, object],
    evidence: dict[str, object],
    reached: Mapping[int, int],
    progress: Progress | None,
) -> Plan:
    """The plan that keeps, by layer, `per_group` experts of each router group."""
    model = calibration.model
    fewest, most = (pick(per_group.values()) * model.group_count for pick in (min, max))
    largest_k = Limits(model).largest_k(fewest)
    by_layer = {} if samples is None else {each.layer.index: each for each in samples}
    missing = [each.layer for each in calibration.layers if each.layer not in by_layer]
    if merging.needs_sample and missing:
        raise UsageError(
            f"this merge needs a sample of layer {missing[0]}; give what `sample_layers(router, "
            "tokens, router_inputs=True)` returns"
        )
    layers = []
    for statistics, found in zip(calibration.layers, similarities, strict=True):
        sample = by_layer.get(statistics.layer)
        size = per_group[statistics.layer]
        clusters = clusters_of(statistics, found, sample, model.router_groups(), size, merging)
        groups = merged_groups(clusters, statistics, found, sample, merging)
        layers.append(
            LayerPlan(statistics.layer, groups, groups_reached=reached.get(statistics.layer))
        )
        if progress is not None:
            progress(len(layers), len(similarities))
    hardest = layers.index(hardest_layer(layers))
    tree = merge_tree(
        layers[hardest],
        calibration.layers[hardest],
        similarities[hardest],
        by_layer.get(layers[hardest].layer),
        model.router_groups(),
        merging,
    )
    plan = Plan(
        kind="merge",
        model=model,
        corpus=calibration.corpus,
        num_experts=most,
        per_layer=fewest != most,
        experts_per_token=experts_per_token or min(model.experts_per_token, largest_k),
        layers=tuple(layers),
        settings={
            **settings,
            "experts_per_token": experts_per_token,
            **merging.settings(),
        },
        evidence=evidence if tree is None else {**evidence, TREE: tree},
    )
    validate(plan)
    return plan


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
