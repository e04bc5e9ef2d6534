"""One form of a graph for all files: checked, in a fixed order, of plain values only."""

from __future__ import annotations

import math
import numbers
from typing import TYPE_CHECKING, Any

from moe_lens.errors import UsageError

if TYPE_CHECKING:
    from networkx import Graph

__all__ = ["Scalar", "label_of", "plain_graph", "weight_name"]

Scalar = str | int | float | bool

_WEIGHT_NAME = "weight_name"

# No file format but JSON holds control characters; they become their symbols, one for one. XML
# reads a carriage return as a newline, and so loses it, too.
_CONTROL = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"}
_CONTROL |= {0x7F: 0x2421} | dict.fromkeys(range(0x80, 0xA0), 0xFFFD)
_CONTROL |= dict.fromkeys([*range(0xD800, 0xE000), 0xFFFE, 0xFFFF], 0xFFFD)


def plain_graph(graph: Graph[Any], title: str, definition: str) -> Graph[Any]:
    """A copy with text ids, plain values and a fixed order; `graph` stays as it is.

    Nodes are ordered by ``layer``, ``expert`` and id, edges by their nodes, so graphs that are
    equal give files that are equal. Values that are ``None``, NaN or infinite are left out.

    Args:
        graph: Undirected or directed; every edge has a ``weight``.
        title: Becomes the graph's attribute ``title``.
        definition: Becomes the graph's attribute ``definition``.

    Raises:
        UsageError: The graph has parallel edges, an edge has no finite weight of at least 0, two
            nodes have one name, or a value is no text and no number.
    """
    if graph.is_multigraph():
        raise UsageError("a graph with parallel edges cannot be written; add up their weights")
    ids = {node: _text(str(node)) for node in graph}
    if len(set(ids.values())) < len(ids):
        raise UsageError("two nodes of the graph are written alike; give each its own text as id")
    made = graph.__class__()
    made.graph.update(_values(graph.graph, "the graph"))
    made.graph.update(title=_text(title), definition=_text(definition))
    values = {node: _values(data, f"node {node}") for node, data in graph.nodes(data=True)}
    order = sorted(graph, key=lambda node: (*_place(values[node]), ids[node]))
    made.add_nodes_from((ids[node], values[node]) for node in order)
    place = {node: number for number, node in enumerate(order)}
    edges = []
    for one, two, data in graph.edges(data=True):
        if not graph.is_directed() and place[one] > place[two]:
            one, two = two, one
        edges.append((place[one], place[two], _weighted(data, ids[one], ids[two])))
    edges.sort(key=lambda edge: edge[:2])
    made.add_edges_from((ids[order[one]], ids[order[two]], data) for one, two, data in edges)
    return made


def label_of(node: str, values: dict[str, Scalar]) -> str:
    """What a node is called in a drawing: its ``name``, else its expert, else its id."""
    name = values.get("name") or values.get("expert", node)
    return str(name)


def weight_name(graph: Graph[Any]) -> str:
    """What the weight of an edge is, from the graph's attribute ``weight_name``."""
    return str(graph.graph.get(_WEIGHT_NAME, "weight"))


def _place(values: dict[str, Scalar]) -> tuple[float, float]:
    return tuple(  # type: ignore[return-value]
        each if isinstance(each := values.get(key), int | float) else math.inf
        for key in ("layer", "expert")
    )


def _weighted(data: dict[str, Any], one: str, two: str) -> dict[str, Scalar]:
    values = _values(data, f"edge {one} to {two}")
    weight = values.get("weight")
    if isinstance(weight, bool) or not isinstance(weight, int | float) or weight < 0:
        raise UsageError(
            f"the edge {one} to {two} has no weight that can be drawn; give each edge a finite "
            "number of at least 0 as weight"
        )
    return values


def _values(data: dict[str, Any], of: str) -> dict[str, Scalar]:
    """`data` without what is not there; numpy's numbers as Python's."""
    found: dict[str, Scalar] = {}
    for key, value in data.items():
        if value is None:
            continue
        if isinstance(value, str):
            found[_text(str(key))] = _text(value)
        elif type(value).__name__ in ("bool", "bool_"):
            found[_text(str(key))] = bool(value)
        elif isinstance(value, numbers.Integral):
            found[_text(str(key))] = int(value)
        elif isinstance(value, numbers.Real):
            if math.isfinite(value):
                found[_text(str(key))] = float(value)
        else:
            raise UsageError(
                f"{of} has a {key} of type {type(value).__name__}, which graph files cannot hold; "
                "use texts and numbers"
            )
    return found


def _text(text: str) -> str:
    return text.translate(_CONTROL)
