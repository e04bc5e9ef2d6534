"""How evenly experts are loaded, layer by layer, as a picture.

save_picture(draw_balance, balance(trace), "balance.png")

To the left experts in the order of their load, as curves of a few layers or as a map of many; to
the right what sums it up, each against a router that chooses at random.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure

from moe_lens.analysis.balance import Balance, PerLayer

from .series import group_colors, name_lines
from .styles import TEXT_SIZE, TICK_SIZE, Style, style_named, write_caption

__all__ = ["draw_balance"]

CURVES = 8
"""Layers whose curves can be told apart; more are drawn as a map."""


def draw_balance(result: Balance, *, style: str = "light", subtitle: str | None = None) -> Figure:
    """The picture as a matplotlib figure: loads to the left, four summaries to the right."""
    look = style_named(style)
    title = result.title if subtitle is None else f"{result.title} · {subtitle}"
    many = len(result.layers) > CURVES
    figure = look.figure(min(11.0, max(7.6, 3.0 + 0.15 * len(result.layers))), title)
    shown: list[tuple[str, PerLayer, float]] = [
        ("MaxVio", result.max_violation, 1.0),
        ("Gini", result.gini, 1.0),
        ("entropy of load / log E", result.entropy, 1.0),
    ]
    if result.softmax_mass is None:
        shown.append(("CV", result.cv, 1.0))
    else:
        shown.append(("softmax of the chosen, %", result.softmax_mass, 100.0))
    grid = figure.add_gridspec(4, 2, width_ratios=(1.7, 1))
    loads = figure.add_subplot(grid[:, 0])
    (_map if many else _curves)(loads, result, look)
    write_caption(loads, result.definition, look)
    panels = [figure.add_subplot(grid[place, 1]) for place in range(4)]
    for axes, (name, found, scale) in zip(panels, shown, strict=True):
        _summary(axes, result, found, name, scale, look)
    for axes in panels[:-1]:
        axes.tick_params(labelbottom=False)
    panels[-1].set_xlabel("layer")
    panel = 0.2 * (figure.get_figheight() - 2)
    name_lines(panels[-1], look, loc="upper center", bbox_to_anchor=(0.45, -0.5 / panel), ncols=3)
    return figure


def _relative(result: Balance) -> np.ndarray:
    """[layers, E] share of all prompts, times E, highest first; NaN of missing experts last."""
    load = result.share[0] * result.experts[:, None]
    return -np.sort(-load, axis=1)


def _curves(axes: Any, result: Balance, look: Style) -> None:
    look.dress(axes)
    loads = _relative(result)
    for color, layer, load in zip(
        group_colors(len(loads), look), result.layers, loads, strict=True
    ):
        rank = np.arange(1, len(load) + 1)
        axes.plot(rank, load, color=color, marker="o", markersize=4, label=f"layer {layer}")
    axes.axhline(1.0, color=look.ink, linestyle=":", label="even")
    axes.set_ylim(0, None)
    axes.set_xlim(0.5, loads.shape[1] + 0.5)
    axes.set_xlabel("experts of the layer, from the most to the least loaded")
    axes.set_ylabel("load, times the mean of the layer", fontsize=TEXT_SIZE)
    axes.grid(visible=True, axis="y", color=look.faint, linewidth=0.6)
    axes.set_axisbelow(True)
    name_lines(axes, look, loc="best", bbox_to_anchor=None)


def _map(axes: Any, result: Balance, look: Style) -> None:
    look.dress(axes)
    loads = _relative(result)
    top = max(2.0, float(np.nanmax(loads)))
    scale = LogNorm(1 / 8, top, clip=True)
    image = np.where(loads > 0, loads, 1 / 8)
    axes.imshow(
        np.where(np.isnan(loads), np.nan, image),
        cmap=look.colors,
        norm=scale,
        aspect="auto",
        interpolation="nearest",
        extent=(0.5, loads.shape[1] + 0.5, len(loads) - 0.5, -0.5),
    )
    step = 1
    while len(loads) / step > 40:
        step *= 2
    axes.set_yticks(range(0, len(loads), step), [str(layer) for layer in result.layers[::step]])
    axes.set_ylabel("layer")
    axes.set_xlabel("experts of each layer, from the most to the least loaded")
    bar = axes.figure.colorbar(
        ScalarMappable(scale, look.colors), ax=axes, pad=0.012, fraction=0.04, aspect=40
    )
    ticks = [each for each in (1 / 8, 1 / 4, 1 / 2, 1, 2, 4, 8, 16, 32, 64) if each <= top]
    names = ["1/8 or less", "1/4", "1/2", "1", *(f"{each:g}" for each in ticks[4:])]
    bar.set_ticks(ticks, labels=names)
    bar.minorticks_off()
    bar.set_label("load, times the mean of the layer", color=look.ink, fontsize=TEXT_SIZE)
    bar.ax.tick_params(colors=look.ink, labelsize=TICK_SIZE)
    bar.outline.set_edgecolor(look.faint)


def _summary(
    axes: Any, result: Balance, found: PerLayer, name: str, scale: float, look: Style
) -> None:
    look.dress(axes)
    (color,) = group_colors(1, look)
    value, even = scale * found.value[0], scale * found.even[0]
    axes.plot(result.layers, value, color=color, marker="o", markersize=4, label="all prompts")
    low, high = scale * found.low[0], scale * found.high[0]
    axes.fill_between(
        result.layers, low, high, color=color, alpha=0.2, linewidth=0, label="95 % interval"
    )
    only = len(result.layers) == 1
    if only:  # one layer makes no line and no band
        axes.vlines(result.layers, low, high, color=color, linewidth=8, alpha=0.3)
    marker = "x" if only else ""
    axes.plot(result.layers, even, ":", color=look.ink, marker=marker, label="at random")
    if name.startswith("entropy"):
        axes.set_ylim(None, 1.0 + 0.05 * (1.0 - min(0.9, float(np.nanmin(value)))))
    else:
        axes.set_ylim(0, None)
    axes.set_title(name, loc="left", fontsize=TEXT_SIZE, color=look.ink)
    axes.set_xticks(result.layers[:: max(1, len(result.layers) // 12)])
    axes.grid(visible=True, axis="y", color=look.faint, linewidth=0.6)
    axes.set_axisbelow(True)
