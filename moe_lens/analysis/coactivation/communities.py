"""Groups of experts that are chosen together, if they are more than random graphs have.

Any graph can be cut into groups: even one whose edges were drawn at random has a modularity well
above 0 (Guimera, Sales-Pardo and Amaral 2004, Phys. Rev. E 70, 025101). So the groups found are
compared with those of graphs of the same degrees whose edges were drawn anew and whose weights
were shuffled.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .louvain import louvain

__all__ = ["Communities", "communities", "inseparable"]

NULLS = 19
"""Random graphs compared with: to be above all of them has a probability of at most 1 in 20."""

_CELLS = 2**22
"""Cells of the graphs that are worked on at once."""

_LEAST = 3
"""Experts of a community. Two are a pair."""


@dataclass(frozen=True)
class Communities:
    """The groups of one layer.

    Attributes:
        modularity: Of the partition found by `louvain`; None of a graph without edges.
        null: The highest modularity of the random graphs; None without edges.
        members: Experts of each community, largest first; none unless `modularity` is above `null`.
    """

    modularity: float | None
    null: float | None
    members: tuple[tuple[int, ...], ...]

    @property
    def found(self) -> bool:
        """Whether there are communities."""
        return bool(self.members)


def communities(weights: NDArray[np.float64], *, seed: int = 0) -> tuple[Communities, ...]:
    """Communities of the graph of each layer.

    Args:
        weights: [layers, R, R] symmetric weights of edges, 0 for none.
        seed: Of the method and the random graphs.
    """
    width = weights.shape[-1]
    step = max(1, _CELLS // ((NULLS + 1) * width**2))
    found: list[Communities] = []
    for start in range(0, len(weights), step):
        part = weights[start : start + step]
        random = [np.random.default_rng((seed, start + row)) for row in range(len(part))]
        graphs = [
            [layer, *(_redrawn(layer, own) for _ in range(NULLS))]
            for layer, own in zip(part, random, strict=True)
        ]
        label, modularity = louvain(np.concatenate(graphs), seed=seed)
        for row, layer in enumerate(part):
            first = row * (NULLS + 1)
            null = float(modularity[first + 1 : first + 1 + NULLS].max())
            found.append(_judged(layer, label[first], float(modularity[first]), null))
    return tuple(found)


def _judged(
    weights: NDArray[np.float64], label: NDArray[np.int64], modularity: float, null: float
) -> Communities:
    if not weights.any():
        return Communities(None, None, ())
    groups = [np.flatnonzero(label == number).tolist() for number in range(int(label.max()) + 1)]
    members = sorted(
        (tuple(group) for group in groups if len(group) >= _LEAST),
        key=lambda group: (-len(group), group),
    )
    # What differs by rounding is the same.
    return Communities(modularity, null, tuple(members) if modularity > null + 1e-9 else ())


def inseparable(close: NDArray[np.bool_]) -> tuple[tuple[int, ...], ...]:
    """The largest sets of experts each of which is close to all others of the set, two or more.

    Args:
        close: [R, R] symmetric.
    """
    import networkx

    graph = networkx.from_numpy_array(np.triu(close, 1).astype(np.int8))
    cliques = (tuple(sorted(map(int, each))) for each in networkx.find_cliques(graph))
    return tuple(sorted(each for each in cliques if len(each) > 1))


def _redrawn(weights: NDArray[np.float64], random: np.random.Generator) -> NDArray[np.float64]:
    """The same number of edge ends at each node, joined at random; loops and repeats left out."""
    one, two = np.nonzero(np.triu(weights, 1))
    ends = np.sort(random.permutation(np.concatenate([one, two])).reshape(2, -1), axis=0)
    drawn = np.zeros_like(weights)
    # A repeated edge is written twice, so the later weight stays.
    drawn[ends[0], ends[1]] = random.permutation(weights[one, two])
    np.fill_diagonal(drawn, 0.0)
    return drawn + drawn.T
