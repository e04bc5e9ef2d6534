"""A graph as Mermaid, which many wikis and code hosts draw from a fenced block of ``mermaid``.

Syntax: https://mermaid.js.org/syntax/flowchart.html. Characters with a meaning are written as
decimal entities, ``#34;``, the form that flowcharts know.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from moe_lens.figures.styles import Style

from .palette import Palette
from .plain import Scalar, label_of

if TYPE_CHECKING:
    from networkx import Graph

__all__ = ["mermaid_text"]

# Letters of the syntax, of Markdown (in quoted texts), of formulas and of HTML.
_MEANT = {ord(letter): f"#{ord(letter)};" for letter in '"#&<>`$\\|*_[]{}()~%;:@^'}
_MEANT |= {ord("\n"): "<br/>", ord("\t"): " "}


def mermaid_text(graph: Graph[Any], look: Style) -> str:
    """A flowchart of what `plain_graph` made; each layer is a box."""
    palette = Palette(graph, look)
    ids = {node: f"n{number}" for number, node in enumerate(graph)}
    title = " · ".join(filter(None, (graph.graph["title"], graph.graph.get("left_out"))))
    lines = ["---", f"title: {json.dumps(title)}", "---", "flowchart LR"]
    definition = " ".join(graph.graph["definition"].split())
    # A line of comment with braces would be read as a directive.
    lines += [f"%% {definition}".translate({ord("{"): "(", ord("}"): ")"})] if definition else []
    layers: dict[Scalar | None, list[str]] = {}
    for node, values in graph.nodes(data=True):
        text = label_of(node, values).translate(_MEANT)
        layers.setdefault(values.get("layer"), []).append(f'{ids[node]}(["{text}"])')
    for number, (layer, nodes) in enumerate(layers.items()):
        if layer is None:
            lines += [f"  {node}" for node in nodes]
            continue
        box = f"layer {layer}".translate(_MEANT)
        lines.append(f'  subgraph layer{number}["{box}"]')
        lines += [*(f"    {node}" for node in nodes), "  end"]
    arrow = "-->" if graph.is_directed() else "---"
    edges = list(graph.edges(data=True))
    for one, two, data in edges:
        lines.append(f'  {ids[one]} {arrow}|"{data["weight"]:.3g}"| {ids[two]}')
    for number, (*_, data) in enumerate(edges):
        lines.append(f"  linkStyle {number} stroke-width:{palette.width(data['weight']):.1f}px")
    lines += _classes(graph, palette, ids)
    return "\n".join([*lines, ""])


def _classes(graph: Graph[Any], palette: Palette, ids: dict[str, str]) -> list[str]:
    members: dict[tuple[str, str], list[str]] = {}
    for node, values in graph.nodes(data=True):
        members.setdefault(palette.fill(values), []).append(ids[node])
    lines = []
    for number, ((fill, ink), nodes) in enumerate(members.items()):
        lines.append(f"  classDef color{number} fill:{fill},color:{ink}")
        lines.append(f"  class {','.join(nodes)} color{number}")
    return lines
