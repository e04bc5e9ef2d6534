"""All experts of a model on one page: who specialises, layer by layer.

save_picture(draw_experts, name_experts(trace), "experts.png")
"""

from __future__ import annotations

import textwrap
from collections import Counter
from typing import Any

import numpy as np
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from moe_lens.analysis.taxonomy import ROLES, ExpertCard, Taxonomy

from .colors import hex_color, readable_on
from .fonts import drawable, token_families
from .series import group_colors
from .styles import PAGE_WIDTH, TICK_SIZE, Style, style_named, write_caption

__all__ = ["draw_experts"]

NAMED_COLUMNS = 20
"""Experts of a layer up to which their names are written into the cells."""

OWN_COLORS = 12
"""Topics with a colour of their own, where names do not fit: as many as do not repeat."""

_QUIET = {
    "#ffffff": {"generalist": "#e4e4df", "rarely used": "#f7f7f5", "too little data": "#ffffff"},
    "#15171c": {"generalist": "#343945", "rarely used": "#1f222a", "too little data": "#15171c"},
}
"""Colours of the roles that claim nothing, by the paper of the style."""


def draw_experts(result: Taxonomy, *, style: str = "light", subtitle: str | None = None) -> Figure:
    """The picture as a matplotlib figure.

    A row is a layer, a cell an expert; in a row stand the named ones first, alike ones together.
    With few experts a cell has the colour of its role, and its name in it; with many, the colour
    of what it is named after.
    """
    look = style_named(style)
    title = result.title if subtitle is None else f"{result.title} · {subtitle}"
    rows = [[card for card in result.cards if card.layer == layer] for layer in result.layers]
    widest = max(map(len, rows), default=0)
    written = widest <= NAMED_COLUMNS
    tall = min(0.95, 6.0 / max(1, len(rows))) if written else 0.16
    figure = look.figure(float(np.clip(2.6 + tall * len(rows), 4.2, 12.0)), title)
    axes = figure.subplots()
    colors = _role_colors(look) if written else _topic_colors(result, look)
    order = {name: place for place, name in enumerate(colors)}
    paint = np.ones((len(rows), widest, 3)) * to_rgb(look.paper)
    counted: Counter[str] = Counter()
    for row, cards in enumerate(rows):
        cards.sort(key=lambda card: _sort_key(card, order, written))
        for column, card in enumerate(cards):
            group = _group(card, order, written)
            counted[group] += 1
            paint[row, column] = to_rgb(colors[group])
            if written:
                _write_name(axes, card, row, column, colors[group], widest)
    axes.imshow(paint, aspect="auto", interpolation="nearest")
    look.dress(axes)
    _lines(axes, len(rows), widest, look, written)
    step = max(1, len(rows) // 24)
    axes.set_yticks(range(0, len(rows), step), [str(each) for each in result.layers[::step]])
    axes.set_ylabel("layer")
    axes.set_xticks([])
    inside = "number and name" if written else "ordered by what they are named after"
    axes.set_xlabel(f"the {result.router_width} experts of each layer, {inside}")
    _legend(axes, colors, counted, look)
    write_caption(axes, result.definition, look)
    return figure


def _role_colors(look: Style) -> dict[str, str]:
    told = group_colors(5, look)
    named = {"specialist": told[2], "syntax": told[0], "positional": told[4]}
    return {role: named.get(role) or _QUIET[look.paper][role] for role in ROLES}


def _topic_colors(result: Taxonomy, look: Style) -> dict[str, str]:
    """Labels first, so that their colours do not depend on the kinds that occur."""
    many = Counter(card.topic for card in result.cards if card.topic is not None)
    often = [topic for topic, _ in sorted(many.items(), key=lambda each: (-each[1], each[0]))]
    first = often[:OWN_COLORS]
    first.sort(key=lambda topic: (topic not in result.labels, topic))
    colors = dict(zip(first, group_colors(len(first), look), strict=True))
    if len(often) > OWN_COLORS:
        colors["other topics"] = "#8a8a86"
    return colors | _QUIET[look.paper]


def _group(card: ExpertCard, order: dict[str, int], written: bool) -> str:
    if written or card.topic is None:
        return card.role
    return card.topic if card.topic in order else "other topics"


def _sort_key(card: ExpertCard, order: dict[str, int], written: bool) -> tuple[Any, ...]:
    topic = card.topic or (card.evidence[0].name if card.evidence else "~")
    return order[_group(card, order, written)], topic, -card.share


def _write_name(
    axes: Any, card: ExpertCard, row: int, column: int, color: str, widest: int
) -> None:
    size = 10.5 if widest <= 8 else 9 if widest <= 12 else 7.6
    letters = int((PAGE_WIDTH - 1.2) / widest / (size * 0.0078))
    name = drawable(card.name.removeprefix("partly "), 60)
    lines = [line for part in name.split(" · ") for line in textwrap.wrap(part, letters)]
    if len(lines) > 4:
        lines = [*lines[:3], lines[3][: letters - 1] + "…"]
    red, green, blue = (round(255 * part) for part in to_rgb(color))
    ink = hex_color(readable_on((red, green, blue)))
    axes.text(
        *(column, row, "\n".join([str(card.expert), *lines])),
        ha="center",
        va="center",
        color=ink,
        fontsize=size,
        fontfamily=("DejaVu Sans", *token_families()),
        linespacing=1.05,
        parse_math=False,
    )


def _lines(axes: Any, rows: int, columns: int, look: Style, written: bool) -> None:
    width = 1.6 if written else 0.35
    for edge in range(1, rows):
        axes.axhline(edge - 0.5, color=look.paper, linewidth=width)
    for edge in range(1, columns):
        axes.axvline(edge - 0.5, color=look.paper, linewidth=width)


def _legend(axes: Any, colors: dict[str, str], counted: Counter[str], look: Style) -> None:
    patches = [
        Patch(facecolor=color, edgecolor=look.faint, label=f"{name} ({counted[name]:,})")
        for name, color in colors.items()
        if counted[name]
    ]
    legend = axes.legend(
        handles=patches,
        loc="upper center",
        bbox_to_anchor=(0.5, 0.005 - 0.6 / axes.figure.get_figheight()),
        ncols=min(6, max(1, len(patches))),
        frameon=False,
        fontsize=TICK_SIZE,
        labelcolor=look.ink,
    )
    for text in legend.get_texts():
        text.set_parse_math(False)
