"""Groups of high modularity in many graphs at once.

The method is that of Blondel et al. 2008 (arXiv 0803.0476), known as Louvain: nodes move one by one
to the neighbouring group that raises the modularity most, then groups become nodes, until nothing
moves. All graphs are worked on side by side, node by node, because a comparison with random graphs
needs hundreds of them.

Modularity (Newman and Girvan 2004) of weights A with degrees d and 2m = sum of d is the sum over
groups of (weight inside) / 2m - (sum of degrees / 2m)^2.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

__all__ = ["louvain"]

Floats = NDArray[np.float64]
Labels = NDArray[np.int64]

_SWEEPS = 50
_LEAST_GAIN = 1e-10
"""Of twice the weight of a graph; less is rounding."""


def louvain(weights: Floats, *, seed: int = 0) -> tuple[Labels, Floats]:
    """Groups of each graph.

    Args:
        weights: [graphs, nodes, nodes] symmetric, not negative.
        seed: Of the order in which nodes are visited.

    Returns:
        [graphs, nodes] the group of each node, numbered from 0, and [graphs] the modularity, 0 of
        a graph without edges.
    """
    random = np.random.default_rng(seed)
    graphs, nodes, _ = weights.shape
    total = weights.sum(axis=(1, 2))
    scaled = weights / np.where(total > 0, total, 1.0)[:, None, None]
    found = np.tile(np.arange(nodes), (graphs, 1))
    while True:
        label = _moved(scaled, random)
        merged = int(label.max(initial=0)) + 1 < scaled.shape[1]
        found = np.take_along_axis(label, found, axis=1)
        inside = _joined(scaled, label)
        if not merged:
            break
        scaled = inside
    degrees = inside.sum(axis=2)
    kept = np.trace(inside, axis1=1, axis2=2)
    return found, kept - np.square(degrees).sum(axis=1)


def _moved(weights: Floats, random: np.random.Generator) -> Labels:
    """[graphs, nodes] groups after nodes have moved for as long as that helps."""
    graphs, nodes, _ = weights.shape
    degrees = weights.sum(axis=2)
    label = np.tile(np.arange(nodes), (graphs, 1))
    group_degrees = degrees.copy()
    every, first_cell = np.arange(graphs), (np.arange(graphs) * nodes)[:, None]
    for _ in range(_SWEEPS):
        before = label.copy()
        for node in random.permutation(nodes):
            own = weights[:, node].copy()
            own[:, node] = 0.0
            near = np.bincount((label + first_cell).ravel(), own.ravel(), graphs * nodes)
            degree, old = degrees[:, node], label[:, node]
            group_degrees[every, old] -= degree
            gain = near.reshape(graphs, nodes) - degree[:, None] * group_degrees
            gain[every, old] += _LEAST_GAIN
            new = gain.argmax(axis=1)
            label[:, node] = new
            group_degrees[every, new] += degree
        if (label == before).all():
            break
    return _renumbered(label)


def _renumbered(label: Labels) -> Labels:
    """Groups numbered from 0 without gaps, in each graph."""
    graphs, nodes = label.shape
    used = np.zeros((graphs, nodes), dtype=np.int64)
    used[np.arange(graphs)[:, None], label] = 1
    return np.take_along_axis(np.cumsum(used, axis=1) - 1, label, axis=1)


def _joined(weights: Floats, label: Labels) -> Floats:
    """[graphs, groups, groups] the weights between groups, inside ones on the diagonal."""
    groups = int(label.max(initial=0)) + 1
    member = (label[:, :, None] == np.arange(groups)).astype(np.float64)
    return np.asarray(member.transpose(0, 2, 1) @ weights @ member)
