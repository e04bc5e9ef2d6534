"""The steps between experts as a graph, layers one after the other.

pipeline_graph(found).edges["L1E3", "L2E7"]["lift"]
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from .result import Pipeline
from .steps import lifts, strongest

if TYPE_CHECKING:
    from networkx import DiGraph

__all__ = ["STEPS_OF_A_LAYER", "pipeline_graph"]

STEPS_OF_A_LAYER = 200
"""Steps between two layers that are in the graph."""


def pipeline_graph(result: Pipeline, most: int = STEPS_OF_A_LAYER) -> DiGraph[Any]:
    """First choices from layer to layer: the strongest steps, and those of claimed pipelines.

    Nodes ``L3E7`` have ``layer``, ``expert``, ``name``, ``share`` (of the layer's first choices),
    ``group`` (the label whose own expert it is) and ``pipelines`` (labels whose pipeline goes
    through it). Edges have ``weight`` (share of all tokens), ``count``, ``chance`` (share of the
    steps from the expert they leave), ``lift`` (over what the loads explain) and ``pipelines``.

    Args:
        result: What `pipeline` returned.
        most: Steps between two layers, by their part in the mutual information, n log(lift).
    """
    from networkx import DiGraph

    through, along = _pipelines(result)
    steps = {tuple(each) for each in strongest(result.first, result.first_loads, most).tolist()}
    steps |= {each for each in along if result.first[each] > 0}
    lift = lifts(result.first, result.first_loads)
    share = result.first_loads / np.maximum(result.first_loads.sum(axis=1, keepdims=True), 1)
    graph = DiGraph(weight_name="share of tokens")
    for place, layer in enumerate(result.layers):
        for expert in np.flatnonzero(result.first_loads[place]).tolist():
            group = -1 if result.roles is None else int(result.roles.label_of[place, expert])
            label = result.roles.names[group] if result.roles is not None and group >= 0 else None
            graph.add_node(
                f"L{layer}E{expert}",
                layer=layer,
                expert=expert,
                name=f"L{layer}.E{expert}" + (f" {label}" if label else ""),
                share=float(share[place, expert]),
                group=label,
                pipelines=", ".join(through.get((place, expert), [])) or None,
            )
    for each in sorted(steps):
        place, source, target = each
        count = int(result.first[each])
        graph.add_edge(
            f"L{result.layers[place]}E{source}",
            f"L{result.layers[place + 1]}E{target}",
            weight=count / result.num_tokens,
            count=count,
            chance=count / int(result.first[place, source].sum()),
            lift=float(lift[each]),
            pipelines=", ".join(along.get(each, [])) or None,
        )
    return graph


def _pipelines(
    result: Pipeline,
) -> tuple[dict[tuple[int, int], list[str]], dict[tuple[int, int, int], list[str]]]:
    """Labels whose pipeline goes through an expert, and along a step."""
    through: dict[tuple[int, int], list[str]] = {}
    along: dict[tuple[int, int, int], list[str]] = {}
    for chain in result.claimed:
        for place, experts in enumerate(chain.experts):
            for expert in experts:
                through.setdefault((place, expert), []).append(chain.label)
                if place:
                    for before in chain.experts[place - 1]:
                        along.setdefault((place - 1, before, expert), []).append(chain.label)
    return through, along
