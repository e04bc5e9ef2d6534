"""Where output goes: results to stdout, notes and errors to stderr, JSON alone when asked for.

With ``--json`` stdout holds the result and nothing else, and what goes to stderr is one JSON object
a line there, unless stderr is a terminal.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Iterable, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.table import Table

# Into a pipe or a file nothing is wrapped or cut: the reader has no width.
UNLIMITED = 100_000

# Control characters as their symbols, one for one; line ends and tabs stay.
_CONTROL = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\r\t"}
_CONTROL |= {0x7F: 0x2421} | dict.fromkeys(range(0x80, 0xA0), 0xFFFD)


def _console(stderr: bool) -> Console:
    from rich.console import Console
    from rich.theme import Theme

    stream = sys.stderr if stderr else sys.stdout
    piped = not stream.isatty() and "COLUMNS" not in os.environ
    # rich's yellow times cannot be read on a light background.
    readable = Theme({"progress.elapsed": "dim", "progress.remaining": "dim"})
    return Console(
        stderr=stderr,
        highlight=False,
        emoji=False,
        theme=readable,
        width=UNLIMITED if piped else None,
    )


@cache
def out() -> Console:
    """The console of results."""
    return _console(stderr=False)


@cache
def err() -> Console:
    """The console of progress, notes and errors."""
    return _console(stderr=True)


def show(*parts: RenderableType) -> None:
    """Print results, one below the other."""
    console = out()
    if console.is_terminal:
        for part in parts:
            console.print(part, markup=False)
        return
    with console.capture() as captured:
        for part in parts:
            console.print(part, markup=False)
    # Tables fill their last column with spaces, which a file need not hold.
    for line in captured.get().splitlines():
        sys.stdout.write(line.rstrip() + "\n")


def heading(text: str, *, first: bool = False) -> None:
    """A line above a part of the result, with a blank line before it unless it is the first."""
    from rich.text import Text

    show(*([] if first else [""]), Text(text, style="bold"))


def commands(*lines: str) -> None:
    """Lines to copy: indented, and never wrapped."""
    from rich.text import Text

    for line in lines:
        out().print(Text(f"  {line}", no_wrap=True, overflow="ignore"), soft_wrap=True)


def printable(text: str) -> str:
    """`text` as a terminal may print it: what would steer the terminal is shown as a symbol.

    A model can write escape sequences; in a file or a pipe they are the program's own business.
    """
    return text.translate(_CONTROL) if out().is_terminal else text


def emit_json(content: Any) -> None:
    """Print `content` as the only thing on stdout. NaN is refused: it is not JSON."""
    text = json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False, default=_plain)
    sys.stdout.write(text + "\n")


def _plain(value: Any) -> Any:
    """Arrays, NumPy's numbers and paths as JSON has them."""
    if hasattr(value, "tolist"):
        return value.tolist()
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    raise TypeError(f"{type(value).__name__} is not JSON")


_said: set[str] = set()
_json = False


def json_events() -> bool:
    """Whether stderr is for a program: the command was asked for JSON, and no person watches."""
    return _json and not sys.stderr.isatty()


def emit_event(event: str, **content: Any) -> None:
    """Write one JSON object as one line of stderr."""
    text = json.dumps({"event": event, **content}, ensure_ascii=False, allow_nan=False)
    sys.stderr.write(text + "\n")
    sys.stderr.flush()


def note(message: str) -> None:
    """Say something beside the result, once, in one dim line on stderr."""
    from rich.text import Text

    if message in _said:
        return
    _said.add(message)
    if json_events():
        emit_event("note", message=message)
        return
    err().print(Text(f"note: {message}", style="dim"))


def warn(message: str) -> None:
    """Say something on stderr that must not be missed."""
    from rich.text import Text

    if json_events():
        emit_event("warning", message=message)
        return
    err().print(Text.assemble(("warning: ", "bold red"), message))


def error(message: str) -> None:
    """Say on stderr why the command failed."""
    from rich.text import Text

    err().print(Text.assemble("moe-lens: ", ("error: ", "bold red"), message))


def interrupted() -> None:
    """Say on stderr that the user ended the command."""
    from rich.text import Text

    err().print(Text("moe-lens: interrupted"))


class NoteHandler(logging.Handler):
    """Shows what the library says: that it computes in float32, for example."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)

    def emit(self, record: logging.LogRecord) -> None:
        note(record.getMessage())


def reset(*, as_json: bool = False) -> None:
    """Begin a run: look at the terminal anew, and forget what was said."""
    global _json
    _json = as_json
    out.cache_clear()
    err.cache_clear()
    _said.clear()


def facts(rows: Iterable[tuple[str, RenderableType]]) -> Table:
    """Names and what they are, in two columns without lines."""
    from rich.table import Table

    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in rows:
        table.add_row(name, value)
    return table


def table(
    columns: Sequence[str], rows: Iterable[Sequence[str]], *, right: Sequence[str] = ()
) -> Table:
    """A table that reads well in a terminal and in a file; `right` names the number columns."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    made = Table(
        box=SIMPLE_HEAD,
        pad_edge=False,
        show_edge=False,
        padding=(0, 1, 0, 0),
        header_style="bold",
    )
    cells = [tuple(row) for row in rows]
    widths = [max(map(len, column)) for column in zip(columns, *cells, strict=True)]
    narrow = sum(widths) + 2 * len(widths) > out().width
    for name in columns:
        # Where room is short, the heads of numbers wrap, so that no number does.
        number = name in right
        head = name.replace(" ", "\n") if number and narrow else name
        made.add_column(head, justify="right" if number else "left", overflow="fold")
    for row in cells:
        made.add_row(*row)
    return made


def terminal() -> dict[str, Any]:
    """What stdout can show: is it a terminal, how wide, with which colours and encoding."""
    console = out()
    return {
        "interactive": console.is_terminal,
        "width": console.width if console.is_terminal else None,
        "colours": console.color_system if console.is_terminal and not console.no_color else None,
        "encoding": console.encoding,
    }
