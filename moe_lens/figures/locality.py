"""Neighbouring tokens that share experts, layer by layer, as a picture.

save_picture(draw_locality, locality(trace), "locality.png")
"""

from __future__ import annotations

from typing import Any

from matplotlib.figure import Figure

from moe_lens.analysis.locality import Agreement, Locality

from .series import group_colors, name_lines
from .styles import TEXT_SIZE, Style, style_named, write_caption

__all__ = ["draw_locality"]


def draw_locality(result: Locality, *, style: str = "light", subtitle: str | None = None) -> Figure:
    """The picture as a matplotlib figure: one panel for each question, layers to the right."""
    look = style_named(style)
    title = result.title if subtitle is None else f"{result.title} · {subtitle}"
    figure = look.figure(7.2, title)
    panels = figure.subplots(1, 2)
    questions = (
        ("same first choice, % of pairs", result.first),
        ("any expert in common, % of pairs", result.any),
    )
    for axes, (name, asked) in zip(panels, questions, strict=True):
        _panel(axes, result, asked, name, look)
    name_lines(panels[-1], look)
    write_caption(panels[0], result.definition, look)
    return figure


def _panel(axes: Any, result: Locality, asked: Agreement, name: str, look: Style) -> None:
    look.dress(axes)
    colors = group_colors(len(result.groups) - 1, look)
    for place, group in enumerate(result.groups):
        color = look.ink if place == 0 else colors[place - 1]
        axes.plot(
            result.layers,
            100 * asked.value[place],
            color=color,
            linewidth=3.0 if place == 0 else 1.6,
            marker="o",
            markersize=5,
            label=group,
            zorder=3,
        )
    axes.fill_between(
        result.layers,
        100 * asked.low[0],
        100 * asked.high[0],
        color=look.ink,
        alpha=0.15,
        linewidth=0,
    )
    axes.plot(result.layers, 100 * asked.shuffled[0], "--", color=look.ink, label="all, shuffled")
    axes.plot(result.layers, 100 * asked.random, ":", color=look.ink, label="random")
    axes.set_ylim(0, None)
    axes.set_xlabel("layer")
    axes.set_ylabel(name, fontsize=TEXT_SIZE)
    axes.set_xticks(result.layers[:: max(1, len(result.layers) // 12)])
    axes.grid(visible=True, axis="y", color=look.faint, linewidth=0.6)
    axes.set_axisbelow(True)
