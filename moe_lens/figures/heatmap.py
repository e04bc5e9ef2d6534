"""Heat maps as picture files: PNG, SVG or PDF, sized for a slide.

    save_heatmap(token_expert(routes, layer=3), "layer3.png")
    save_heatmap(layer_expert(trace), "corpus.svg", style="dark", subtitle="demo")

No display is needed. A picture that would be too small to read is refused with what to do instead;
a PDF takes as many pages as are needed. The same result gives the same file, byte for byte.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator

from moe_lens.analysis.heatmap import FirstChoice, Heatmap, LayerExpert, TokenExpert
from moe_lens.errors import UsageError

from .colors import hex_color, readable_on, tag_color
from .fonts import drawable, token_families
from .formats import FORMATS, picture_format
from .picture_file import write_pages
from .styles import TEXT_SIZE, TICK_SIZE, Style, style_named, write_caption

__all__ = ["FORMATS", "draw_heatmap", "save_heatmap"]

TOKENS_ON_A_PAGE = 64
TOKEN_ROWS = 32  # more rows than this are set in two panels side by side, if experts leave room
SIDE_BY_SIDE_COLUMNS = 32
TOKEN_COLUMNS = 44  # columns of a panel with token texts below
TALLEST = 11.0  # inches of panels on one page
ROW = 0.26  # inches of a row of cells with text in them
LETTER = 0.093  # inches that a letter of a token text takes
NUMBERED_COLUMNS = 24  # more columns than this leave no room for numbers in the cells


def save_heatmap(
    result: Heatmap,
    path: str | os.PathLike[str],
    *,
    style: str = "light",
    subtitle: str | None = None,
    dpi: int = 150,
) -> Path:
    """Write a heat map as a picture, whole or not at all.

    Args:
        result: What `token_expert`, `layer_expert` or `first_choice` returned.
        path: File to write; its ending chooses the format: ``.png``, ``.svg`` or ``.pdf``.
        style: ``"light"`` or ``"dark"``.
        subtitle: Put after the title, such as the name of the model.
        dpi: Dots per inch of a PNG; 150 gives 1920 pixels of width.

    Returns:
        The path written.

    Raises:
        UsageError: The format or style is not known, or the picture needs more than one page and
            is not a PDF.
        MoeLensError: The file cannot be written.
    """
    target = Path(path).expanduser()
    kind = picture_format(target)
    pages = draw_heatmap(result, style=style, subtitle=subtitle)
    if len(pages) > 1 and kind != "pdf":
        tokens = len(getattr(result, "tokens", ()))
        raise UsageError(
            f"{tokens} tokens do not fit into one readable picture; show "
            f"{math.ceil(tokens / len(pages))} of them at a time, or write a .pdf, which gets "
            f"{len(pages)} pages"
        )
    write_pages(pages, target, dpi)
    return target


def draw_heatmap(
    result: Heatmap, *, style: str = "light", subtitle: str | None = None
) -> list[Figure]:
    """The pages of a heat map as matplotlib figures; see `save_heatmap`."""
    look = style_named(style)
    title = result.title if subtitle is None else f"{result.title} · {subtitle}"
    if isinstance(result, TokenExpert):
        return _draw_token_expert(result, look, title)
    if isinstance(result, LayerExpert):
        return [_draw_layer_expert(result, look, title)]
    return _draw_first_choice(result, look, title)


def _draw_token_expert(result: TokenExpert, look: Style, title: str) -> list[Figure]:
    top = max(float(np.nanmax(result.weights, initial=0.0)), 1e-9)
    scale = Normalize(0.0, top)
    pages = []
    for shown in _parts(len(result.tokens), TOKENS_ON_A_PAGE):
        two = len(shown) > TOKEN_ROWS and len(result.experts) <= SIDE_BY_SIDE_COLUMNS
        panels = _parts(len(shown), TOKEN_ROWS) if two else [range(len(shown))]
        height = max(4.2, 2.0 + ROW * len(panels[0]))
        figure = look.figure(height, title + _of_pages(shown, len(result.tokens)))
        grid = figure.subplots(1, len(panels), squeeze=False)[0]
        for axes, panel in zip(grid, panels, strict=True):
            rows = range(shown.start + panel.start, shown.start + panel.stop)
            _draw_token_rows(axes, result, rows, look, scale, len(panels))
            # A shorter second panel keeps the row height of the first.
            axes.set_ylim(len(panels[0]) - 0.5, -0.5)
        write_caption(grid[0], result.definition, look)
        _color_bar(figure, grid, look, scale, "expert weight")
        pages.append(figure)
    return pages


def _draw_token_rows(
    axes: Any, result: TokenExpert, rows: range, look: Style, scale: Normalize, panels: int
) -> None:
    weights = result.weights[rows.start : rows.stop]
    axes.imshow(weights, cmap=look.colors, norm=scale, aspect="auto", interpolation="nearest")
    look.dress(axes)
    _expert_ticks(axes, result.experts, result.num_experts, panels)
    _separate_rows(axes, len(rows), look)
    names = [drawable(result.tokens[row]) for row in rows]
    axes.set_yticks(range(len(rows)), names, fontfamily=token_families())
    _plain_text(axes.get_yticklabels())
    if panels * len(result.experts) <= 2 * NUMBERED_COLUMNS - 1:
        _write_numbers(axes, weights, look, scale, _weight_text)


def _draw_layer_expert(result: LayerExpert, look: Style, title: str) -> Figure:
    rows, columns = result.share.shape
    figure = look.figure(max(4.2, min(2.2 + 0.32 * rows, 13.0)), title)
    axes = figure.subplots()
    scale = Normalize(0.0, max(float(result.share.max()), 1e-9))
    axes.imshow(result.share, cmap=look.colors, norm=scale, aspect="auto", interpolation="nearest")
    look.dress(axes)
    write_caption(axes, result.definition, look)
    _expert_ticks(axes, tuple(range(columns)), columns)
    _layer_ticks(axes, result.layers)
    if columns <= NUMBERED_COLUMNS and rows <= 40:
        _write_numbers(axes, result.share, look, scale, "{:.1f}".format)
    bar = _color_bar(figure, axes, look, scale, "% of tokens (line: uniform)")
    for percent in np.unique(result.uniform.round(6)):
        bar.ax.axhline(percent, color=look.ink, linewidth=2.5)
        bar.ax.axhline(percent, color=look.paper, linewidth=1.0)
    return figure


def _draw_first_choice(result: FirstChoice, look: Style, title: str) -> list[Figure]:
    tokens, layers = len(result.tokens), len(result.layers)
    names = [drawable(token, 14) for token in result.tokens]
    panel_height = 0.3 + ROW * layers + LETTER * max(map(len, names))
    per_page = max(1, int(TALLEST / panel_height))
    pages = []
    panels = _parts(tokens, TOKEN_COLUMNS)
    for first in range(0, len(panels), per_page):
        here = panels[first : first + per_page]
        shown = range(here[0].start, here[-1].stop)
        height = 1.3 + panel_height * len(here)
        figure = look.figure(max(3.2, height), title + _of_pages(shown, tokens))
        grid = figure.subplots(len(here), 1, squeeze=False)[:, 0]
        widest = max(len(panel) for panel in here)
        for axes, panel in zip(grid, here, strict=True):
            _draw_panel(axes, result, panel, [names[token] for token in panel], look)
            # A short last panel keeps the cell width of the full ones.
            axes.set_xlim(-0.5, widest - 0.5)
        write_caption(grid[0], result.definition, look)
        pages.append(figure)
    return pages


def _draw_panel(
    axes: Any, result: FirstChoice, panel: range, names: list[str], look: Style
) -> None:
    experts = result.experts[:, panel.start : panel.stop]
    paint = np.full((*experts.shape, 4), 0.0)
    for (row, column), expert in np.ndenumerate(experts):
        if expert < 0:
            continue
        color = tag_color(int(expert))
        paint[row, column] = [*(part / 255 for part in color), 1.0]
        ink = hex_color(readable_on(color))
        axes.text(
            column, row, str(expert), ha="center", va="center", color=ink, fontsize=TICK_SIZE - 1
        )
    axes.imshow(paint, aspect="auto", interpolation="nearest")
    look.dress(axes)
    axes.set_xticks(range(len(panel)), names, rotation=90, fontfamily=token_families())
    _plain_text(axes.get_xticklabels())
    _layer_ticks(axes, result.layers)


def _expert_ticks(axes: Any, experts: tuple[int, ...], num_experts: int, panels: int = 1) -> None:
    """Every expert where there is room, else every 2nd, 4th, ..., so that numbers stay apart."""
    step = 1
    while panels * len(experts) / step > (34 if num_experts <= 100 else 20):
        step *= 2
    places = range(0, len(experts), step)
    axes.set_xticks(places, [str(experts[place]) for place in places])
    if step > 1 and len(experts) <= 256:
        axes.xaxis.set_minor_locator(FixedLocator(range(len(experts))))
        faint = axes.spines["left"].get_edgecolor()
        axes.tick_params(axis="x", which="minor", length=1.5, color=faint)
    used = "" if len(experts) == num_experts else f" ({len(experts)} of {num_experts} were chosen)"
    axes.set_xlabel(f"expert{used}")


def _layer_ticks(axes: Any, layers: tuple[int, ...]) -> None:
    step = 1
    while len(layers) / step > 40:
        step *= 2
    places = range(0, len(layers), step)
    axes.set_yticks(places, [str(layers[place]) for place in places])
    axes.set_ylabel("layer")


def _separate_rows(axes: Any, rows: int, look: Style) -> None:
    for edge in range(1, rows):
        axes.axhline(edge - 0.5, color=look.faint, linewidth=0.6)


def _weight_text(weight: float) -> str:
    """``.53``; ``2.5`` from 1 on."""
    return f"{weight:.2f}".removeprefix("0") if weight < 0.995 else f"{weight:.1f}"


def _write_numbers(
    axes: Any, table: Any, look: Style, scale: Normalize, show: Callable[[float], str]
) -> None:
    for (row, column), value in np.ndenumerate(table):
        if np.isnan(value):
            continue
        red, green, blue, _ = look.colors(scale(value), bytes=True)
        ink = hex_color(readable_on((int(red), int(green), int(blue))))
        number = show(float(value))
        axes.text(column, row, number, ha="center", va="center", color=ink, fontsize=TICK_SIZE - 1)


def _color_bar(figure: Figure, axes: Any, look: Style, scale: Normalize, unit: str) -> Any:
    source = ScalarMappable(norm=scale, cmap=look.colors)
    # The bar's aspect follows the figure, so that it is as tall as the cells and no wider.
    aspect = 4.2 * figure.get_figheight()
    bar = figure.colorbar(source, ax=axes, pad=0.012, fraction=0.03, aspect=aspect)
    bar.set_label(unit, color=look.ink, fontsize=TEXT_SIZE)
    bar.ax.tick_params(colors=look.ink, labelsize=TICK_SIZE)
    bar.outline.set_edgecolor(look.faint)
    return bar


def _plain_text(labels: Any) -> None:
    """A token with dollar signs in it is not a formula."""
    for label in labels:
        label.set_parse_math(False)


def _parts(length: int, most: int) -> list[range]:
    """Cut ``range(length)`` into even parts of at most ``most``."""
    parts = math.ceil(length / most)
    size = math.ceil(length / parts)
    return [range(start, min(start + size, length)) for start in range(0, length, size)]


def _of_pages(shown: range, tokens: int) -> str:
    if len(shown) == tokens:
        return ""
    return f" (tokens {shown.start} to {shown.stop - 1} of {tokens})"
