"""Graphs of experts as files; the ending of the name chooses the format.

    write_graph(graph, "pairs.html", title="Co-activation", definition=found.definition)

* ``.json``: node-link, for `networkx.node_link_graph` and d3;
* ``.graphml``: for Gephi, yEd, Cytoscape, igraph and `networkx.read_graphml`;
* ``.dot``: for Graphviz;
* ``.mmd``: Mermaid, drawn by many wikis;
* ``.html``: a page to explore, which needs nothing else and no network.

The first three hold every edge. A drawing of thousands of lines shows nothing, so the last two
hold the strongest, as many as `MOST_EDGES` says, and say how many they leave out.
"""

from __future__ import annotations

import io
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe_lens.atomic import write_bytes
from moe_lens.figures.formats import graph_format
from moe_lens.figures.styles import style_named

from .dot import dot_text
from .mermaid import mermaid_text
from .page import page_text
from .plain import plain_graph

if TYPE_CHECKING:
    from networkx import Graph

__all__ = ["MOST_EDGES", "strongest", "write_graph"]

MOST_EDGES = {"mmd": 200, "html": 1500}
"""Edges that a drawing holds by default; Mermaid refuses more than 500."""


def write_graph(
    graph: Graph[Any],
    path: str | os.PathLike[str],
    *,
    title: str,
    definition: str = "",
    style: str | None = None,
    most_edges: int | None = None,
) -> Path:
    """Write a graph, whole or not at all; equal graphs give equal bytes.

    Args:
        graph: Undirected, or directed from layer to layer. What drawings know of a node: ``layer``
            and ``expert`` (int), ``name`` (text), ``share`` (number: its size), ``group`` (text or
            number: its colour). Of an edge: ``weight``, at least 0, which all must have. Of the
            graph: ``weight_name``, what the weight is. Any other attribute that is a text or a
            number goes into the files and the page's tooltips, too.
        path: File to write; its ending chooses the format.
        title: Heading of drawings.
        definition: What the weights mean, in a sentence or two.
        style: ``"light"`` or ``"dark"``. By default a page is what its reader prefers, and other
            drawings are light.
        most_edges: Edges that a drawing holds at most, the strongest first; by default those of
            `MOST_EDGES`, and all in the other formats.

    Returns:
        The path written.

    Raises:
        UsageError: As `graph_format`, `plain_graph` and `style_named`, before anything is written.
        MoeLensError: The file cannot be written.
    """
    target = Path(path).expanduser()
    kind = graph_format(target)
    look = style_named(style or "light")
    whole = plain_graph(graph, title, definition)
    shown = strongest(whole, MOST_EDGES.get(kind) if most_edges is None else most_edges)
    write_bytes(target, _content(kind, shown, look, style))
    return target


def strongest(graph: Graph[Any], most: int | None) -> Graph[Any]:
    """A copy with the `most` heaviest edges; of what is left out ``left_out`` says how much.

    Nodes without a heavy edge stay only if the graph has them all.
    """
    edges = list(graph.edges(data="weight"))
    if most is None or len(edges) <= most:
        return graph
    # The sort is stable: of equal weights the first in the graph's order stay.
    heavy = sorted(edges, key=lambda edge: -edge[2])[: max(0, most)]
    ends = {node for one, two, _ in heavy for node in (one, two)}
    made = graph.__class__()
    made.graph.update(graph.graph)
    made.graph["left_out"] = (
        f"{len(edges) - len(heavy):,} of {len(edges):,} edges, the weakest, and "
        f"{len(graph) - len(ends):,} of {len(graph):,} nodes are left out."
    )
    made.add_nodes_from((node, data) for node, data in graph.nodes(data=True) if node in ends)
    kept = {(one, two) for one, two, _ in heavy}
    made.add_edges_from(edge for edge in graph.edges(data=True) if edge[:2] in kept)
    return made


def _content(kind: str, graph: Graph[Any], look: Any, style: str | None) -> bytes | str:
    import networkx

    match kind:
        case "json":
            data = networkx.node_link_data(graph, edges="edges")
            return json.dumps(data, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
        case "graphml":
            file = io.BytesIO()
            # Of networkx's two writers the one that needs nothing installed, so bytes never differ.
            networkx.write_graphml_xml(graph, file)
            return file.getvalue()
        case "dot":
            return dot_text(graph, look)
        case "mmd":
            return mermaid_text(graph, look)
        case _:
            return page_text(graph, style)
