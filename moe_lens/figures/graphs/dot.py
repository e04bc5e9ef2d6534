r"""A graph as DOT, the language of Graphviz: ``dot -Tsvg graph.dot -o graph.svg``.

Grammar: https://graphviz.org/doc/info/lang.html. In a quoted text only ``\"`` is an escape of the
language itself; labels know ``\n`` and ``\\`` besides, and read HTML's entities.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from moe_lens.figures.styles import Style

from .palette import Palette
from .plain import Scalar, label_of

if TYPE_CHECKING:
    from networkx import Graph

__all__ = ["dot_text"]

_ENTITY = re.compile(r"&(?=#?\w+;)")


def dot_text(graph: Graph[Any], look: Style) -> str:
    """DOT of what `plain_graph` made; directed graphs run from left to right, layer by layer."""
    directed = graph.is_directed()
    palette = Palette(graph, look)
    head = {"label": graph.graph["title"], "labelloc": "t", "fontname": "sans-serif"}
    head |= {"bgcolor": look.paper, "fontcolor": look.ink, "comment": graph.graph["definition"]}
    head |= {"rankdir": "LR", "ranksep": 1.2} if directed else {"layout": "fdp", "splines": True}
    lines = ["digraph {" if directed else "graph {"]
    lines += [f"  {key}={_value(key, value)};" for key, value in head.items()]
    ink = {"fontname": "sans-serif", "color": look.ink}
    lines += [f"  node {_attributes({'shape': 'box', 'style': 'rounded,filled', **ink})};"]
    lines += [f"  edge {_attributes({'color': look.ink + 'a0'})};"]
    for layer, members in _by_layer(graph):
        indent = "  "
        if layer is not None:
            lines.append(f"  subgraph {_quoted(f'cluster_layer_{layer}')} {{")
            lines.append(f"    label={_quoted(f'layer {layer}')}; color={_quoted(look.faint)};")
            indent = "    "
        for node in members:
            lines.append(f"{indent}{_quoted(node)} {_node(node, graph, palette)};")
        if layer is not None:
            lines.append("  }")
    arrow = "->" if directed else "--"
    for one, two, data in graph.edges(data=True):
        drawn = {"penwidth": round(palette.width(data["weight"]), 2), **data}
        lines.append(f"  {_quoted(one)} {arrow} {_quoted(two)} {_attributes(drawn)};")
    return "\n".join([*lines, "}", ""])


def _node(node: str, graph: Graph[Any], palette: Palette) -> str:
    values = graph.nodes[node]
    fill, ink = palette.fill(values)
    drawn: dict[str, Scalar] = {"label": label_of(node, values), "fillcolor": fill}
    # A group or a label of ours is no attribute of Graphviz.
    renamed = {"group": "community", "label": "of_label"}
    kept = {renamed.get(key, key): value for key, value in values.items()}
    return _attributes({**kept, **drawn, "fontcolor": ink})


def _by_layer(graph: Graph[Any]) -> list[tuple[Scalar | None, list[str]]]:
    layers: dict[Scalar | None, list[str]] = {}
    for node, values in graph.nodes(data=True):
        layers.setdefault(values.get("layer"), []).append(node)
    return list(layers.items())


def _attributes(values: dict[str, Any]) -> str:
    return "[" + ", ".join(f"{_name(k)}={_value(k, v)}" for k, v in values.items()) + "]"


def _name(key: str) -> str:
    return key if re.fullmatch(r"[A-Za-z_][A-Za-z_0-9]*", key) else _quoted(key)


def _value(key: str, value: Scalar) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float):
        text = repr(value)
        return f'"{text}"' if "e" in text else text  # numerals have no exponent
    return _label(value) if key == "label" else _quoted(value)


def _label(text: str) -> str:
    return _quoted(_ENTITY.sub("&amp;", text)).replace("\n", r"\n")


def _quoted(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'
