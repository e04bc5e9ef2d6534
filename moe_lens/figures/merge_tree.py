"""The dendrogram of the layer in which merging was hardest, and where it was cut.

save_merge_tree(plan, "dendrogram.png")
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter
from numpy.typing import NDArray

from moe_lens.errors import UsageError

from .colors import RGB, contrast, hex_color, tag_color
from .picture_file import write_picture
from .styles import TICK_SIZE, Style, style_named, write_caption

if TYPE_CHECKING:
    from moe_lens.compress.plan.plan import LayerPlan, Plan

__all__ = ["draw_merge_tree", "save_merge_tree"]

_NUMBERED = 160
"""More experts than this leave no room for their numbers."""

_LEAST_CONTRAST = 2.5
"""Of a coloured line on the paper (WCAG 2.1)."""

_GAP = 0.8
"""Between the trees of two groups of a router, in experts."""


def save_merge_tree(
    plan: Plan, path: str | os.PathLike[str], *, style: str = "light", dpi: int = 150
) -> Path:
    """Write the picture, whole or not at all; the arguments are those of `plan.save_plan`.

    Raises:
        UsageError: The plan has no tree, or the format or style is not known.
        MoeLensError: The file cannot be written.
    """
    return write_picture(path, lambda: draw_merge_tree(plan, style=style), dpi)


def draw_merge_tree(plan: Plan, *, style: str = "light") -> Figure:
    """The picture as a matplotlib figure: experts to the right, the less alike the higher joined.

    Raises:
        UsageError: The plan has no tree, or the style is not known.
    """
    tree: Any = plan.evidence.get("merge_tree")
    layer = None if tree is None else plan.layer(tree["layer"])
    if layer is None:
        raise UsageError(
            "this plan has no tree of joins: only merges by complete linkage or hc-smoe have one"
        )
    look = style_named(style)
    figure = look.figure(6.0, f"Dendrogram of layer {layer.layer} · {plan.model.name}")
    axes = figure.subplots()
    look.dress(axes)
    start = 0.0
    names: list[tuple[float, int]] = []
    cuts = []
    for part in tree["parts"]:
        order = _Order(part)
        places = {expert: start + n for n, expert in enumerate(order.experts)}
        cuts.append((start, start + len(places) - 1, _draw_part(axes, part, places, layer, look)))
        names += [(place, expert) for expert, place in places.items()]
        start += len(places) + _GAP
    _cut(axes, plan, cuts, look)
    _dress(axes, plan, tree, names, look)
    return figure


class _Order:
    """The leaves of one tree from left to right, so that no lines cross."""

    def __init__(self, part: dict[str, Any]) -> None:
        self._part, self._size = part, len(part["experts"])
        last = self._size + len(part["first"]) - 1
        self.experts: list[int] = self._below(last)

    def _below(self, node: int) -> list[int]:
        found, waiting = [], [node]
        while waiting:
            each = waiting.pop()
            if each < self._size:
                found.append(self._part["experts"][each])
            else:
                join = each - self._size
                waiting += [self._part["second"][join], self._part["first"][join]]
        return found


def _draw_part(
    axes: Any, part: dict[str, Any], places: dict[int, float], layer: LayerPlan, look: Style
) -> tuple[float, float]:
    """Draw one tree; returns between which heights it was cut."""
    number = {e: n for n, group in enumerate(layer.groups) for e in group.experts}
    nodes: list[tuple[float, float, set[int]]] = [
        (places[expert], 0.0, {number[expert]} if expert in number else set())
        for expert in part["experts"]
    ]
    joined, apart = 0.0, np.inf
    for first, second, height in zip(part["first"], part["second"], part["height"], strict=True):
        (x1, y1, one), (x2, y2, other) = nodes[first], nodes[second]
        groups = one | other
        inside = len(groups) == 1
        joined = max(joined, height) if inside else joined
        apart = apart if inside else min(apart, height)
        axes.plot(
            [x1, x1, x2, x2],
            [y1, height, height, y2],
            color=_line_color(next(iter(groups)), look) if inside else look.ink,
            linewidth=(2.8 if len(places) <= 64 else 1.8) if inside else 1.0,
            solid_joinstyle="miter",
            zorder=3 if inside else 2,
        )
        nodes.append(((x1 + x2) / 2, height, groups))
    return joined, float(apart)


def _line_color(number: int, look: Style) -> str:
    """The colour of a new expert, nearer to the ink where a line of it would be too faint."""
    paper, ink = (_rgb(name) for name in (look.paper, look.ink))
    color = tag_color(number)
    while contrast(color, paper) < _LEAST_CONTRAST:
        red, green, blue = (round(0.85 * a + 0.15 * b) for a, b in zip(color, ink, strict=True))
        color = (red, green, blue)
    return hex_color(color)


def _rgb(name: str) -> RGB:
    red, green, blue = (round(255 * part) for part in to_rgb(name))
    return red, green, blue


def _cut(
    axes: Any, plan: Plan, parts: list[tuple[float, float, tuple[float, float]]], look: Style
) -> None:
    """A dashed line at the threshold, or between the last join that was made and the next."""
    threshold = plan.settings.get("threshold")
    for number, (left, right, (joined, apart)) in enumerate(parts):
        if threshold is not None:
            height, text = 1.0 - threshold, f"threshold {threshold:g}"
        elif np.isfinite(apart):
            height, text = (joined + apart) / 2, "cut"
        else:
            continue
        axes.plot(
            [left - 0.6, right + 0.6],
            [height] * 2,
            color=look.ink,
            linestyle="--",
            linewidth=1.4,
            zorder=4,
        )
        if number == len(parts) - 1:
            axes.annotate(
                text,
                (right + 0.6, height),
                xytext=(4, 0),
                textcoords="offset points",
                va="center",
                fontsize=TICK_SIZE,
                color=look.ink,
                annotation_clip=False,
            )


def _dress(axes: Any, plan: Plan, tree: Any, names: list[tuple[float, int]], look: Style) -> None:
    complete = plan.settings.get("grouping", "complete") == "complete"
    axes.set_ylim(bottom=0)
    if complete:
        axes.set_ylim(0, max(axes.get_ylim()[1], 1.0))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda height, _: f"{1 - height:.2g}"))
        axes.set_ylabel("similarity")
    else:
        axes.set_ylabel("distance")
    size = TICK_SIZE if len(names) <= 64 else 6
    if len(names) <= _NUMBERED:
        places: NDArray[np.float64] = np.array([place for place, _ in names])
        axes.set_xticks(places, [str(expert) for _, expert in names])
        axes.tick_params(axis="x", labelsize=size, rotation=0 if len(names) <= 40 else 90)
    else:
        axes.set_xticks([])
    axes.set_xlabel("expert of the parent")
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    text = f"Height: {tree['height']}. Coloured: experts that become one."
    write_caption(axes, text, look)
