"""Colours of nodes and widths of edges, the same in every drawn format."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from moe_lens.figures.colors import hex_color, readable_on
from moe_lens.figures.series import group_colors
from moe_lens.figures.styles import Style

from .plain import Scalar

if TYPE_CHECKING:
    from networkx import Graph

__all__ = ["GROUPS", "Palette"]

GROUPS = 12
"""Colours of groups; from the 13th group on they repeat."""

_THINNEST, _THICKEST = 0.6, 7.0


class Palette:
    """How the nodes and edges of one graph look.

    Attributes:
        group: Number of the colour of each value of the node attribute ``group``, in order.
        widest: Largest weight of an edge.
    """

    def __init__(self, graph: Graph[Any], look: Style) -> None:
        values = {data["group"] for _, data in graph.nodes(data=True) if "group" in data}
        ordered = sorted(values, key=lambda value: (isinstance(value, str), value))
        self.group: dict[Scalar, int] = {value: n for n, value in enumerate(ordered)}
        self.widest = max((data["weight"] for *_, data in graph.edges(data=True)), default=0)
        self._look = look
        self._colors = group_colors(GROUPS, look)

    def color_number(self, values: dict[str, Scalar]) -> int | None:
        """Which of the `GROUPS` colours a node has; None: it is in no group."""
        number = self.group.get(values.get("group", ""))
        return None if number is None else number % GROUPS

    def fill(self, values: dict[str, Scalar]) -> tuple[str, str]:
        """Fill of a node and colour of a text on it."""
        number = self.color_number(values)
        if number is None:
            return self._look.faint, self._look.ink
        color = self._colors[number]
        red, green, blue = (int(color[at : at + 2], 16) for at in (1, 3, 5))
        return color, hex_color(readable_on((red, green, blue)))

    def width(self, weight: float) -> float:
        """Width of an edge in points: its area, not its width, would hide small ones."""
        return _THINNEST + (_THICKEST - _THINNEST) * (weight / self.widest if self.widest else 0.0)


def radius(share: float | None, largest: float) -> float:
    """Radius of a node whose area grows with its share, never too small to point at."""
    if not share or not largest:
        return 6.0
    return 6.0 + 7.0 * math.sqrt(max(0.0, share) / largest)
