"""Experts across layers as pictures: where tokens flow, and what changes with depth.

save_picture(draw_pipeline, found, "flow.png")
save_picture(draw_pipeline, found, "math.png", label="math")
save_picture(draw_depth, found, "depth.png", style="dark")
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from moe_lens.analysis.pipeline import Pipeline
from moe_lens.analysis.pipeline.chains import Chain
from moe_lens.analysis.pipeline.flows import Flows
from moe_lens.errors import UsageError

from .alluvial import Columns, draw_band, draw_bars
from .series import group_colors, name_lines
from .styles import PAGE_WIDTH, TEXT_SIZE, Style, style_named, write_caption

__all__ = ["draw_pipeline"]

BARS = 20
"""Experts of a layer that have a bar, where all of them have room."""

FEW_BARS = 12
"""Experts of a layer that have a bar, of more."""

ROW = 13
"""Layers side by side; more are continued below."""

BANDS = 48
"""Coloured bands between two layers."""

THINNEST = 0.0012
"""Of a column's height: bands below it are not drawn."""

NO_LABEL = "no label"


def draw_pipeline(
    result: Pipeline,
    *,
    style: str = "light",
    subtitle: str | None = None,
    label: str | None = None,
    layers: Sequence[int] | None = None,
) -> Figure:
    """The flow diagram as a matplotlib figure.

    Args:
        result: What `moe_lens.analysis.pipeline.pipeline` returned.
        style: ``"light"`` or ``"dark"``.
        subtitle: Put after the title, such as the name of the model.
        label: Only this label's tokens, with its chain framed.
        layers: Model layer indices to show, successive MoE layers; all by default.

    Raises:
        UsageError: The style, label or layers are not known.
    """
    look = style_named(style)
    places = _places(result, layers)
    groups = _groups(result.flows, label)
    chain = next((each for each in result.chains if each.label == label), None)
    counts, experts = _folded(result.flows, places, groups, chain)
    rows = [places[start : start + ROW] for start in range(0, len(places) - 1, ROW - 1)]
    inches = 5.4 if len(rows) == 1 else 4.2
    # A row begins with the layer that the row above ends with.
    tokens = int(result.flows.tokens[groups].sum())
    title = f"First choices of {tokens:,} tokens, layer by layer"
    title += "" if label is None else f", {label} only"
    figure = look.figure(1.9 + inches * len(rows), title + (f" · {subtitle}" if subtitle else ""))
    panels = figure.subplots(len(rows), 1, squeeze=False)[:, 0]
    colored = total = 0.0
    for axes, row in zip(panels, rows, strict=True):
        start = row[0] - places[0]
        part = counts[:, start : start + len(row) - 1]
        shown = experts[start : start + len(row)]
        some, every = _draw_row(axes, result, row, part, shown, groups, chain, look, inches)
        colored, total = colored + some, total + every
        words = "layer " if len(places) <= 8 else ""
        axes.set_xticks(range(len(row)), [f"{words}{result.layers[place]}" for place in row])
        axes.set_xlim(-0.2, min(ROW, len(places)) - 0.8)
    if len(places) > 8:
        panels[-1].set_xlabel("layer")
    _name_groups(panels[0], result.flows, groups, look)
    share = colored / max(total, 1)
    write_caption(panels[0], _caption(result, chain, len(groups), share, counts), look)
    return figure


def _places(result: Pipeline, layers: Sequence[int] | None) -> list[int]:
    """Places among the MoE layers of those to show."""
    if layers is None:
        return list(range(len(result.layers)))
    known = [place for place, layer in enumerate(result.layers) if layer in set(layers)]
    if len(known) < 2 or known != list(range(known[0], known[-1] + 1)):
        raise UsageError(
            f"a flow diagram shows two or more successive MoE layers; the MoE layers are "
            f"{result.layers[0]} to {result.layers[-1]}"
        )
    return known


def _groups(flows: Flows, label: str | None) -> list[int]:
    """Groups to show: those with tokens, or the one that is asked for."""
    if label is None:
        return [place for place, many in enumerate(flows.tokens) if many]
    named = [name for name in flows.groups if name]
    if label not in named:
        there = f"the labels are {', '.join(named)}" if named else "the prompts have no labels"
        raise UsageError(f"there is no label {label!r}; {there}")
    return [flows.groups.index(label)]


def _folded(
    flows: Flows, places: list[int], groups: list[int], chain: Chain | None
) -> tuple[NDArray[np.int64], list[list[int]]]:
    """Counts of the groups, layers and bars that are drawn, and the experts of the bars."""
    counts = flows.counts[groups][:, places[0] : places[-1]]
    every = counts.sum(axis=0)
    load = np.concatenate([every.sum(axis=2), every[-1:].sum(axis=1)])[:, :-1]
    rate = np.zeros(load.shape)
    for group, table in zip(groups, counts, strict=True):
        own = np.concatenate([table.sum(axis=2), table[-1:].sum(axis=1)])[:, :-1]
        rate = np.maximum(rate, own / max(1, int(flows.tokens[group])))
    if chain is not None:
        for row, layer in enumerate(places):
            rate[row] += np.isin(flows.experts[layer], chain.experts[layer])
    bars = load.shape[1] if load.shape[1] <= BARS else FEW_BARS
    kept = np.sort(np.argsort(-rate, axis=1, kind="stable")[:, :bars], axis=1)
    place = np.full((len(kept), flows.counts.shape[-1]), bars)
    np.put_along_axis(place, kept, np.arange(bars)[None], axis=1)
    folded = np.zeros((*counts.shape[:2], bars + 1, bars + 1), dtype=np.int64)
    for pair in range(counts.shape[1]):
        where = (slice(None), place[pair][:, None], place[pair + 1][None])
        for group in range(len(counts)):
            np.add.at(folded[group, pair], where[1:], counts[group, pair])
    names = [
        [flows.experts[layer][number] for number in row]
        for layer, row in zip(places, kept.tolist(), strict=True)
    ]
    return folded, names


def _order(counts: NDArray[np.int64]) -> NDArray[np.int64]:
    """[columns, bars] from top to bottom: by the group that a bar is most for, others last."""
    one = np.concatenate([counts.sum(axis=3), counts[:, -1:].sum(axis=2)], axis=1)
    rate = one / np.maximum(one.sum(axis=2, keepdims=True), 1)
    main, load = rate.argmax(axis=0), rate.mean(axis=0)
    key = main - np.minimum(load, 0.999)
    key[:, -1] = np.inf
    return np.argsort(key, axis=1, kind="stable")


def _draw_row(
    axes: Any,
    result: Pipeline,
    places: list[int],
    counts: NDArray[np.int64],
    experts: list[list[int]],
    groups: list[int],
    chain: Chain | None,
    look: Style,
    inches: float,
) -> tuple[float, float]:
    """Draw some layers; returns tokens in coloured bands, and in all."""
    columns = Columns(counts, _order(counts))
    colors = _colors(result.flows, groups, look)
    bar = min(0.17, 0.19 * len(places) / (PAGE_WIDTH - 2))
    marked = _marked(chain, places, experts)
    colored = 0.0
    for place in range(len(places) - 1):
        largest = _largest(counts[:, place])
        for key, band in columns.bands(place, largest).items():
            if key[0] >= 0:
                framed = {(place, key[1]), (place + 1, key[2])} <= marked
                strong = 0.95 if framed else 0.45 if marked else 0.72
                draw_band(axes, band, colors[key[0]], strong, bar, 3)
                colored += counts[key[0], place, *key[1:]]
            elif band.leaves[1] - band.leaves[0] >= THINNEST:
                faint = 0.05 if len(experts[place]) in key[1:] else 0.13
                draw_band(axes, band, look.ink, faint, bar, 2)
    names = [[*map(str, row), f"+{result.router_width - len(row)}"] for row in experts]
    draw_bars(axes, columns, names, marked, look, bar, inches)
    look.dress(axes)
    axes.set_ylim(1.01, -0.01)
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_visible(False)
    axes.tick_params(length=0, labelsize=TEXT_SIZE)
    return colored, float(counts.sum())


def _largest(counts: NDArray[np.int64]) -> set[tuple[int, int, int]]:
    """The largest flows [groups, B, B] between two layers, but for those of the other experts."""
    alone = counts[:, :-1, :-1]
    order = np.argsort(-alone, axis=None, kind="stable")[:BANDS]
    places = np.stack(np.unravel_index(order, alone.shape), axis=1)
    return {tuple(each) for each in places.tolist() if alone[tuple(each)] > 0}  # type: ignore[misc]


def _marked(
    chain: Chain | None, places: list[int], experts: list[list[int]]
) -> set[tuple[int, int]]:
    """The bars of a chain."""
    if chain is None:
        return set()
    return {
        (column, experts[column].index(expert))
        for column, place in enumerate(places)
        for expert in chain.experts[place]
        if expert in experts[column]
    }


def _colors(flows: Flows, groups: list[int], look: Style) -> list[str]:
    """A colour for each group that is drawn, the same whichever are drawn; grey for no label."""
    palette = group_colors(len(flows.groups), look)
    labelled = len(flows.groups) > 1
    return [
        look.ink if labelled and not flows.groups[group] else palette[group] for group in groups
    ]


def _name_groups(axes: Any, flows: Flows, groups: list[int], look: Style) -> None:
    for group, color in zip(groups, _colors(flows, groups, look), strict=True):
        name = flows.groups[group] or (NO_LABEL if len(flows.groups) > 1 else "tokens")
        axes.plot([], [], color=color, linewidth=9, alpha=0.72, label=name)
    axes.plot([], [], color=look.ink, linewidth=9, alpha=0.13, label="smaller flows")
    name_lines(axes, look)


def _caption(
    result: Pipeline, chain: Chain | None, groups: int, share: float, counts: NDArray[np.int64]
) -> str:
    shown = counts.shape[-1] - 1
    others = (
        ""
        if shown == result.router_width
        else f" The {shown} experts of each layer that take most of a label have bars, the others "
        "are hatched together, not to scale."
    )
    by = ", by label" if groups > 1 else ""
    framed = "" if chain is None else " Framed: the label's chain."
    return (
        "A bar is an expert, as high as the share of tokens whose first choice it is; a band is "
        f"the tokens that go from one to the next{by}. Coloured: the {BANDS} largest bands between "
        f"two layers, {100 * share:.0f} % of the flow; the rest is grey where it is wide enough."
        f"{framed}{others}"
    )
