"""Published ways to bring the experts of one router group down to a number of groups.

Complete linkage, which a threshold can cut as well, is in `grouping`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.cluster.hierarchy import fcluster, linkage

from moe_lens.experts.cosines import cosines, gram_cosines

from .grouping import Group

Floats = NDArray[np.float64]

REAM_CAPACITY = 16
"""Most members of a group in REAM's released defaults."""


@dataclass(frozen=True)
class Cluster:
    """Experts that become one; `centre` is the one they were gathered around, if there was one."""

    experts: Group
    centre: int | None = None


def hc_smoe(means: Floats, experts: Group, count: int) -> list[Cluster]:
    """Average linkage of Euclidean distances between mean outputs (HC-SMoE, arXiv:2410.08589).

    Args:
        means: [E, width] mean output of every expert over all tokens, routed to it or not.
        experts: The ids to group.
        count: Groups to make.
    """
    if count == len(experts):
        return [Cluster((expert,)) for expert in experts]
    labels = fcluster(average_linkage(means, experts), count, criterion="maxclust")
    found = [
        Cluster(tuple(e for e, label in zip(experts, labels, strict=True) if label == each))
        for each in np.unique(labels)
    ]
    # Joins of one height are cut together: what is too few is made up by the largest groups.
    while len(found) < count:
        largest = max(found, key=lambda cluster: len(cluster.experts))
        found.remove(largest)
        found += [Cluster(largest.experts[:1]), Cluster(largest.experts[1:])]
    return found


def average_linkage(means: Floats, experts: Group) -> Floats:
    """[n - 1, 4] SciPy's linkage of n `experts` by which `hc_smoe` joins them."""
    if len(experts) == 1:
        return np.empty((0, 4))
    tree: Floats = linkage(means[list(experts)], method="average", metric="euclidean")
    return tree


def m_smoe(logit_gram: Floats, counts: Floats, experts: Group, count: int) -> list[Cluster]:
    """Everyone joins the most similar of the most frequent experts (M-SMoE, arXiv:2310.01334).

    The number of dominant experts is the same in every layer here, where the paper spreads them
    over the layers by frequency: stock loaders take one number.

    Args:
        logit_gram: [E, E] inner products of the router logits over tokens.
        counts: [E] tokens that chose the expert.
        experts: The ids to group.
        count: Groups to make.
    """
    alike = gram_cosines(logit_gram)
    centres = _highest(counts, experts, count)
    members: dict[int, list[int]] = {centre: [centre] for centre in centres}
    for expert in experts:
        if expert not in members:
            nearest = max(centres, key=lambda centre: alike[centre, expert])
            members[nearest].append(expert)
    return [Cluster(tuple(sorted(found)), centre) for centre, found in members.items()]


def ream_similarity(gated_outputs: Floats, logit_gram: Floats) -> Floats:
    """[E, E] REAM's similarity, between 0 and 1 (arXiv:2604.04356).

    The mean of (cosine of mean gated outputs + 1) / 2 and of 1 - d / max d, where d is the
    Euclidean distance of the router-logit columns at unit length: sqrt(2 - 2 cosine).
    """
    distances = np.sqrt(np.maximum(2 - 2 * gram_cosines(logit_gram), 0))
    largest = distances.max()
    routing = 1 - distances / largest if largest > 0 else np.ones_like(distances)
    total: Floats = ((cosines(gated_outputs) + 1) / 2 + routing) / 2
    return total


def ream(
    similarity: Floats,
    saliency: Floats,
    experts: Group,
    count: int,
    capacity: int = REAM_CAPACITY,
) -> list[Cluster]:
    """REAM's grouping: salient experts take their likes, the most salient first.

    Args:
        similarity: [E, E].
        saliency: [E]; NaN counts as 0.
        experts: The ids to group.
        count: Groups to make.
        capacity: Most members of a group; more where that would leave experts without one.
    """
    known = np.nan_to_num(saliency, nan=0.0)
    capacity = max(capacity, -(-len(experts) // count))
    centres = _highest(known, experts, count)
    left = [expert for expert in experts if expert not in centres]
    found = []
    for centre in centres:
        nearest = sorted(left, key=lambda expert: (-similarity[centre, expert], expert))
        taken = nearest[: capacity - 1]
        left = [expert for expert in left if expert not in taken]
        found.append(Cluster(tuple(sorted([centre, *taken])), centre))
    return found


def _highest(values: Floats, experts: Group, count: int) -> list[int]:
    """The `count` experts with the highest values, highest first; the lower id among equals."""
    return sorted(experts, key=lambda expert: (-float(values[expert]), expert))[:count]
