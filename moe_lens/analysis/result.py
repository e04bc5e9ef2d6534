"""What every analysis returns: frozen numbers that carry the definition of themselves."""

from __future__ import annotations

import html
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import fields, is_dataclass
from typing import Any, ClassVar

import numpy as np

from .table import Table

__all__ = ["Result", "html_table"]


class Result:
    """Base of the frozen result dataclasses.

    A result has a field `definition` that says what its number is, in words that fit under a
    figure. Arrays are numpy; in JSON they are lists, and a number that is not there is ``null``.
    The terminal and notebooks show its title, its findings, its tables and its definition.
    """

    kind: ClassVar[str]
    definition: str

    @property
    def title(self) -> str:
        """Heading of the tables or the picture."""
        return self.kind

    def findings(self) -> list[str]:
        """What is to be said first, a sentence each."""
        return []

    def tables(self) -> list[Table]:
        """The numbers a person reads; JSON has all."""
        return []

    def _repr_html_(self) -> str:
        said = "".join(
            f"<p style='margin:4px 0'>{html.escape(each)}</p>" for each in self.findings()
        )
        shown = "<br>".join(table.html() for table in self.tables())
        return (
            f"<div style='overflow-x:auto'><b>{html.escape(self.title)}</b>{said}{shown}"
            f"<small>{html.escape(self.definition)}</small></div>"
        )

    def to_dict(self) -> dict[str, Any]:
        """All fields as plain Python values, after ``kind``, the name of the analysis."""
        values = {field.name: _plain(getattr(self, field.name)) for field in fields(self)}  # type: ignore[arg-type]
        return {"kind": self.kind, **values}

    def to_json(self, indent: int | None = 2) -> str:
        """`to_dict` as JSON text."""
        return json.dumps(self.to_dict(), indent=indent, ensure_ascii=False, allow_nan=False)


def html_table(
    title: str,
    definition: str,
    columns: Sequence[str],
    rows: Sequence[tuple[str, Sequence[Any]]],
    show: Callable[[Any], tuple[str, float]],
) -> str:
    """An HTML table for notebooks that reads on light and on dark pages.

    Args:
        title: Heading, plain text.
        definition: Line below it, plain text.
        columns: Column names.
        rows: Row names with their values.
        show: Text of a cell and how strongly it is shaded, from 0 to 1.
    """
    style = "text-align:right;font-family:monospace;padding:1px 4px;white-space:pre"
    head = "".join(f"<th style='{style}'>{html.escape(name)}</th>" for name in ["", *columns])
    lines = [f"<tr>{head}</tr>"]
    for name, values in rows:
        cells = [f"<th style='{style}'>{html.escape(name)}</th>"]
        for value in values:
            text, shade = show(value)
            # A translucent tint keeps the page's own text colour readable on it.
            tint = f"{style};background:rgba(58,134,255,{0.55 * shade:.2f})"
            cells.append(f"<td style='{tint}'>{html.escape(text)}</td>")
        lines.append(f"<tr>{''.join(cells)}</tr>")
    return (
        f"<div style='overflow-x:auto'><b>{html.escape(title)}</b><br>"
        f"<small>{html.escape(definition)}</small><table>{''.join(lines)}</table></div>"
    )


def _plain(value: Any) -> Any:
    """Numpy, tuples and dictionaries as JSON knows them; NaN and infinities as ``None``."""
    if isinstance(value, np.ndarray) and value.dtype.kind in "biu":
        return value.tolist()
    if isinstance(value, np.ndarray) and value.dtype.kind == "f" and np.isfinite(value).all():
        return value.tolist()
    if isinstance(value, np.ndarray | np.generic):
        return _plain(value.tolist())
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: _plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
