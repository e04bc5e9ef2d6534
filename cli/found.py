"""What an analysis command shows: tables, JSON, and a picture if one is asked for."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import screen
from .bundles import Shown

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from moe_lens.analysis.result import Result
    from moe_lens.analysis.table import Table


def present(
    result: Result,
    name: str,
    shown: Shown,
    draw: Callable[..., Figure],
    *,
    files: Mapping[str, Path | Sequence[Path]] | None = None,
) -> None:
    """Show a result.

    Args:
        result: What was found.
        name: The model.
        shown: How.
        draw: ``draw(result, style=, subtitle=)``, its picture.
        files: Other files that were written, by their name in the JSON.
    """
    output = shown.output
    if output is not None:
        from moe_lens.figures.picture_file import save_picture

        output = save_picture(draw, result, output, style=str(shown.theme), subtitle=name)
    if shown.json:
        screen.emit_json({"model": name, "output": output, **(files or {}), **result.to_dict()})
        return
    screen.heading(f"{result.title} · {name}", first=True)
    screen.show(*result.findings())
    for table in result.tables():
        screen.show("")
        if table.title:
            screen.heading(table.title, first=True)
        screen.show(_table(table))
    screen.note(result.definition)
    written = [] if output is None else [output]
    for each in (files or {}).values():
        written += [each] if isinstance(each, Path) else each
    if written:
        screen.show("", *map(str, written))


def _table(table: Table) -> Any:
    rows = [tuple(map(screen.printable, row)) for row in table.texts()]
    return screen.table(table.columns, rows, right=table.numbers)
