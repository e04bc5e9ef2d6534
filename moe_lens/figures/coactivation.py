"""Experts that are chosen together, as a picture: one layer, a few side by side, or all by depth.

save_picture(draw_coactivation, found, "together.png")
save_picture(draw_coactivation, found, "layer7.png", layer=7)
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Colormap, LinearSegmentedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from numpy.typing import NDArray

from moe_lens.analysis.coactivation import Coactivation

from .series import group_colors, name_lines
from .styles import PAGE_HEIGHT, TEXT_SIZE, TICK_SIZE, Style, style_named, write_caption

__all__ = ["draw_coactivation"]

FEW_LAYERS = 6
"""More layers than this are drawn small, with what changes by depth below them."""

_NAMED = 32
"""More experts than this leave no room for their ids."""

_LARGEST = 4.0
"""Of log2 lift; what is beyond has the colour of the end of the scale."""


def draw_coactivation(
    result: Coactivation,
    *,
    layer: int | None = None,
    style: str = "light",
    subtitle: str | None = None,
) -> Figure:
    """The picture as a matplotlib figure; with `layer`, the model layer index of the one shown."""
    look = style_named(style)
    title = result.title if subtitle is None else f"{result.title} · {subtitle}"
    if layer is None and len(result.layers) > 1:
        draw = _few if len(result.layers) <= FEW_LAYERS else _by_depth
        return draw(result, look, title)
    row = 0 if layer is None else result.place(layer)
    return _one(result, row, look, f"{title} · layer {result.layers[row]}")


class _Scale:
    """What the cells of the maps show, and in which colours."""

    def __init__(self, result: Coactivation, look: Style, *, lift: bool, rows: Any = ...) -> None:
        self._look = look
        if lift:
            self.values = _log_lift(result)
            seen = np.abs(self.values[rows][np.isfinite(self.values[rows])])
            top = float(np.clip(np.quantile(seen, 0.99) if len(seen) else 1.0, 1.0, _LARGEST))
            self.norm, self.colors = Normalize(-top, top), _diverging(look)
        else:
            self.values = 100 * result.share
            self.norm = Normalize(0.0, max(float(np.nanmax(self.values[rows], initial=0.0)), 1e-9))
            self.colors = look.colors
        self.lift = lift

    def bar(self, figure: Figure, axes: Any, aspect: float = 28) -> None:
        """The colour bar."""
        source = ScalarMappable(norm=self.norm, cmap=self.colors)
        bar = figure.colorbar(
            source,
            ax=axes,
            pad=0.015,
            fraction=0.03,
            aspect=aspect,
            extend="both" if self.lift else "neither",
        )
        name = "lift: times what loads explain" if self.lift else "share of the row's tokens, %"
        bar.set_label(name, color=self._look.ink, fontsize=TEXT_SIZE)
        bar.ax.tick_params(colors=self._look.ink, labelsize=TICK_SIZE)
        bar.outline.set_edgecolor(self._look.faint)
        if self.lift:
            top = int(self.norm.vmax or 1)
            powers = range(-top, top + 1)
            bar.set_ticks(
                list(powers), labels=[f"{2**n}" if n >= 0 else f"1/{2**-n}" for n in powers]
            )


def _one(result: Coactivation, row: int, look: Style, title: str) -> Figure:
    figure = look.figure(PAGE_HEIGHT, title)
    panels = _grid(figure, 1, 2, result.definition, look)[0]
    for axes, lift in zip(panels, (False, True), strict=True):
        scale = _Scale(result, look, lift=lift, rows=row)
        _map(axes, result, row, scale, look)
        scale.bar(figure, axes)
        axes.set_xlabel(_order_name(result, "expert j"))
    panels[0].set_ylabel("expert i")
    return figure


def _few(result: Coactivation, look: Style, title: str) -> Figure:
    layers = len(result.layers)
    across = layers if layers <= 3 else math.ceil(layers / 2)
    down = math.ceil(layers / across)
    figure = look.figure(PAGE_HEIGHT if down > 1 or layers < 3 else 5.8, title)
    grid = _grid(figure, down, across, result.definition, look)
    scale = _Scale(result, look, lift=result.adjacent is None)
    for place, axes in enumerate(grid.flat):
        if place >= layers:
            axes.set_axis_off()
            continue
        _map(axes, result, place, scale, look)
        axes.set_xlabel(_order_name(result, f"layer {result.layers[place]}, expert"))
    scale.bar(figure, grid.ravel().tolist())
    return figure


def _by_depth(result: Coactivation, look: Style, title: str) -> Figure:
    layers = len(result.layers)
    across = min(12, math.ceil(layers / 2))
    down = math.ceil(layers / across)
    figure = look.figure(3.8 + 1.15 * down, title)
    halves: Any = figure.subfigures(2, 1, height_ratios=[0.8 + 1.15 * down, 2.4])
    above, below = halves
    grid = _grid(above, down, across, result.definition, look)
    scale = _Scale(result, look, lift=result.adjacent is None)
    for place, axes in enumerate(grid.flat):
        if place >= layers:
            axes.set_axis_off()
            continue
        _map(axes, result, place, scale, look, small=True)
        layer = str(result.layers[place])
        axes.set_xlabel(f"layer {layer}" if place == 0 else layer, labelpad=1)
    scale.bar(above, grid.ravel().tolist(), aspect=7 * down)
    _lines(below.subplots(1, 2), result, look)
    for each in (above, below):
        each.set_facecolor(look.paper)
    return figure


def _grid(page: Any, down: int, across: int, caption: str, look: Style) -> NDArray:
    """[down, across] axes below a caption as wide as all of them together."""
    grid = page.add_gridspec(down + 1, across, height_ratios=[0.01, *[1.0] * down])
    head = page.add_subplot(grid[0, :])
    head.set_axis_off()
    write_caption(head, caption, look)
    panels = [[page.add_subplot(grid[y + 1, x]) for x in range(across)] for y in range(down)]
    return np.array(panels, dtype=object)


def _lines(panels: Any, result: Coactivation, look: Style) -> None:
    """What changes by depth: the best partner, and how much the pairs fall into groups."""
    color = group_colors(1, look)[0]
    partner = 100 * result.partner_share
    modularity = np.array(
        [[each.modularity, each.null] for each in result.groups], dtype=np.float64
    )
    drawn = (
        (partner, "best partner, %", ("chosen", "by chance")),
        (modularity, "modularity", ("pairs above chance", "random graphs")),
    )
    for axes, (values, name, labels) in zip(panels, drawn, strict=True):
        look.dress(axes)
        axes.plot(result.layers, values[:, 0], color=color, linewidth=2.6, label=labels[0])
        axes.plot(result.layers, values[:, 1], ":", color=look.ink, linewidth=2.0, label=labels[1])
        axes.set_ylim(0, None)
        axes.set_xlabel("layer")
        axes.set_ylabel(name)
        axes.set_xticks(result.layers[:: max(1, len(result.layers) // 12)])
        axes.grid(visible=True, axis="y", color=look.faint, linewidth=0.6)
        axes.set_axisbelow(True)
        name_lines(axes, look, loc="best", bbox_to_anchor=None)


def _map(
    axes: Any, result: Coactivation, row: int, scale: _Scale, look: Style, *, small: bool = False
) -> None:
    """Experts by experts in the order of the result, communities framed."""
    order = result.order[row]
    values = scale.values[row][np.ix_(order, order)]
    axes.imshow(values, cmap=scale.colors, norm=scale.norm, aspect="auto", interpolation="nearest")
    look.dress(axes)
    if small or len(order) > _NAMED:
        axes.set_xticks([])
        axes.set_yticks([])
    else:
        names = [str(expert) for expert in order]
        axes.set_xticks(range(len(order)), names, fontsize=TICK_SIZE - 2, rotation=90)
        axes.set_yticks(range(len(order)), names, fontsize=TICK_SIZE - 2)
    start = -0.5
    for members in result.groups[row].members:
        axes.add_patch(
            Rectangle(
                (start, start),
                len(members),
                len(members),
                fill=False,
                edgecolor=look.ink,
                linewidth=0.6 if small else 1.6,
            )
        )
        start += len(members)


def _order_name(result: Coactivation, name: str) -> str:
    """Says that experts stand in another order, where their ids have no room."""
    width = result.together.shape[-1]
    return name if width <= _NAMED else f"{name} ({width}, grouped)"


def _log_lift(result: Coactivation) -> NDArray[np.float64]:
    """log2 lift; a pair that was never chosen has the lowest colour."""
    lift = result.lift
    return np.log2(np.where(lift > 0, lift, np.where(lift == 0, 2.0 ** -(2 * _LARGEST), np.nan)))


def _diverging(look: Style) -> Colormap:
    """Blue for less, the paper for chance, orange for more: apart with any colour blindness.

    Most pairs are a little rarer than by chance, so blue is held back.
    """
    less, more = group_colors(2, look)
    made: Any = LinearSegmentedColormap.from_list
    held = made("less", [look.paper, less])(0.7)
    colors: Colormap = made("lift", [held, look.paper, more])
    return colors.with_extremes(bad=look.faint)
