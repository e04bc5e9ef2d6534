"""What changes with depth: what a layer tells of the next, how alike they are, who specialises.

save_picture(draw_depth, pipeline(trace), "depth.png")
"""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from moe_lens.analysis.pipeline import Pipeline

from .series import group_colors, name_lines
from .styles import TEXT_SIZE, Style, style_named, write_caption

__all__ = ["draw_depth"]


def draw_depth(result: Pipeline, *, style: str = "light", subtitle: str | None = None) -> Figure:
    """The picture as a matplotlib figure: one panel for each question, layers to the right."""
    look = style_named(style)
    title = result.title if subtitle is None else f"{result.title} · {subtitle}"
    rows = 1 if result.roles is None else 2
    figure = look.figure(1.6 + 3.9 * rows, title)
    panels = figure.subplots(rows, 2, squeeze=False)
    _draw_information(panels[0, 0], result, look)
    _draw_matching(panels[0, 1], result, look)
    if result.roles is not None:
        _draw_effective(panels[1, 0], result, look)
        _draw_specialised(panels[1, 1], result, look)
    write_caption(panels[0, 0], result.definition, look)
    return figure


def _draw_information(axes: Any, result: Pipeline, look: Style) -> None:
    told, colors = result.information, group_colors(4, look)
    at = _between(result)
    _line(axes, at, told.bits, told.low, told.high, colors[0], "first choices")
    for rank in range(1, min(3, len(told.ranks))):
        name = f"choices of rank {rank + 1}"
        axes.plot(at, told.ranks[rank], color=colors[rank], linewidth=1.6, marker=".", label=name)
    axes.plot(at, told.prompt, "--", color=look.ink, label="by the prompt alone")
    axes.set_ylim(0, None)
    _finish(axes, result, "bits told of the next layer", look, at)
    _name_inside(axes, look)


def _draw_matching(axes: Any, result: Pipeline, look: Style) -> None:
    found, colors, at = result.matching, group_colors(2, look), _between(result)
    _line(axes, at, found.score, found.low, found.high, colors[0], f"alike, by {found.by}")
    axes.plot(at, found.null, "--", color=colors[0], label="by chance")
    _line(axes, at, found.flow, found.flow_low, found.flow_high, colors[1], "flow along it")
    axes.plot(at, found.flow_random, "--", color=colors[1], label="by load")
    axes.set_ylim(0, 1.05)
    _finish(axes, result, "similarity, share of tokens", look, at)
    _name_inside(axes, look)


def _draw_effective(axes: Any, result: Pipeline, look: Style) -> None:
    assert result.roles is not None
    roles = result.roles
    layers = np.array(result.layers, dtype=np.float64)
    for place, color in enumerate(group_colors(len(roles.names), look)):
        low, high = roles.low[place], roles.high[place]
        _line(axes, layers, roles.effective[place], low, high, color, roles.names[place])
    _finish(axes, result, "effective experts of a label", look, layers)


def _draw_specialised(axes: Any, result: Pipeline, look: Style) -> None:
    assert result.roles is not None
    colors = group_colors(len(result.roles.names), look)
    below = np.zeros(len(result.layers))
    for place, name in enumerate(result.roles.names):
        own = (result.roles.label_of == place).sum(axis=1)
        axes.bar(result.layers, own, 0.8, bottom=below, color=colors[place], label=name)
        below += own
    _finish(axes, result, "experts that are a label's own", look, np.array(result.layers))
    # The colours are those of the panel before it.
    name_lines(axes, look)


def _between(result: Pipeline) -> NDArray[np.float64]:
    """Between two layers, where what joins them is drawn."""
    layers = np.array(result.layers, dtype=np.float64)
    return (layers[1:] + layers[:-1]) / 2


def _line(
    axes: Any,
    at: NDArray[np.float64],
    value: NDArray[np.float64],
    low: NDArray[np.float64],
    high: NDArray[np.float64],
    color: str,
    name: str,
) -> None:
    axes.plot(at, value, color=color, linewidth=2.2, marker="o", markersize=4, label=name)
    axes.fill_between(at, low, high, color=color, alpha=0.2, linewidth=0)
    if len(at) == 1:
        axes.vlines(at, low, high, color=color, alpha=0.5, linewidth=4)


def _name_inside(axes: Any, look: Style) -> None:
    name_lines(axes, look, loc="best", bbox_to_anchor=None, frameon=True, framealpha=0.7)


def _finish(axes: Any, result: Pipeline, name: str, look: Style, at: NDArray[Any]) -> None:
    look.dress(axes)
    axes.set_xlim(min(at[0], result.layers[0]) - 0.5, result.layers[-1] + 0.5)
    axes.set_xticks(result.layers[:: max(1, len(result.layers) // 12)])
    axes.set_xlabel("layer")
    axes.set_ylabel(name, fontsize=TEXT_SIZE)
    axes.grid(visible=True, axis="y", color=look.faint, linewidth=0.6)
    axes.set_axisbelow(True)
