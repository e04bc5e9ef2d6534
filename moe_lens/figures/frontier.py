"""Loss against size as a picture: one line for each method.

save_frontier(frontier("demo"), "frontier.png")
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.figure import Figure

from .colors import hex_color, tag_color
from .picture_file import write_picture
from .styles import TEXT_SIZE, TICK_SIZE, Style, style_named

if TYPE_CHECKING:
    from moe_lens.compress.choice.frontier import Frontier

__all__ = ["draw_frontier", "save_frontier"]

COLOURED = 6
"""Methods with a colour and a name of their own; of the others only the cloud can be read."""

ALWAYS_NAMED = ("reap", "random")
"""What readers look for: the method that most know, and what any must beat."""

MARKERS = "osD^vPX"
_LEAST_GAP = 0.052
"""Between two names, as a share of the height of the axes."""

Point = tuple[int, float, float | None, float | None]


def save_frontier(
    result: Frontier, path: str | os.PathLike[str], *, style: str = "light", dpi: int = 150
) -> Path:
    """Write a frontier as a picture, whole or not at all.

    Args:
        result: What `moe_lens.compress.choice.frontier.frontier` returned.
        path: File to write; its ending chooses the format: ``.png``, ``.svg`` or ``.pdf``.
        style: ``"light"`` or ``"dark"``.
        dpi: Dots per inch of a PNG; 150 gives 1920 pixels of width.

    Raises:
        UsageError: The format or style is not known.
        MoeLensError: The file cannot be written.
    """
    return write_picture(path, lambda: draw_frontier(result, style=style), dpi)


def draw_frontier(result: Frontier, *, style: str = "light") -> Figure:
    """The picture as a matplotlib figure: bytes to the right, loss upwards on a log scale."""
    look = style_named(style)
    figure = look.figure(7.2, f"Loss against size · {result.model}")
    axes = figure.subplots()
    look.dress(axes)
    curves = result.curves()
    named = _named(curves)
    for name, points in curves.items():
        if name not in named:
            _line(axes, points, color=look.faint, marker=".", width=1.2, order=1)
    colors = {
        name: look.ink if name == "random" else hex_color(tag_color(3 * place + 1))
        for place, name in enumerate(named)
    }
    for place, (name, color) in enumerate(colors.items()):
        _line(
            axes,
            curves[name],
            color=color,
            marker=MARKERS[place % len(MARKERS)],
            width=2.2,
            order=3,
            dashed=name == "random",
        )
        _bars(axes, curves[name], color)
    axes.set_yscale("log")
    axes.set_xlabel("MB of weight files")
    axes.set_ylabel("KL divergence from the parent, nats per token")
    axes.grid(visible=True, which="major", color=look.faint, linewidth=0.6)
    axes.set_axisbelow(True)
    _parent(axes, result, look)
    _names(axes, curves, colors, look)
    others = len(curves) - len(named)
    text = (
        f"Measured on {result.validation.tokens:,} tokens that made no plan; bars hold the middle "
        "95 % of a bootstrap over prompts."
    ) + (f" Grey: {others} more methods." if others else "")
    axes.set_title(text, loc="left", fontsize=TEXT_SIZE - 1, color=look.ink, parse_math=False)
    return figure


def _named(curves: dict[str, list[Point]]) -> list[str]:
    """The methods to name: those with the least loss anywhere, and what readers look for."""
    rank: dict[str, float] = {}
    sizes = sorted({point[0] for points in curves.values() for point in points})
    for size in sizes:
        # At every size, what each method offers for at most so many bytes.
        here = {
            name: min((point[1] for point in points if point[0] <= size), default=np.inf)
            for name, points in curves.items()
        }
        least = min(here.values())
        for name, kl in here.items():
            rank[name] = min(rank.get(name, np.inf), kl / max(least, 1e-12))
    best = sorted(rank, key=lambda name: (rank[name], name))[:COLOURED]
    return best + [name for name in ALWAYS_NAMED if name in curves and name not in best]


def _line(
    axes: Any,
    points: list[Point],
    *,
    color: str,
    marker: str,
    width: float,
    order: int,
    dashed: bool = False,
) -> None:
    axes.plot(
        [point[0] / 1e6 for point in points],
        [_positive(point[1]) for point in points],
        color=color,
        marker=marker,
        markersize=7 if width > 2 else 4,
        linewidth=width,
        linestyle="--" if dashed else "-",
        zorder=order,
    )


def _bars(axes: Any, points: list[Point], color: str) -> None:
    for size, value, low, high in points:
        if low is not None and high is not None:
            axes.plot(
                [size / 1e6] * 2,
                [_positive(min(low, value)), _positive(max(high, value))],
                color=color,
                linewidth=1.0,
                zorder=2,
            )


def _positive(value: float) -> float:
    return max(value, 1e-8)


def _parent(axes: Any, result: Frontier, look: Style) -> None:
    """Where the parent stands, and how much of it cannot go."""
    size = result.parent_bytes / 1e6
    axes.axvline(size, color=look.ink, linewidth=1.0, linestyle=":")
    axes.annotate(
        f"the parent, {size:.3g} MB",
        (size, 0.02),
        xycoords=("data", "axes fraction"),
        xytext=(-5, 0),
        textcoords="offset points",
        rotation=90,
        ha="right",
        va="bottom",
        fontsize=TICK_SIZE,
        color=look.ink,
    )


def _names(axes: Any, curves: dict[str, list[Point]], colors: dict[str, str], look: Style) -> None:
    """Names at the left ends of the lines, moved apart where they would overlap."""
    left = min(point[0] for points in curves.values() for point in points) / 1e6
    right = axes.get_xlim()[1]
    axes.set_xlim(left - 0.2 * (right - left), right)
    low, high = (np.log(each) for each in axes.get_ylim())
    ends = {name: min(curves[name]) for name in colors}
    heights = {name: (np.log(_positive(end[1])) - low) / (high - low) for name, end in ends.items()}
    places = _spread(sorted(heights.values()))
    for place, name in zip(places, sorted(colors, key=lambda each: heights[each]), strict=True):
        end = ends[name]
        axes.annotate(
            name,
            (end[0] / 1e6, _positive(end[1])),
            xytext=(0.012, place),
            textcoords="axes fraction",
            fontsize=TICK_SIZE,
            color=look.ink,
            va="center",
            arrowprops={"arrowstyle": "-", "color": colors[name], "linewidth": 0.8, "shrinkB": 4},
            parse_math=False,
        )


def _spread(heights: list[float]) -> list[float]:
    """Ascending heights in the axes, moved as far as names need room, and kept inside."""
    highest = 1 - _LEAST_GAP / 2
    places: list[float] = []
    for height in heights:
        places.append(max(height, places[-1] + _LEAST_GAP if places else _LEAST_GAP / 2))
    for place in reversed(range(len(places))):
        above = places[place + 1] - _LEAST_GAP if place + 1 < len(places) else highest
        places[place] = min(places[place], above)
    return places
