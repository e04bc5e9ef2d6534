"""A table of a result, which the terminal, a notebook and a report all show alike."""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass, field

__all__ = ["Cell", "Table"]

Cell = str | int | float | None


@dataclass(frozen=True)
class Table:
    """Columns and rows. Cells are texts, or numbers that are written with three digits.

    Attributes:
        columns: Column names.
        rows: One cell for each column; ``None`` is left empty.
        title: What stands above it; empty where the result's own title says it.
        shades: How strongly each cell is shaded, 0 to 1, by row; empty for none.
    """

    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    title: str = ""
    shades: tuple[tuple[float, ...], ...] = field(default=(), repr=False)

    @property
    def numbers(self) -> tuple[str, ...]:
        """Columns in which no cell is text: they are set to the right."""
        return tuple(
            name
            for place, name in enumerate(self.columns)
            if not any(isinstance(row[place], str) for row in self.rows)
        )

    def texts(self) -> list[tuple[str, ...]]:
        """The rows as they are shown."""
        return [tuple(map(written, row)) for row in self.rows]

    def html(self) -> str:
        """An HTML table that reads on light and on dark pages."""
        style = "font-family:monospace;padding:1px 6px;white-space:pre"
        heads = [f"<th style='{style}'>{html.escape(name)}</th>" for name in self.columns]
        lines = [f"<tr>{''.join(heads)}</tr>"]
        sides = ["right" if name in self.numbers else "left" for name in self.columns]
        for number, row in enumerate(self.texts()):
            shades: Sequence[float] = self.shades[number] if self.shades else [0.0] * len(row)
            cells = [
                # A translucent tint keeps the page's own text colour readable on it.
                f"<td style='{style};text-align:{side};"
                f"background:rgba(58,134,255,{0.55 * shade:.2f})'>{html.escape(text)}</td>"
                for text, side, shade in zip(row, sides, shades, strict=True)
            ]
            lines.append(f"<tr>{''.join(cells)}</tr>")
        title = f"<b>{html.escape(self.title)}</b>" if self.title else ""
        return f"{title}<table>{''.join(lines)}</table>"


def written(cell: Cell) -> str:
    """A cell as text: three digits of a number, whole numbers in full, nothing for None or NaN."""
    if cell is None or cell != cell:
        return ""
    if isinstance(cell, str):
        return cell
    if isinstance(cell, int):
        return f"{cell:,}"
    text = f"{cell:#.3g}" if abs(cell) < 1000 else f"{cell:,.0f}"
    return text.rstrip(".") if "e" not in text else f"{cell:.3g}"
