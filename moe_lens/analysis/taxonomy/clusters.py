"""Groups of token ids that the model routes alike, for experts that no label and no kind describes.

Each of the most frequent token ids is a point: the square roots of the shares in which it goes to
the experts of all layers, so that distances are Hellinger's. Ward's method joins the points into a
tree (Ward 1963), which is cut into the number of groups asked for.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import linalg
from scipy.cluster import hierarchy

from moe_lens.trace.tokens import TokenTexts

__all__ = ["CLUSTERS", "Cluster", "cluster_tokens", "typical_order"]

CLUSTERS = 12
"""Groups by default."""

POINTS = 1024
"""Token ids that are grouped at most: the most frequent."""

FEWEST_OCCURRENCES = 20
"""Of a token id, before its routes say anything."""

DIMENSIONS = 32
"""Principal components that distances are taken in, where there are more experts."""

NAMED_BY = 3
"""Tokens in the name of a group."""


@dataclass(frozen=True)
class Cluster:
    """Token ids that go to the same experts.

    Attributes:
        name: ``tokens like ␣the ␣of ␣a``: those nearest to its centre, of the frequent ones.
        token_ids: Its members, the most frequent first.
        texts: Their texts.
        tokens: How many tokens of the trace they make up.
    """

    name: str
    token_ids: tuple[int, ...]
    texts: tuple[str, ...]
    tokens: int


def cluster_tokens(
    ids: NDArray[np.int64],
    occurrences: NDArray[np.int64],
    counts: NDArray[np.int32],
    texts: TokenTexts,
    number: int,
) -> list[Cluster]:
    """Group the most frequent token ids by their routing, the largest group first.

    Args:
        ids: [ids] token ids.
        occurrences: [ids] how often each occurs.
        counts: [ids, layers, R] how often each went to each expert.
        texts: Their texts.
        number: Groups to make; fewer if there are not as many frequent ids.
    """
    chosen = np.flatnonzero(occurrences >= FEWEST_OCCURRENCES)
    chosen = chosen[np.argsort(-occurrences[chosen], kind="stable")][:POINTS]
    if number < 1 or len(chosen) < 2:
        return []
    points = np.sqrt(counts[chosen].reshape(len(chosen), -1) / occurrences[chosen][:, None])
    points = _principal(points)
    tree = hierarchy.ward(points)
    group = hierarchy.fcluster(tree, min(number, len(chosen)), criterion="maxclust")
    found = []
    for each in np.unique(group):
        members = np.flatnonzero(group == each)  # the most frequent come first
        centre = points[members].mean(axis=0)
        often = members[: max(NAMED_BY, len(members) // 4)]
        near = often[np.argsort(np.linalg.norm(points[often] - centre, axis=1), kind="stable")]
        named = [texts.visible(int(ids[chosen[place]])) for place in near[:NAMED_BY]]
        token_ids = tuple(int(each) for each in ids[chosen[members]])
        found.append(
            Cluster(
                name=f"tokens like {' '.join(named)}",
                token_ids=token_ids,
                texts=tuple(texts.visible(token_id) for token_id in token_ids),
                tokens=int(occurrences[chosen[members]].sum()),
            )
        )
    return sorted(found, key=lambda cluster: (-cluster.tokens, cluster.token_ids))


def _principal(points: NDArray[np.float64]) -> NDArray[np.float64]:
    """The points in the directions of their largest spread."""
    centred = points - points.mean(axis=0)
    if min(centred.shape) <= DIMENSIONS:
        return centred
    last = len(centred) - 1
    spread, directions = linalg.eigh(
        centred @ centred.T, subset_by_index=(last + 1 - DIMENSIONS, last)
    )
    return directions * np.sqrt(np.maximum(spread, 0.0))


def typical_order(
    counts: NDArray[np.int32],
    received: int,
    occurrences: NDArray[np.int64],
    total: int,
    fewest: int,
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Token ids of one expert, the most typical first, and the lift of every id.

    Typical is what an expert gets often and more often than the text has it: n log(lift), the
    share of a token id in the divergence between the expert's tokens and the text.

    Args:
        counts: [ids] how often each id went to the expert.
        received: Tokens of the expert, other ids included.
        occurrences: [ids] how often each id occurs.
        total: Tokens of the trace.
        fewest: Ids with fewer tokens at the expert are left out.
    """
    lift = (counts / max(1, received)) / (occurrences / total)
    often = np.flatnonzero((counts >= fewest) & (lift > 1.0))
    weight = counts[often] * np.log(lift[often])
    return often[np.argsort(-weight, kind="stable")], lift
