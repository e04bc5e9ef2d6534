"""Which expert prefers which domain, and how far layers tell domains apart, as a picture.

save_picture(draw_domains, domains(trace), "domains.png")

Small models show every rate, a panel for each layer; large ones show which domain claims each
expert, a row for each layer. Either way experts stand in the order of the domain they prefer.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize, to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from numpy.typing import NDArray

from moe_lens.analysis.domains import Domains

from .colors import hex_color, readable_on
from .series import group_colors, name_lines
from .styles import TEXT_SIZE, TICK_SIZE, Style, style_named, write_caption

__all__ = ["draw_domains"]

# Panels of rates stand in a row as long as so many cells stay readable.
RATE_LAYERS, RATE_EXPERTS, RATE_DOMAINS = 4, 32, 12
NAMED_DOMAINS = 12
NUMBERED_EXPERTS = 32


def draw_domains(result: Domains, *, style: str = "light", subtitle: str | None = None) -> Figure:
    """The picture as a matplotlib figure: experts to the left, bits by layer to the right."""
    look = style_named(style)
    title = result.title if subtitle is None else f"{result.title} · {subtitle}"
    domains, layers, experts = result.rate.shape
    if layers <= RATE_LAYERS and experts <= RATE_EXPERTS and domains <= RATE_DOMAINS:
        figure = look.figure(max(4.6, 1.9 + layers * (0.55 + 0.3 * domains)), title)
        grid = figure.add_gridspec(layers, 2, width_ratios=(3.4, 1))
        panels = [figure.add_subplot(grid[place, 0]) for place in range(layers)]
        scale = Normalize(0.0, 100 * float(np.nanmax(result.rate)))
        for place, axes in enumerate(panels):
            _rates(axes, result, place, look, scale)
        bar = figure.colorbar(
            ScalarMappable(scale, look.colors), ax=panels, pad=0.012, fraction=0.03, aspect=40
        )
        bar.set_label("% of the domain's tokens", color=look.ink, fontsize=TEXT_SIZE)
        bar.ax.tick_params(colors=look.ink, labelsize=TICK_SIZE)
        bar.outline.set_edgecolor(look.faint)  # type: ignore[operator]
    else:
        figure = look.figure(min(13.0, max(7.2, 3.2 + 0.17 * layers)), title)
        grid = figure.add_gridspec(1, 2, width_ratios=(3.4, 1))
        panels = [figure.add_subplot(grid[0, 0])]
        _claims(panels[0], result, look)
    _bits(figure.add_subplot(grid[:, 1]), result, look)
    write_caption(panels[0], result.definition, look)
    return figure


def _order(result: Domains, place: int) -> NDArray[np.int64]:
    """Experts by the domain they prefer, the clearest of each first; unused ones last."""
    lift = np.where(np.isnan(result.lift[:, place]), 0.0, result.lift[:, place])
    domain = np.where(lift.max(axis=0) > 0, lift.argmax(axis=0), len(lift))
    return np.lexsort((-lift.max(axis=0), domain))


def _rates(axes: Any, result: Domains, place: int, look: Style, scale: Normalize) -> None:
    order = _order(result, place)
    table = 100 * result.rate[:, place, order]
    axes.imshow(table, cmap=look.colors, norm=scale, aspect="auto", interpolation="nearest")
    look.dress(axes)
    axes.set_xticks(range(len(order)), [str(expert) for expert in order])
    axes.set_yticks(range(len(table)), result.domains)
    for text in axes.get_yticklabels():
        text.set_parse_math(False)
    axes.set_ylabel(f"layer {result.layers[place]}")
    if place == len(result.layers) - 1:
        axes.set_xlabel("expert, in the order of the domain it prefers; bold: claimed")
    for (row, column), value in np.ndenumerate(table):
        red, green, blue, _ = look.colors(scale(value), bytes=True)
        claimed = bool(result.claimed[row, place, order[column]])
        axes.text(
            column,
            row,
            f"{value:.0f}",
            ha="center",
            va="center",
            color=hex_color(readable_on((int(red), int(green), int(blue)))),
            fontsize=TICK_SIZE - 1,
            fontweight="bold" if claimed else "normal",
        )


def _claims(axes: Any, result: Domains, look: Style) -> None:
    """Rows are layers; the hue of a cell is the domain that claims it, its depth the lift."""
    domains, layers, experts = result.rate.shape
    colors = np.array([to_rgb(color) for color in group_colors(min(domains, NAMED_DOMAINS), look)])
    # Beyond the colours that can be told apart, the domains with most claims are named.
    named = np.argsort(-result.claimed.sum(axis=(1, 2)), kind="stable")[:NAMED_DOMAINS]
    named = np.sort(named)
    of_domain = np.tile(to_rgb(look.ink), (domains, 1))
    of_domain[named] = colors
    paper, empty = np.array(to_rgb(look.paper)), np.array(look.colors.get_bad()[:3])
    lift = np.where(result.claimed, result.lift, 0.0)
    best, strength = lift.argmax(axis=0), lift.max(axis=0)
    depth = np.clip(np.log(np.maximum(strength, 1.0)) / np.log(min(domains, 6)), 0, 1)[..., None]
    paint = np.where(
        strength[..., None] > 0,
        paper + (of_domain[best] - paper) * (0.3 + 0.7 * depth),
        empty,
    )
    rank = np.where(strength > 0, best, domains)
    order = np.stack([np.lexsort((-strength[place], rank[place])) for place in range(layers)])
    paint = np.take_along_axis(paint, order[..., None], axis=1)
    axes.imshow(paint, aspect="auto", interpolation="nearest")
    look.dress(axes)
    if experts <= NUMBERED_EXPERTS and layers <= 24:
        for (row, column), expert in np.ndenumerate(order):
            red, green, blue = (int(255 * each) for each in paint[row, column])
            axes.text(
                *(column, row, str(expert)),
                ha="center",
                va="center",
                color=hex_color(readable_on((red, green, blue))),
                fontsize=TICK_SIZE - 1,
            )
        axes.set_xticks([])
    step = 1
    while layers / step > 40:
        step *= 2
    axes.set_yticks(range(0, layers, step), [str(layer) for layer in result.layers[::step]])
    axes.set_ylabel("layer")
    axes.set_xlabel("experts, in each layer in the order of the domain that claims them")
    patches = [Patch(color=of_domain[place], label=result.domains[place]) for place in named]
    if domains > len(named):
        patches.append(Patch(color=look.ink, label="another domain"))
    patches.append(Patch(color=empty, label="not claimed"))
    name_lines(
        axes,
        look,
        handles=patches,
        loc="upper center",
        bbox_to_anchor=(0.5, -0.6 / axes.figure.get_figheight()),
        ncols=7,
        title=None,
    )


def _bits(axes: Any, result: Domains, look: Style) -> None:
    """Layers downwards, as in the maps beside it."""
    look.dress(axes)
    names = (("information", result.information), ("divergence", result.divergence))
    for color, (name, found) in zip(group_colors(2, look), names, strict=True):
        axes.plot(found.value, result.layers, color=color, marker="o", markersize=4, label=name)
        axes.fill_betweenx(
            result.layers, found.low, found.high, color=color, alpha=0.2, linewidth=0
        )
        axes.plot(found.shuffled, result.layers, "--", color=color, marker=_only(result, "x"))
        if len(result.layers) == 1:
            axes.hlines(result.layers, found.low, found.high, color=color, linewidth=8, alpha=0.3)
    axes.plot([], [], "--", color=look.ink, marker=_only(result, "x"), label="labels shuffled")
    axes.set_xlim(0, None)
    first, last = result.layers[0] - 0.5, result.layers[-1] + 0.5
    axes.set_ylim(last, first)
    axes.set_yticks(result.layers[:: max(1, len(result.layers) // 12)])
    axes.set_xlabel("bits")
    axes.set_ylabel("layer", fontsize=TEXT_SIZE)
    axes.grid(visible=True, axis="x", color=look.faint, linewidth=0.6)
    axes.set_axisbelow(True)
    height = axes.figure.get_figheight()
    below = -0.5 / (height - 2.4)
    name_lines(axes, look, loc="upper center", bbox_to_anchor=(0.5, below))


def _only(result: Domains, marker: str) -> str:
    """`marker` where one layer makes no line."""
    return marker if len(result.layers) == 1 else ""
