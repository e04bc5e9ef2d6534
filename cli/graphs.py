"""Graphs that an analysis command writes beside what it shows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any


def write_graphs(
    files: Sequence[Path] | None,
    draw: Callable[[], Any],
    *,
    title: str,
    definition: str,
    theme: str = "light",
) -> list[Path]:
    """Write the graph that `draw` makes into each of `files`; returns where.

    Args:
        files: Names whose endings choose the formats; None or none for nothing.
        draw: Makes the `networkx` graph, called once and only if a file is wanted.
        title: Heading of drawings.
        definition: What the weights mean.
        theme: ``"dark"`` makes all of them dark; else a page follows its reader's system.
    """
    if not files:
        return []
    from moe_lens.figures.graphs.graph_file import write_graph

    graph, style = draw(), "dark" if str(theme) == "dark" else None
    return [
        write_graph(graph, file, title=title, definition=definition, style=style) for file in files
    ]
