"""Bands of tokens from bar to bar, layers to the right: where they lie, and how they are drawn.

A column is a layer, a bar an expert; bars are as high as the tokens they hold, except the last one
of a column, the other experts together, which may be cut to leave room. A band joins two bars; its
place on either is fixed by the order of the bars it goes to, so bands of a bar never cross there.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.patches import PathPatch, Rectangle
from matplotlib.path import Path as Line
from numpy.typing import NDArray

from .styles import TICK_SIZE, Style

__all__ = ["Band", "Columns", "draw_band", "draw_bars"]

GAPS = 0.16
"""Share of a column's height between its bars."""

OTHERS = 0.2
"""Most of a column's height that the other experts get."""


@dataclass(frozen=True)
class Band:
    """A flow as the two intervals it joins, heights growing downwards.

    Attributes:
        place: Column it leaves.
        leaves: Top and bottom on the bar it leaves.
        arrives: Top and bottom on the bar it arrives at.
    """

    place: int
    leaves: tuple[float, float]
    arrives: tuple[float, float]


class Columns:
    """Where bars and bands lie.

    Args:
        counts: [groups, columns - 1, B, B] tokens from bar to bar; the last bar: other experts.
        order: [columns, B] bars from top to bottom.

    Attributes:
        top: [columns, B] upper edge of each bar, from 0 to 1 downwards.
        height: [columns, B].
    """

    def __init__(self, counts: NDArray[np.int64], order: NDArray[np.int64]) -> None:
        self.counts, self.order = counts.astype(float), order
        every = self.counts.sum(axis=0)
        leaving = np.concatenate([every.sum(axis=2), every[-1:].sum(axis=1)])
        arriving = np.concatenate([every[:1].sum(axis=2), every.sum(axis=1)])
        load = np.maximum(leaving, arriving)
        self.share = load / np.maximum(load.sum(axis=1, keepdims=True), 1)
        bars = load.shape[1]
        height = self.share.copy()
        cut = np.minimum(height[:, -1], OTHERS)
        rest = np.maximum(height[:, :-1].sum(axis=1), 1e-12)
        height[:, :-1] *= ((1 - cut) / rest)[:, None]
        height[:, -1] = cut
        self.height = height * (1 - GAPS)
        stacked = np.take_along_axis(self.height, order, axis=1) + GAPS / max(1, bars - 1)
        tops = np.cumsum(stacked, axis=1) - stacked
        self.top = np.empty_like(tops)
        np.put_along_axis(self.top, order, tops, axis=1)
        self._scale = np.divide(self.height, load, out=np.zeros_like(load), where=load > 0)

    def bands(
        self, place: int, shown: set[tuple[int, int, int]]
    ) -> dict[tuple[int, int, int], Band]:
        """The bands from a column to the next, by group and the two bars; empty ones left out.

        Args:
            place: The column they leave.
            shown: Bands that stand alone. The others between two bars are one, of group -1.
        """
        parts: dict[tuple[int, int], list[tuple[int, float]]] = {}
        for source, target in np.argwhere(self.counts[:, place].sum(axis=0) > 0).tolist():
            many = self.counts[:, place, source, target]
            alone = [
                (group, float(each))
                for group, each in enumerate(many)
                if (group, source, target) in shown
            ]
            rest = float(many.sum()) - sum(each for _, each in alone)
            parts[source, target] = [*alone, (-1, rest)] if rest > 0 else alone
        one, two = self.order[place].tolist(), self.order[place + 1].tolist()
        leaves = _stacked(
            [(source, [(source, target) for target in two]) for source in one],
            parts, self.top[place], self._scale[place],
        )  # fmt: skip
        arrives = _stacked(
            [(target, [(source, target) for source in one]) for target in two],
            parts, self.top[place + 1], self._scale[place + 1],
        )  # fmt: skip
        return {key: Band(place, leaves[key], arrives[key]) for key in leaves}


def _stacked(
    bars: list[tuple[int, list[tuple[int, int]]]],
    parts: dict[tuple[int, int], list[tuple[int, float]]],
    tops: NDArray[np.float64],
    scale: NDArray[np.float64],
) -> dict[tuple[int, int, int], tuple[float, float]]:
    """Top and bottom of every band on its bar, from the bar's upper edge downwards."""
    found = {}
    for bar, ends in bars:
        below = float(tops[bar])
        for end in ends:
            for group, many in parts.get(end, ()):
                above, below = below, below + many * float(scale[bar])
                found[group, *end] = (above, below)
    return found


def draw_band(axes: Any, band: Band, color: Any, alpha: float, bar: float, order: int) -> None:
    """Draw a band between columns at whole numbers; `bar` is half the width of a bar."""
    left, right = band.place + bar, band.place + 1 - bar
    middle = (left + right) / 2
    (a, b), (c, d) = band.leaves, band.arrives
    corners = [
        *((left, a), (middle, a), (middle, c), (right, c)),
        *((right, d), (middle, d), (middle, b), (left, b), (left, a)),
    ]
    codes = [
        Line.MOVETO, *(Line.CURVE4,) * 3, Line.LINETO, *(Line.CURVE4,) * 3, Line.CLOSEPOLY,
    ]  # fmt: skip
    shape = Line(corners, codes)
    axes.add_patch(PathPatch(shape, facecolor=color, alpha=alpha, linewidth=0, zorder=order))


def draw_bars(
    axes: Any,
    columns: Columns,
    names: list[list[str]],
    marked: set[tuple[int, int]],
    look: Style,
    bar: float,
    inches: float,
) -> None:
    """Draw bars with their names, where a bar is high enough for them.

    Args:
        axes: Where to.
        columns: Where they lie.
        names: For each column the text of each bar; the last names the others.
        marked: (column, bar) that get a heavy frame.
        look: Colours.
        bar: Half the width of a bar.
        inches: Height of the axes.
    """
    for (place, number), top in np.ndenumerate(columns.top):
        height = float(columns.height[place, number])
        if height <= 0:
            continue
        others = number == columns.top.shape[1] - 1
        heavy = (place, number) in marked
        axes.add_patch(
            Rectangle(
                (place - bar, top),
                2 * bar,
                height,
                facecolor=look.paper if others else look.faint,
                edgecolor=look.ink,
                linewidth=2.2 if heavy else 0.5,
                hatch="////" if others else None,
                zorder=4 + heavy,
            )
        )
        if height * inches >= 0.125:
            axes.text(
                place,
                top + height / 2,
                names[place][number],
                ha="center",
                va="center",
                fontsize=TICK_SIZE - 2,
                fontweight="bold" if heavy else "normal",
                color=look.ink,
                zorder=6,
                bbox={"facecolor": look.paper, "edgecolor": "none", "pad": 0.6} if others else None,
            )
