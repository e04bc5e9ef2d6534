"""How pictures look: sizes that can be read from the back of a room, on light or dark slides."""

from __future__ import annotations

import textwrap
from dataclasses import dataclass
from typing import Any

from matplotlib import colormaps
from matplotlib.colors import Colormap, ListedColormap
from matplotlib.figure import Figure

from moe_lens.errors import UsageError

__all__ = ["STYLES", "Style", "style_named", "write_caption"]

TITLE_SIZE, TEXT_SIZE, TICK_SIZE = 17, 12, 11
# Width of a slide in inches; at 150 dots per inch it is 1920 pixels.
PAGE_WIDTH, PAGE_HEIGHT = 12.8, 7.2
LINE_LENGTH = 130
"""Letters of a caption on a line."""


@dataclass(frozen=True)
class Style:
    """Colours of a picture. Both scales are even in lightness and safe for colour blindness.

    Attributes:
        paper: Background.
        ink: Text and lines.
        faint: Grid lines.
        colors: Colour scale, from the side of the paper to the side of the ink; cells without a
            value have a colour of their own, just off the paper.
    """

    paper: str
    ink: str
    faint: str
    colors: Colormap

    def figure(self, height: float, title: str) -> Figure:
        """An empty figure of slide width with a title at its left."""
        figure = Figure(
            figsize=(PAGE_WIDTH, height), facecolor=self.paper, layout="constrained", dpi=150
        )
        figure.suptitle(
            title,
            x=0.008,
            ha="left",
            fontsize=TITLE_SIZE,
            fontweight="bold",
            color=self.ink,
            parse_math=False,
        )
        return figure

    def dress(self, axes: Any) -> None:
        """Give axes this style's colours."""
        axes.set_facecolor(self.paper)
        axes.tick_params(colors=self.ink, labelsize=TICK_SIZE, length=3)
        for label in (axes.xaxis.label, axes.yaxis.label):
            label.set(color=self.ink, fontsize=TEXT_SIZE)
        for spine in axes.spines.values():
            spine.set_color(self.faint)


def write_caption(axes: Any, text: str, look: Style) -> None:
    """What the numbers of a picture mean, above its axes, in lines that fit the page."""
    lines = "\n".join(textwrap.wrap(text, LINE_LENGTH))
    axes.set_title(lines, loc="left", fontsize=TEXT_SIZE - 1, color=look.ink, parse_math=False)


def style_named(name: str) -> Style:
    """The style ``"light"`` or ``"dark"``.

    Raises:
        UsageError: There is no such style.
    """
    if name not in STYLES:
        raise UsageError(f"there is no picture style {name!r}; choose from {', '.join(STYLES)}")
    return STYLES[name]


def _style(paper: str, ink: str, empty: str, faint: str, name: str, low: float) -> Style:
    """A style with the colormap ``name`` from ``low`` to its end, and ``empty`` for no value."""
    steps = [low + (1.0 - low) * step / 255 for step in range(256)]
    colors = ListedColormap(colormaps[name](steps), name=f"{name} from {low}")
    return Style(paper, ink, faint, colors.with_extremes(bad=empty))


STYLES = {
    "light": _style("#ffffff", "#1a1a1a", "#f3f3f1", "#d8d8d4", "YlGnBu", 0.06),
    "dark": _style("#15171c", "#ececec", "#1f222a", "#3a3f4b", "viridis", 0.0),
}
