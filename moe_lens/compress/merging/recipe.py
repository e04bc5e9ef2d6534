"""How the clusters of one layer become new experts: shares, orders of channels, router rows."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from moe_lens.compress.plan.plan import ExpertGroup
from moe_lens.compress.statistics.saliency import saliency
from moe_lens.compress.statistics.similarity import Similarity
from moe_lens.compress.statistics.statistics import LayerStatistics
from moe_lens.experts.layer_sample import LayerSample

from .alignment import orders
from .cluster_methods import Cluster, hc_smoe, m_smoe, ream, ream_similarity
from .grouping import Group, dendrogram, lowest_pair
from .merging import Merging
from .router_rows import fitted_rows
from .similarity_sources import OURS, Answers, mixed

Floats = NDArray[np.float64]


def clusters_of(
    statistics: LayerStatistics,
    found: Similarity,
    sample: LayerSample | None,
    router_groups: Sequence[Group],
    per_group: int,
    merging: Merging,
) -> list[Cluster]:
    """`per_group` clusters of every router group, by smallest member within each.

    Args:
        statistics: Of the layer.
        found: Its similarity by the calibration.
        sample: What the layer reads, where the grouping needs it.
        router_groups: Groups of neighbours that the router knows; all experts are one otherwise.
        per_group: How many stay of each.
        merging: The grouping and its similarity.
    """
    answers = None if sample is None else Answers(statistics, sample)
    if merging.grouping == "complete":
        total = found.total
        if dict(merging.similarity) != OURS:
            total = mixed(merging.similarity, found, answers)
        parts = [
            [Cluster(group) for group in dendrogram(total, experts).cut(per_group)]
            for experts in router_groups
        ]
    else:
        assert answers is not None
        parts = [
            _published(merging.grouping, statistics, answers, experts, per_group)
            for experts in router_groups
        ]
    return [cluster for part in parts for cluster in sorted(part, key=lambda each: each.experts)]


def _published(
    name: str, statistics: LayerStatistics, answers: Answers, experts: Group, count: int
) -> list[Cluster]:
    if name == "hc-smoe":
        return hc_smoe(answers.mean_outputs, experts, count)
    if name == "m-smoe":
        counts = statistics.counts.astype(np.float64)
        return m_smoe(answers.logit_gram, counts, experts, count)
    assert name == "ream", name
    alike = ream_similarity(answers.gated_outputs, answers.logit_gram)
    return ream(alike, saliency(statistics, "reap"), experts, count)


def merged_groups(
    clusters: Sequence[Cluster],
    statistics: LayerStatistics,
    found: Similarity,
    sample: LayerSample | None,
    merging: Merging,
) -> tuple[ExpertGroup, ...]:
    """The new experts of one layer, with all that a plan says about them.

    Args:
        clusters: The experts of each.
        statistics: Of the layer.
        found: Its similarity by the calibration, for the plan's evidence.
        sample: What the layer reads, where channels are aligned or rows fitted.
        merging: Weights, alignment and router rows.
    """
    with nullcontext() if sample is None else sample.layer.reading():
        return _merged_groups(clusters, statistics, found, sample, merging)


def _merged_groups(
    clusters: Sequence[Cluster],
    statistics: LayerStatistics,
    found: Similarity,
    sample: LayerSample | None,
    merging: Merging,
) -> tuple[ExpertGroup, ...]:
    shares = share_values(statistics, merging.weights)
    groups = []
    for cluster in clusters:
        if len(cluster.experts) == 1:
            groups.append(ExpertGroup.single(cluster.experts[0]))
            continue
        group = _weighed(cluster, shares, found)
        dominant = cluster.centre
        if dominant is None:
            dominant = max(cluster.experts, key=lambda expert: (shares[expert], -expert))
        if merging.align != "none":
            assert sample is not None
            group = replace(group, orders=orders(sample, cluster, dominant, merging.align))
        if merging.router_rows == "dominant":
            group = replace(group, router_row=dominant)
        groups.append(group)
    if merging.router_rows == "fitted":
        assert sample is not None
        rows = fitted_rows(sample, groups)
        groups = [replace(each, router_row=row) for each, row in zip(groups, rows, strict=True)]
    return tuple(groups)


def share_values(statistics: LayerStatistics, weights: str) -> Floats:
    """[E] what the shares are proportional to, by one of `merging.WEIGHTS`."""
    if weights == "frequency":
        return statistics.counts.astype(np.float64)
    if weights == "saliency":
        return np.nan_to_num(saliency(statistics, "reap"), nan=0.0)
    assert weights == "equal", weights
    return np.ones(statistics.num_experts)


def _weighed(cluster: Cluster, values: Floats, found: Similarity) -> ExpertGroup:
    """The shares of a cluster, equal where nothing is known, and its least similar pair."""
    own = values[list(cluster.experts)]
    shares = own / own.sum() if own.sum() > 0 else np.full(len(own), 1 / len(own))
    pair = lowest_pair(found, cluster.experts)
    return ExpertGroup(
        experts=cluster.experts,
        weights=tuple(shares.tolist()),
        similarity=round(float(found.total[pair]), 6),
        output_similarity=round(float(found.outputs[pair]), 6),
        activation_overlap=round(float(found.overlap[pair]), 6),
    )
