"""A graph as a page to explore: one file, no network, readable without scripts, too.

The picture is SVG that stands in the page as it was computed here. A short script adds what moves:
zooming, dragging, the neighbours of a node, the least weight, the search.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe_lens.figures.series import group_colors
from moe_lens.figures.styles import STYLES

from .layout import Layout, circles, columns
from .palette import GROUPS, Palette, radius
from .plain import Scalar, label_of, weight_name

if TYPE_CHECKING:
    from networkx import Graph

__all__ = ["page_text"]

_HERE = Path(__file__).parent
_LONGEST = 18
"""Letters of a name beside a node; the whole name is in its tooltip."""


def page_text(graph: Graph[Any], style: str | None = None) -> str:
    """HTML of what `plain_graph` made: directed graphs in columns, others on circles.

    Args:
        graph: The graph.
        style: ``"light"`` or ``"dark"``; None: as the reader's system is set.
    """
    place = columns(graph) if graph.is_directed() else circles(graph)
    title, definition = html.escape(graph.graph["title"]), html.escape(graph.graph["definition"])
    left_out = html.escape(str(graph.graph.get("left_out", "")))
    css, script = _colors() + _file("page.css"), _file("page.js")
    policy = f"default-src 'none'; style-src {_hash(css)}; script-src {_hash(script)}"
    weight = html.escape(weight_name(graph))
    edges = graph.number_of_edges()
    parts = [
        "<!DOCTYPE html>",
        f'<html lang="en" data-theme="{style or "auto"}">',
        "<head>",
        '<meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{title}</title>",
        f"<style>{css}</style>",
        "</head>",
        "<body>",
        "<header>",
        f"<h1>{title}</h1>",
        f'<p class="definition">{definition}</p>' if definition else "",
        f'<p class="left-out">{left_out}</p>' if left_out else "",
        '<form id="controls" hidden>',
        '<label>Search <input id="search" type="search" placeholder="name or expert"></label>',
        f'<label>Least {weight} <input id="least" type="range" min="0" '
        f'max="{max(0, edges - 1)}" value="0"></label>',
        '<output id="shown"></output>',
        '<button id="reset" type="button">Show all</button>',
        "</form>",
        "</header>",
        _drawing(graph, place),
        '<div id="tip" role="status" hidden></div>',
        "<noscript><p>Without scripts the picture does not move.</p></noscript>",
        f'<script type="application/json" id="graph">{_data(graph)}</script>',
        f"<script>{script}</script>",
        "</body>",
        "</html>",
        "",
    ]
    return "\n".join(part for part in parts if part or part is parts[-1])


def _drawing(graph: Graph[Any], layout: Layout) -> str:
    palette = Palette(graph, STYLES["light"])
    box = f"0 0 {layout.width:.0f} {layout.height:.0f}"
    label = html.escape(f"{graph.graph['title']}: {len(graph)} nodes", quote=True)
    lines = [f'<svg id="drawing" viewBox="{box}" role="img" aria-label="{label}">']
    later = graph.is_directed() and _forward(graph)
    if graph.is_directed() and not later:
        lines.append(
            '<defs><marker id="arrow" viewBox="0 0 8 8" refX="14" refY="4" markerWidth="9" '
            'markerHeight="9" markerUnits="userSpaceOnUse" orient="auto">'
            '<path d="M0 0L8 4L0 8Z"/></marker></defs>'
        )
    lines.append('<g id="scene">')
    size = min(40.0, max(15.0, layout.width / 110))  # readable where the whole picture is seen
    lines += [
        f'<text class="layer" font-size="{size:.0f}" x="{x:.1f}" y="{y:.1f}">{html.escape(text)}'
        "</text>"
        for x, y, text in layout.titles
        if text
    ]
    lines.append('<g class="edges">')
    arrow = ' marker-end="url(#arrow)"' if graph.is_directed() and not later else ""
    for number, (one, two, data) in enumerate(graph.edges(data=True)):
        path = _path(layout.places[one], layout.places[two], curved=graph.is_directed())
        width = palette.width(data["weight"])
        lines.append(f'<path data-edge="{number}" d="{path}" stroke-width="{width:.2f}"{arrow}/>')
    lines.append("</g>")
    largest = max((_share(values) for _, values in graph.nodes(data=True)), default=0.0)
    for number, (node, values) in enumerate(graph.nodes(data=True)):
        x, y = layout.places[node]
        size = radius(_share(values), largest)
        group = palette.color_number(values)
        kind = "node" if group is None else f"node g{group}"
        name = label_of(node, values)
        short = name if len(name) <= _LONGEST else name[: _LONGEST - 1] + "…"
        left = x < layout.middles.get(node, x) - 1
        beside = f'x="{-size - 3:.1f}" text-anchor="end"' if left else f'x="{size + 3:.1f}"'
        lines.append(
            f'<g class="{kind}" data-node="{number}" tabindex="0" '
            f'transform="translate({x:.1f} {y:.1f})"><circle r="{size:.1f}"/>'
            f'<text {beside} y="4">{html.escape(" ".join(short.split()))}</text></g>'
        )
    return "\n".join([*lines, "</g>", "</svg>"])


def _path(one: tuple[float, float], two: tuple[float, float], *, curved: bool) -> str:
    (x1, y1), (x2, y2) = one, two
    if not curved:
        return f"M{x1:.1f} {y1:.1f}L{x2:.1f} {y2:.1f}"
    bend = (x2 - x1) / 2 if x1 != x2 else 60.0
    return f"M{x1:.1f} {y1:.1f}C{x1 + bend:.1f} {y1:.1f} {x2 - bend:.1f} {y2:.1f} {x2:.1f} {y2:.1f}"


def _forward(graph: Graph[Any]) -> bool:
    """Whether every edge leads to a later layer, so that no arrow need say which way."""
    layer = dict(graph.nodes(data="layer", default=0))
    return all(_number(layer[one]) < _number(layer[two]) for one, two in graph.edges())


def _number(value: Scalar | None) -> float:
    return float(value) if isinstance(value, int | float) else 0.0


def _share(values: dict[str, Scalar]) -> float:
    return _number(values.get("share"))


def _data(graph: Graph[Any]) -> str:
    """What the script and its tooltips need, as JSON that no HTML parser can end early."""
    place = {node: number for number, node in enumerate(graph)}
    content = {
        "directed": graph.is_directed(),
        "weight": weight_name(graph),
        "nodes": [
            {"title": _full_name(node, data), "values": _shown(data)}
            for node, data in graph.nodes(data=True)
        ],
        "edges": [
            {"source": place[one], "target": place[two], "values": _shown(data)}
            | {"weight": data["weight"]}
            for one, two, data in graph.edges(data=True)
        ],
    }
    text = json.dumps(content, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c")


def _full_name(node: str, values: dict[str, Scalar]) -> str:
    """A node's name with its layer: there is an expert 7 in every layer."""
    name = label_of(node, values)
    if "name" not in values and "expert" in values:
        name = f"expert {name}"
    return f"{name}, layer {values['layer']}" if "layer" in values else name


def _shown(data: dict[str, Scalar]) -> list[tuple[str, str]]:
    return [(key, _written(value)) for key, value in data.items() if key != "name"]


def _written(value: Scalar) -> str:
    if isinstance(value, bool | str):
        return str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def _colors() -> str:
    """The styles of the pictures as variables of CSS."""
    light, dark = (_variables(name) for name in ("light", "dark"))
    return (
        f":root{{color-scheme:light dark;{light}}}\n"
        f"@media (prefers-color-scheme: dark){{:root{{{dark}}}}}\n"
        f"html[data-theme=light]{{color-scheme:light;{light}}}\n"
        f"html[data-theme=dark]{{color-scheme:dark;{dark}}}\n"
        + "".join(f".g{number}{{--own:var(--g{number})}}\n" for number in range(GROUPS))
    )


def _variables(name: str) -> str:
    look = STYLES[name]
    pairs = [("paper", look.paper), ("ink", look.ink), ("faint", look.faint)]
    pairs += [(f"g{number}", color) for number, color in enumerate(group_colors(GROUPS, look))]
    return "".join(f"--{key}:{value};" for key, value in pairs)


def _hash(text: str) -> str:
    """How a page's policy names the one script, or style, that may act."""
    digest = hashlib.sha256(text.encode()).digest()
    return f"'sha256-{base64.b64encode(digest).decode()}'"


@cache
def _file(name: str) -> str:
    return (_HERE / name).read_text(encoding="utf-8")
