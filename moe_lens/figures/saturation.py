"""How much of the final routing each checkpoint has, layer by layer, as a picture.

save_picture(draw_saturation, saturation(traces, steps=steps), "saturation.png")
"""

from __future__ import annotations

import textwrap
from typing import Any

from matplotlib.cm import ScalarMappable
from matplotlib.colors import Colormap, ListedColormap, Normalize
from matplotlib.figure import Figure

from moe_lens.analysis.saturation import Overlap, Saturation

from .styles import LINE_LENGTH, TEXT_SIZE, TICK_SIZE, Style, style_named

__all__ = ["draw_saturation"]


def draw_saturation(
    result: Saturation,
    *,
    fraction: bool = False,
    style: str = "light",
    subtitle: str | None = None,
) -> Figure:
    """The picture as a matplotlib figure: a line for each layer, coloured by its depth.

    With `fraction`, the share of the steps stands to the right instead of the steps.
    """
    look = style_named(style)
    title = result.title if subtitle is None else f"{result.title} · {subtitle}"
    figure = look.figure(7.2, title)
    asked = [("all choices as the last", result.final), ("first choice as the last", result.first)]
    if len(result.names) > 2:
        asked.append(("all choices as the next", result.next))
    # The caption belongs to all panels: above the first one alone it would widen that panel.
    body: Any = figure.subfigures(1, 1)
    body.set_facecolor(look.paper)
    caption = "\n".join(textwrap.wrap(result.definition, LINE_LENGTH))
    body.suptitle(
        caption, x=0.008, ha="left", fontsize=TEXT_SIZE - 1, color=look.ink, parse_math=False
    )
    panels = body.subplots(1, len(asked), sharey=True)
    places = 100 * result.fraction[:-1] if fraction else result.steps[:-1]
    depth = Normalize(result.layers[0], max(result.layers[-1], result.layers[0] + 1))
    colors = _depths(look)
    for axes, (name, each) in zip(panels, asked, strict=True):
        _panel(axes, places, each, look, [colors(depth(layer)) for layer in result.layers])
        axes.set_xlabel("% of the steps" if fraction else "step")
        axes.text(
            0.02, 0.98, name, transform=axes.transAxes, va="top", color=look.ink, fontsize=TEXT_SIZE
        )
    panels[0].set_ylabel("choices that are the same, %", fontsize=TEXT_SIZE)
    panels[0].set_ylim(0, 108)
    panels[0].set_yticks(range(0, 101, 20))
    bar = body.colorbar(ScalarMappable(depth, colors), ax=panels, pad=0.012, fraction=0.03)
    bar.set_label("layer", color=look.ink, fontsize=TEXT_SIZE)
    bar.set_ticks(result.layers[:: max(1, len(result.layers) // 12)])
    bar.ax.tick_params(colors=look.ink, labelsize=TICK_SIZE)
    bar.outline.set_edgecolor(look.faint)
    return figure


def _panel(axes: Any, places: Any, asked: Overlap, look: Style, colors: list[Any]) -> None:
    look.dress(axes)
    for layer, color in enumerate(colors):
        axes.plot(
            places, 100 * asked.value[:, layer], "o-", color=color, linewidth=1.8, markersize=4
        )
        axes.fill_between(
            places,
            100 * asked.low[:, layer],
            100 * asked.high[:, layer],
            color=color,
            alpha=0.12,
            linewidth=0,
        )
    random = 100 * float(asked.random.mean())
    axes.axhline(random, color=look.ink, linestyle=":", linewidth=1.6)
    axes.annotate(
        f"random {random:.3g} %",
        (1.0, random),
        xycoords=("axes fraction", "data"),
        xytext=(-4, 3),
        textcoords="offset points",
        ha="right",
        color=look.ink,
        fontsize=TICK_SIZE,
    )
    axes.grid(visible=True, axis="y", color=look.faint, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.xaxis.get_major_locator().set_params(nbins=6)
    axes.ticklabel_format(axis="x", style="plain", useOffset=False)


def _depths(look: Style) -> Colormap:
    """The style's scale without the end that is near the paper."""
    return ListedColormap([look.colors(0.25 + 0.75 * step / 255) for step in range(256)])
