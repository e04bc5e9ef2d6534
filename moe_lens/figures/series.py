"""Lines of a chart: colours that tell a few groups apart, and a legend that names them."""

from __future__ import annotations

from typing import Any

from .styles import TICK_SIZE, Style

__all__ = ["group_colors", "name_lines"]

# Okabe and Ito's colours (2008), which stay apart with any colour blindness, without black; then
# Tol's muted scheme for those after.
_LIGHT = (
    "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9",
    "#882255", "#117733", "#332288", "#999933", "#aa4499", "#44aa99",
)  # fmt: skip
_DARK = (
    "#56b4e9", "#ff8c42", "#2fd6a3", "#e79bc6", "#f0c04a", "#7fa7ff",
    "#d07a9e", "#6cc46c", "#9f8ff0", "#c9c95a", "#d98ad9", "#7fd6cc",
)  # fmt: skip


def group_colors(number: int, look: Style) -> list[str]:
    """A colour for each of `number` groups; from the 13th on they repeat."""
    palette = _LIGHT if look.paper == "#ffffff" else _DARK
    return [palette[place % len(palette)] for place in range(number)]


def name_lines(axes: Any, look: Style, **where: Any) -> None:
    """A legend in the style's colours, to the right of the axes; `where` goes to matplotlib."""
    where = {"loc": "center left", "bbox_to_anchor": (1.01, 0.5), "frameon": False} | where
    legend = axes.legend(
        fontsize=TICK_SIZE, facecolor=look.paper, edgecolor=look.faint, labelcolor=look.ink, **where
    )
    for text in legend.get_texts():
        text.set_parse_math(False)
