"""The vocabulary of experts as a picture: by layer, by expert, and the tokens themselves.

save_picture(draw_vocabulary, Vocabulary.of(routed, written), "vocabulary.png")
"""

from __future__ import annotations

import textwrap
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from moe_lens.analysis.vocabulary import RoutedVocabulary, Vocabulary, WrittenVocabulary

from .fonts import drawable, token_families
from .series import group_colors, name_lines
from .styles import TEXT_SIZE, TICK_SIZE, Style, style_named

__all__ = ["draw_vocabulary"]

LISTED = 9
"""Experts whose tokens are written out."""

LETTERS = 40
"""Letters of a list of tokens where there are three."""


def draw_vocabulary(
    result: Vocabulary, *, style: str = "light", subtitle: str | None = None
) -> Figure:
    """The picture as a matplotlib figure.

    Above, for each side that is there: how firm its vocabulary is, layer by layer (routing), and
    expert by expert, sorted (contribution, or routing where that is all). Below, the tokens of the
    experts with the firmest vocabulary.
    """
    look = style_named(style)
    title = result.title if subtitle is None else f"{result.title} · {subtitle}"
    figure = look.figure(8.6, title)
    upper, lower = np.asarray(figure.subfigures(2, 1)).ravel()
    for part in (upper, lower):
        part.set_facecolor(look.paper)
    left, right = upper.subplots(1, 2)
    if result.routed is not None:
        _layers(left, result.routed, look)
    else:
        assert result.written is not None
        _sharpness(left, result.written, look)
    source = result.written if result.written is not None else result.routed
    assert source is not None
    _experts(upper, right, source, look)
    _tokens(lower, result, look)
    return figure


def _layers(axes: Any, routed: RoutedVocabulary, look: Style) -> None:
    look.dress(axes)
    color = group_colors(1, look)[0]
    means = routed.frequent if routed.frequent.ids else routed.all_ids
    name = f"ids ≥ {routed.fewest} times" if routed.frequent.ids else "all ids"
    axes.fill_between(
        routed.layers, 100 * means.low, 100 * means.high, color=color, alpha=0.25, linewidth=0
    )
    style = {"linewidth": 2.4, "marker": "o", "markersize": 5, "zorder": 3}
    axes.plot(routed.layers, 100 * means.value, color=color, label=name, **style)
    axes.plot(routed.layers, 100 * means.random, ":", color=look.ink, label="by chance")
    axes.set_ylim(0, 100)
    axes.set_ylabel("largest share of an id, %, mean over ids", fontsize=TEXT_SIZE)
    _finish_layers(axes, routed.layers, look)


def _sharpness(axes: Any, written: WrittenVocabulary, look: Style) -> None:
    look.dress(axes)
    color = group_colors(1, look)[0]
    known = [row[~np.isnan(row)] for row in written.sharpness]
    shares = (0.1, 0.5, 0.9, 1.0)
    low, middle, high, most = np.array(
        [np.quantile(row, shares) if len(row) else np.full(len(shares), np.nan) for row in known]
    ).T
    axes.fill_between(
        written.layers, low, high, color=color, alpha=0.25, linewidth=0, label="10 to 90 %"
    )
    style = {"color": color, "marker": "o", "markersize": 5}
    axes.plot(written.layers, middle, label="half of the experts", linewidth=2.4, **style)
    axes.plot(written.layers, most, label="sharpest expert", linewidth=1.0, **style)
    axes.axhline(written.random_sharpness, ls=":", color=look.ink, label="random, 97.5 %")
    axes.set_ylim(0, None)
    axes.set_ylabel("sharpness, standard deviations", fontsize=TEXT_SIZE)
    _finish_layers(axes, written.layers, look)


def _finish_layers(axes: Any, layers: tuple[int, ...], look: Style) -> None:
    axes.set_xlabel("layer")
    axes.set_xticks(layers[:: max(1, len(layers) // 12)])
    axes.grid(visible=True, axis="y", color=look.faint, linewidth=0.6)
    axes.set_axisbelow(True)
    name_lines(axes, look, loc="best", bbox_to_anchor=None)


def _experts(
    figure: Any, axes: Any, source: RoutedVocabulary | WrittenVocabulary, look: Style
) -> None:
    """Experts of each layer, the firmest first, as a heat map."""
    if isinstance(source, WrittenVocabulary):
        values, name = source.specificity, "specificity of what it pushes"
    else:
        values, name = 100 * source.share, "mean share of its ids, %"
    ordered = -np.sort(-np.nan_to_num(values, nan=-np.inf), axis=1)
    ordered[np.isinf(ordered)] = np.nan
    look.dress(axes)
    image = axes.imshow(ordered, cmap=look.colors, aspect="auto", interpolation="nearest", vmin=0)
    axes.set_xlabel("experts of a layer, in falling order")
    axes.set_ylabel("layer")
    step = max(1, len(source.layers) // 12)
    axes.set_yticks(range(0, len(source.layers), step), source.layers[::step])
    bar = figure.colorbar(image, ax=axes)
    bar.set_label(name, color=look.ink, fontsize=TEXT_SIZE)
    bar.ax.tick_params(colors=look.ink, labelsize=TICK_SIZE)
    bar.outline.set_edgecolor(look.faint)


def _tokens(figure: Any, result: Vocabulary, look: Style) -> None:
    """A table of the tokens of the firmest experts, and the definition below it."""
    axes = figure.subplots()
    axes.set_axis_off()
    axes.set(xlim=(0, 1), ylim=(0, 1))
    heads, rows = _rows(result)
    lists = len(heads) - 1
    places = [0.0, *(0.07 + 0.93 * number / lists for number in range(lists))]
    room = LETTERS * 3 // lists
    top, step = 0.97, 0.066
    write = {"fontsize": TICK_SIZE, "color": look.ink, "va": "top", "parse_math": False}
    for place, head in zip(places, heads, strict=True):
        axes.text(place, top, head, fontweight="bold", **write)
    for number, row in enumerate(rows):
        for place, cell in zip(places, row, strict=True):
            height = top - step * (number + 1)
            text = drawable(cell, room)
            axes.text(place, height, text, fontfamily=token_families(), **write)
    lines = "\n".join(textwrap.wrap(result.definition, 145))
    axes.text(
        0, 0.0, lines, fontsize=TICK_SIZE - 1.5, color=look.ink, va="bottom", parse_math=False
    )


def _rows(result: Vocabulary) -> tuple[list[str], list[tuple[str, ...]]]:
    """Heads and rows of the table: the same experts as in the result's own."""
    if result.written is None:
        assert result.routed is not None
        table = result.routed.expert_table(LISTED)
        wanted = {"expert": "expert", table.columns[-1]: table.columns[-1]}
    else:
        chosen = None if result.routed is None else _chosen_for(result.routed)
        table = result.written.expert_table(LISTED, chosen)
        wanted = {
            name: name
            for name in ("expert", "pushes up", "beyond the others", "chosen for, %")
            if name in table.columns
        }
    columns = [table.columns.index(name) for name in wanted]
    return list(wanted.values()), [tuple(row[at] for at in columns) for row in table.texts()]


def _chosen_for(routed: RoutedVocabulary) -> Any:
    return lambda place, expert: routed.top_texts(place, expert, 5)
