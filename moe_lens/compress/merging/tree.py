"""The tree by which the experts of one layer were merged, as plain values that a plan keeps.

Of all layers one is kept: the one in which merging was hardest. It is enough for a picture, and
the trees of all layers would be larger than the rest of a plan.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moe_lens.compress.plan.plan import LayerPlan
from moe_lens.compress.statistics.similarity import Similarity
from moe_lens.compress.statistics.statistics import LayerStatistics
from moe_lens.experts.layer_sample import LayerSample

from .cluster_methods import average_linkage
from .grouping import Group, complete_linkage
from .merging import Merging
from .similarity_sources import OURS, Answers, mixed

Floats = NDArray[np.float64]

EVIDENCE = "merge_tree"
"""The key of the tree in a plan's evidence."""

TREES = {
    "complete": "1 - similarity of the least similar pair (complete linkage)",
    "hc-smoe": "Euclidean distance between mean outputs, mean over all pairs (average linkage)",
}
"""Groupings that make a tree, and what the height of a join is. Others gather experts around
dominant ones, with no order of joins."""


def hardest_layer(layers: Sequence[LayerPlan]) -> LayerPlan:
    """The layer that decided how many groups stay, or else the one with the least similar pair.

    Args:
        layers: Of a merge; `groups_reached` says by a threshold how far each could have gone.
    """

    def lowest(layer: LayerPlan) -> float:
        found = [group.similarity for group in layer.groups if group.similarity is not None]
        return min(found, default=1.0)

    return min(layers, key=lambda layer: (-(layer.groups_reached or 0), lowest(layer)))


def merge_tree(
    layer: LayerPlan,
    statistics: LayerStatistics,
    found: Similarity,
    sample: LayerSample | None,
    router_groups: Sequence[Group],
    merging: Merging,
) -> dict[str, Any] | None:
    """The joins of one layer, lowest first; None where the grouping makes no tree.

    Args:
        layer: Its plan.
        statistics: Of the layer.
        found: Its similarity by the calibration.
        sample: What the layer reads, where the grouping needs it.
        router_groups: Groups of neighbours that the router knows; each has a tree of its own.
        merging: The grouping and its similarity.

    Returns:
        ``layer``, ``height`` (what it is) and ``parts``: for each router group its ``experts`` [n]
        and n - 1 joins of ``first`` with ``second`` at ``height``. A number below n is a place in
        ``experts``, n + j is what join j made (the numbering of SciPy's ``linkage``).
    """
    if merging.grouping not in TREES:
        return None
    answers = None if sample is None else Answers(statistics, sample)
    if merging.grouping == "complete":
        ours = dict(merging.similarity) == OURS
        total = found.total if ours else mixed(merging.similarity, found, answers)
        trees = [complete_linkage(total, experts) for experts in router_groups]
    else:
        assert answers is not None
        means = answers.mean_outputs
        trees = [average_linkage(means, experts) for experts in router_groups]
    parts = [_part(experts, tree) for experts, tree in zip(router_groups, trees, strict=True)]
    return {"layer": layer.layer, "height": TREES[merging.grouping], "parts": parts}


def _part(experts: Group, tree: Floats) -> dict[str, Any]:
    return {
        "experts": list(experts),
        "first": tree[:, 0].astype(int).tolist(),
        "second": tree[:, 1].astype(int).tolist(),
        "height": [float(f"{height:.6g}") for height in tree[:, 2]],
    }
