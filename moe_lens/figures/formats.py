"""Which format the name of a picture or a graph asks for. Imports nothing that draws."""

from __future__ import annotations

import os
from pathlib import Path

from moe_lens.errors import UsageError

__all__ = ["FORMATS", "GRAPH_FORMATS", "graph_format", "picture_format"]

FORMATS = ("png", "svg", "pdf")

GRAPH_FORMATS = ("dot", "json", "graphml", "mmd", "html")


def picture_format(path: str | os.PathLike[str]) -> str:
    """One of `FORMATS`, from the ending of the name.

    Raises:
        UsageError: Pictures are not written in that format.
    """
    return _ending(path, "pictures", FORMATS, "png")


def graph_format(path: str | os.PathLike[str]) -> str:
    """One of `GRAPH_FORMATS`, from the ending of the name.

    Raises:
        UsageError: Graphs are not written in that format.
    """
    return _ending(path, "graphs", GRAPH_FORMATS, "html")


def _ending(path: str | os.PathLike[str], what: str, formats: tuple[str, ...], usual: str) -> str:
    target = Path(path)
    kind = target.suffix.lower().removeprefix(".")
    if kind not in formats:
        raise UsageError(
            f"{what} are written as {', '.join(formats)}, not {target.suffix or 'no ending'!r}; "
            f"name the file {target.stem}.{usual}"
        )
    return kind
