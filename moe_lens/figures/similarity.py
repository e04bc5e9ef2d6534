"""How alike the experts of each layer are, as a picture: pairs layer by layer, and their means.

save_picture(draw_similarity, found, "similarity.png", measure="outputs")
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from numpy.typing import NDArray
from scipy.cluster.hierarchy import leaves_list, linkage, optimal_leaf_ordering
from scipy.spatial.distance import squareform

from moe_lens.analysis.similarity.measures import Measure
from moe_lens.analysis.similarity.similarity import ExpertSimilarity
from moe_lens.analysis.similarity.weights import LYING
from moe_lens.errors import UsageError
from moe_lens.trace import place_of

from .series import group_colors, name_lines
from .styles import TEXT_SIZE, TICK_SIZE, Style, style_named, write_caption

__all__ = ["draw_similarity", "expert_order"]

MOST_PANELS = 8
NUMBERED = 20
"""Experts whose ids fit at the side of a panel."""


def draw_similarity(
    result: ExpertSimilarity,
    *,
    measure: str | None = None,
    layers: Sequence[int] | None = None,
    style: str = "light",
    subtitle: str | None = None,
) -> Figure:
    """The picture as a matplotlib figure.

    A panel for each layer, its experts in the order of a clustering, so that those alike stand
    together; below them the mean over pairs and the nearest partners of all layers.

    Args:
        result: What `moe_lens.analysis.similarity` found.
        measure: Name of the measure that the panels show; by default the first of the result.
        layers: Model layer index of each panel, 8 at most; by default evenly spread ones.
        style: ``"light"`` or ``"dark"``.
        subtitle: Put after the title, such as the name of the model.

    Raises:
        UsageError: The style, measure or a layer is not known.
    """
    look = style_named(style)
    shown = result.heads[0] if measure is None else result.measure(measure)
    places = _places(result, layers)
    title = f"Similarity of experts by {shown.name}"
    figure = look.figure(
        9.6 if len(places) > 4 else 8.6, title if subtitle is None else f"{title} · {subtitle}"
    )
    heights = (2.0, 1.0) if len(places) > 4 else (1.35, 1.0)
    parts: Any = figure.subfigures(2, 1, height_ratios=heights)
    upper, lower = parts
    for part in (upper, lower):
        part.set_facecolor(look.paper)
    across = min(4, len(places))
    down = -(-len(places) // across)
    grid = upper.subplots(down, across, squeeze=False)
    scale = _scale(shown, places)
    for axes in grid.ravel()[len(places) :]:
        axes.set_visible(False)
    for axes, place in zip(grid.ravel(), places, strict=False):
        _panel(axes, shown.values[place], result.layers[place], look, scale)
    bar = upper.colorbar(ScalarMappable(scale, look.colors), ax=grid, pad=0.012, fraction=0.03)
    bar.set_label(f"{shown.name} (1: the same)", color=look.ink, fontsize=TEXT_SIZE)
    bar.ax.tick_params(colors=look.ink, labelsize=TICK_SIZE)
    bar.outline.set_edgecolor(look.faint)
    _summary(lower.subplots(), result, shown, look)
    return figure


def expert_order(table: NDArray[np.floating]) -> NDArray[np.int64]:
    """[E] experts in an order in which those alike are neighbours.

    Average linkage of 1 - value, its leaves turned so that neighbours are as alike as they can
    be; pairs without a value count as unlike as any.
    """
    if len(table) < 3:
        return np.arange(len(table))
    known = table[~np.isnan(table)]
    if len(known) == 0:
        return np.arange(len(table))
    filled = np.where(np.isnan(table), known.min(), table).astype(np.float64)
    distance = filled.max() - filled
    np.fill_diagonal(distance, 0.0)
    pairs = squareform(distance, checks=False)
    order: NDArray[np.int64] = leaves_list(optimal_leaf_ordering(linkage(pairs, "average"), pairs))
    return order.astype(np.int64)


def _places(result: ExpertSimilarity, layers: Sequence[int] | None) -> list[int]:
    if not layers:
        spread = np.linspace(0, len(result.layers) - 1, min(MOST_PANELS, len(result.layers)))
        return sorted({int(place) for place in spread.round()})
    if len(layers) > MOST_PANELS:
        raise UsageError(f"a picture has room for {MOST_PANELS} layers, not {len(layers)}")
    return [place_of(result.layers, layer) for layer in layers]


def _scale(shown: Measure, places: list[int]) -> Normalize:
    values = np.concatenate([shown.values[place].ravel() for place in places])
    values = values[~np.isnan(values)]
    if len(values) == 0:
        raise UsageError(f"{shown.name} was not measured for any pair of these layers")
    low, high = float(min(0.0, values.min())), float(values.max())
    return Normalize(low, max(high, low + 1e-6))


def _panel(
    axes: Any, table: NDArray[np.floating], layer: int, look: Style, scale: Normalize
) -> None:
    order = expert_order(table)
    image = np.ma.masked_invalid(table[np.ix_(order, order)])
    axes.imshow(image, cmap=look.colors, norm=scale, interpolation="nearest")
    look.dress(axes)
    axes.set_title(f"layer {layer}", fontsize=TEXT_SIZE, color=look.ink)
    if len(table) > NUMBERED:
        axes.set_xticks([])
        axes.set_yticks([])
        return
    size = TICK_SIZE - 4 if len(table) > 10 else TICK_SIZE
    axes.set_xticks(range(len(table)), [str(expert) for expert in order], fontsize=size)
    axes.set_yticks(range(len(table)), [str(expert) for expert in order], fontsize=size)


def _summary(axes: Any, result: ExpertSimilarity, shown: Measure, look: Style) -> None:
    """Means over pairs and nearest partners, layer by layer."""
    look.dress(axes)
    colors = group_colors(2, look)
    means = shown.means()
    nearest = [shown.nearest(place)[1] for place in range(len(result.layers))]
    middle = [float(np.nanmedian(each)) if (~np.isnan(each)).any() else np.nan for each in nearest]
    highest = [float(np.nanmax(each)) if (~np.isnan(each)).any() else np.nan for each in nearest]
    layers = result.layers
    axes.plot(layers, highest, ":", color=colors[1], linewidth=2, label="nearest pair")
    axes.plot(
        layers,
        middle,
        color=colors[1],
        linewidth=2.4,
        marker="o",
        label="nearest of an expert, median",
    )
    axes.plot(
        layers, means.mean, color=colors[0], linewidth=2.4, marker="o", label="mean of all pairs"
    )
    axes.fill_between(layers, means.low, means.high, color=colors[0], alpha=0.2, linewidth=0)
    if result.origins is not None and shown.name == LYING:
        axes.axhline(
            result.origins.chance,
            color=look.ink,
            linestyle="--",
            linewidth=1.2,
            label="chance (5 sd)",
        )
    axes.set_xlabel("layer")
    axes.set_ylabel(shown.name, fontsize=TEXT_SIZE)
    axes.set_xticks(layers[:: max(1, len(layers) // 24)])
    axes.grid(visible=True, axis="y", color=look.faint, linewidth=0.6)
    axes.set_axisbelow(True)
    name_lines(axes, look)
    write_caption(axes, _caption(shown), look)


def _caption(shown: Measure) -> str:
    return (
        f"{shown.name}: {shown.says}, for two experts of a layer. Experts are ordered by average "
        "linkage, layer by layer. Band: 95 %, jackknife over experts."
    )
