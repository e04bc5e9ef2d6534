"""Co-activation as a graph, for files and for `networkx`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .result import Coactivation

if TYPE_CHECKING:
    from networkx import Graph

__all__ = ["coactivation_graph"]


def coactivation_graph(found: Coactivation, layer: int | None = None) -> Graph[Any]:
    """Experts as nodes, an edge for each pair that is chosen together more often than by chance.

    Of a result without claims (see `Coactivation.tested`) all pairs with a lift above 1 are edges.

    Args:
        found: What `coactivation` returned.
        layer: Model layer index of the only layer wanted.

    Returns:
        Nodes ``L{layer}E{expert}`` with ``layer``, ``expert``, ``share`` (of the tokens) and, where
        communities were found, ``group``, numbered within the layer; edges with the lift as
        ``weight``, ``count``, both shares, and ``low``, ``high`` and ``q`` where known.

    Raises:
        UsageError: The layer has no routed experts.
    """
    import networkx

    graph = networkx.Graph(weight_name="lift")
    rows = range(len(found.layers)) if layer is None else [found.place(layer)]
    for row in rows:
        group = {
            expert: number
            for number, members in enumerate(found.groups[row].members)
            for expert in members
        }
        for expert, count in enumerate(found.counts[row].tolist()):
            graph.add_node(
                f"L{found.layers[row]}E{expert}",
                layer=found.layers[row],
                expert=expert,
                share=count / found.tokens,
                group=group.get(expert),
            )
    for pair in found.strongest(layer=layer):
        graph.add_edge(
            f"L{pair.layer}E{pair.one}",
            f"L{pair.layer}E{pair.two}",
            weight=pair.lift,
            lift=pair.lift,
            count=pair.tokens,
            share_of_one=pair.share_of_one,
            share_of_two=pair.share_of_two,
            low=pair.low,
            high=pair.high,
            q=pair.q,
        )
    return graph
