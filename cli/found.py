"""What an analysis command shows: tables, JSON, and a picture if one is asked for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import screen

if TYPE_CHECKING:
    from moe_lens.analysis.result import Result
    from moe_lens.analysis.table import Table


def present(
    result: Result,
    name: str,
    *,
    output: Path | None = None,
    save: Callable[..., Path] | None = None,
    theme: str = "light",
    as_json: bool = False,
    more: dict[str, Any] | None = None,
) -> None:
    """Show a result.

    Args:
        result: What was found.
        name: The model.
        output: Picture to write, with `save`.
        save: ``save(result, path, style=, subtitle=)`` of the result's figure.
        theme: Background of the picture.
        as_json: Print JSON, and nothing else.
        more: Entries of the JSON beside the result, such as other files that were written.
    """
    if output is not None and save is not None:
        output = save(result, output, style=str(theme), subtitle=name)
    if as_json:
        screen.emit_json({"model": name, "output": output, **(more or {}), **result.to_dict()})
        return
    screen.heading(f"{result.title} · {name}", first=True)
    screen.show(*result.findings())
    for table in result.tables():
        screen.show("")
        if table.title:
            screen.heading(table.title, first=True)
        screen.show(_table(table))
    screen.note(result.definition)
    if output is not None:
        screen.show("", str(output))


def _table(table: Table) -> Any:
    rows = [tuple(map(screen.printable, row)) for row in table.texts()]
    return screen.table(table.columns, rows, right=table.numbers)
