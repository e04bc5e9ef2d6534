"""Heat maps in the terminal, readable with and without colour, on light and dark backgrounds.

    from rich.console import Console
    Console().print(TerminalHeatmap(token_expert(routes, layer=3)))

Every cell carries its number, so that nothing is lost where there is no colour (a pipe,
``NO_COLOR``, a screen reader). Where there is, each cell brings its own background and black or
white ink on it; text outside the cells keeps the terminal's own colours.

Nothing is cut silently: where the columns do not fit, they come in blocks headed ``experts 0-31 of
64``; where even that would be many, a cell shrinks to one digit of tenths of the highest value, and
a line below says so.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
from rich.cells import cell_len, set_cell_size
from rich.console import Console, ConsoleOptions, RenderResult
from rich.style import Style
from rich.text import Text

from moe_lens.analysis.heatmap import FirstChoice, Heatmap, LayerExpert, TokenExpert
from moe_lens.errors import UsageError

from .colors import RGB, hex_color, readable_on, scale_color, tag_color

__all__ = ["Cells", "TerminalHeatmap"]

# How much a cell shows: its value, one digit of tenths of the maximum, or whichever fits.
Cells = Literal["auto", "values", "tenths"]

NARROWEST = 24
LONGEST_NAME = 18
BLOCKS_BEFORE_SHRINKING = 2


@dataclass(frozen=True)
class _Grid:
    """A heat map as rows and columns of cells: text, and colour if it has one."""

    title: str
    definition: str
    row_names: list[str]
    column_word: str
    columns: list[int]
    all_columns: int
    value: Callable[[int, int], tuple[str, RGB | None]]
    tenth: Callable[[int, int], tuple[str, RGB | None]] | None
    tenths_mean: str
    value_width: int


class TerminalHeatmap:
    """A heat map that rich can print.

    Args:
        result: What `token_expert`, `layer_expert` or `first_choice` returned.
        cells: ``"values"``: every cell shows its number; ``"tenths"``: one digit, ``0`` to ``9``,
            for the tenth of the highest value it lies in; ``"auto"``: values where they need at
            most two blocks of columns, else tenths.

    Raises:
        UsageError: When printing, if the terminal is narrower than 24 columns.
    """

    def __init__(self, result: Heatmap, *, cells: Cells = "auto") -> None:
        self.grid = _grid(result)
        self.cells = cells

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        # Sixteen colours are whatever the terminal's theme makes of them: no contrast to rely on.
        colored = console.color_system in ("256", "truecolor", "windows")
        yield from self.lines(options.max_width, colored)

    def lines(self, width: int, colored: bool) -> Iterator[Text]:
        """The lines for a terminal of ``width`` columns."""
        if width < NARROWEST:
            raise UsageError(
                f"a heat map needs a terminal of at least {NARROWEST} columns, this one has "
                f"{width}; widen it, or write a picture with --output heatmap.png"
            )
        grid = self.grid
        yield Text(grid.title, style="bold")
        names = [*grid.row_names, _singular(grid.column_word)]
        name_width = min(max(map(cell_len, names)), LONGEST_NAME, width // 3)
        room = width - name_width - 1
        tenths = self._use_tenths(room)
        cell_width = 1 if tenths else grid.value_width + 1
        per_block = _even_blocks(len(grid.columns), max(1, room // cell_width))
        for start in range(0, len(grid.columns), per_block):
            stop = min(start + per_block, len(grid.columns))
            yield Text()
            if per_block < len(grid.columns):
                yield Text(_statement(grid, start, stop), style="italic")
            yield from _header(grid, start, stop, name_width, cell_width)
            for row in range(len(grid.row_names)):
                yield _row(grid, row, range(start, stop), name_width, cell_width, tenths, colored)
        yield Text()
        if len(grid.columns) < grid.all_columns:
            yield Text(
                f"{len(grid.columns)} of {grid.all_columns} {grid.column_word} are shown; no token "
                "went to the others."
            )
        if tenths:
            yield Text(grid.tenths_mean)
        yield Text(grid.definition)

    def _use_tenths(self, room: int) -> bool:
        if self.grid.tenth is None or self.cells == "values":
            return False
        if self.cells == "tenths":
            return True
        fit = max(1, room // (self.grid.value_width + 1))
        return len(self.grid.columns) > BLOCKS_BEFORE_SHRINKING * fit


def _grid(result: Heatmap) -> _Grid:
    if isinstance(result, TokenExpert):
        return _token_expert_grid(result)
    if isinstance(result, LayerExpert):
        return _layer_expert_grid(result)
    return _first_choice_grid(result)


def _token_expert_grid(result: TokenExpert) -> _Grid:
    top = max(float(np.nanmax(result.weights, initial=0.0)), 1e-9)

    def shaded(text: str, weight: float) -> tuple[str, RGB | None]:
        return ("·", None) if np.isnan(weight) else (text, scale_color(weight / top))

    def value(row: int, column: int) -> tuple[str, RGB | None]:
        weight = float(result.weights[row, column])
        return shaded(_short_weight(weight), weight)

    def tenth(row: int, column: int) -> tuple[str, RGB | None]:
        weight = float(result.weights[row, column])
        return shaded(_tenth(weight, top), weight)

    return _Grid(
        title=result.title,
        definition=result.definition.replace("empty where", "· where"),
        row_names=_numbered(result.tokens, result.first_position),
        column_word="experts",
        columns=list(result.experts),
        all_columns=result.num_experts,
        value=value,
        tenth=tenth,
        tenths_mean=_tenths_mean(f"{top:.2f}"),
        value_width=3,
    )


def _layer_expert_grid(result: LayerExpert) -> _Grid:
    top = max(float(result.share.max()), 1e-9)

    def value(row: int, column: int) -> tuple[str, RGB | None]:
        percent = float(result.share[row, column])
        return _short_percent(percent, top), scale_color(percent / top)

    def tenth(row: int, column: int) -> tuple[str, RGB | None]:
        percent = float(result.share[row, column])
        return _tenth(percent, top), scale_color(percent / top)

    return _Grid(
        title=result.title,
        definition=result.definition,
        row_names=[f"layer {layer}" for layer in result.layers],
        column_word="experts",
        columns=list(range(result.share.shape[1])),
        all_columns=result.share.shape[1],
        value=value,
        tenth=tenth,
        tenths_mean=_tenths_mean(f"{top:.3g} %"),
        value_width=3,
    )


def _first_choice_grid(result: FirstChoice) -> _Grid:
    def value(row: int, column: int) -> tuple[str, RGB | None]:
        expert = int(result.experts[column, row])
        return ("·", None) if expert < 0 else (str(expert), tag_color(expert))

    widest = max(result.num_experts - 1, max(result.layers))
    return _Grid(
        title=result.title,
        definition=result.definition,
        row_names=_numbered(result.tokens, result.first_position),
        column_word="layers",
        columns=list(result.layers),
        all_columns=len(result.layers),
        value=value,
        tenth=None,
        tenths_mean="",
        value_width=len(str(widest)),
    )


def _row(
    grid: _Grid,
    row: int,
    columns: range,
    name_width: int,
    cell_width: int,
    tenths: bool,
    colored: bool,
) -> Text:
    line = _line()
    line.append(_fit(grid.row_names[row], name_width) + " ")
    show = grid.tenth if tenths and grid.tenth is not None else grid.value
    for column in columns:
        text, color = show(row, column)
        style = None
        if color is not None and colored:
            ink, paper = hex_color(readable_on(color)), hex_color(color)
            style = Style(color=ink, bgcolor=paper)
        line.append(text.rjust(cell_width), style)
    return line


def _header(grid: _Grid, start: int, stop: int, name_width: int, cell_width: int) -> Iterator[Text]:
    """Column numbers; upright, digit above digit, where a cell is one character wide."""
    names = [str(column) for column in grid.columns[start:stop]]
    lead = _fit(_singular(grid.column_word).rjust(name_width), name_width) + " "
    if cell_width > 1:
        yield _line(lead + "".join(name.rjust(cell_width) for name in names))
        return
    height = max(map(len, names))
    for digits in zip(*(name.rjust(height) for name in names), strict=True):
        yield _line(lead + "".join(digits))
        lead = " " * len(lead)


def _singular(word: str) -> str:
    return word.removesuffix("s")


def _line(text: str = "") -> Text:
    return Text(text, no_wrap=True, overflow="ignore", end="\n")


def _statement(grid: _Grid, start: int, stop: int) -> str:
    first, last = grid.columns[start], grid.columns[stop - 1]
    if len(grid.columns) == grid.all_columns and grid.column_word == "experts":
        return f"{grid.column_word} {first}-{last} of {grid.all_columns}"
    return f"{grid.column_word} {first}-{last} ({start + 1} to {stop} of {len(grid.columns)} shown)"


def _even_blocks(columns: int, fit: int) -> int:
    """Columns per block, so that all blocks are about equally wide."""
    blocks = -(-columns // fit)
    return -(-columns // blocks)


def _numbered(tokens: tuple[str, ...], first: int) -> list[str]:
    width = len(str(first + len(tokens) - 1))
    return [f"{first + place:{width}} {token}" for place, token in enumerate(tokens)]


def _fit(name: str, width: int) -> str:
    """``name`` in exactly ``width`` terminal columns; an ellipsis says that it was longer."""
    if cell_len(name) > width:
        return set_cell_size(name, width - 1) + "…"
    return set_cell_size(name, width)


def _short_weight(weight: float) -> str:
    """Three characters: ``.07``, ``.53``, ``1.0``, ``2.5``, ``12``."""
    if np.isnan(weight):
        return ""
    if weight < 0.995:
        return f"{weight:.2f}"[1:] if weight >= 0 else f"{weight:.1f}"
    return f"{weight:.1f}" if weight < 9.95 else f"{weight:.0f}"


def _short_percent(percent: float, top: float) -> str:
    """Three characters: with a decimal where all values are below 10."""
    return f"{percent:.1f}" if top < 9.95 else f"{percent:.0f}"


def _tenth(value: float, top: float) -> str:
    return "" if np.isnan(value) else str(min(9, int(10 * max(value, 0.0) / top)))


def _tenths_mean(top: str) -> str:
    return f"A digit d means d to d + 1 tenths of the highest value, {top}."
