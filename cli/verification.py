"""A verification on the screen: the same after ``compress`` as from ``verify``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from . import screen

if TYPE_CHECKING:
    from moe_lens.compress import CompressionResult, Verification


def show_verification(found: Verification, *, first: bool = False) -> None:
    """Print tables and findings, and the warnings on stderr; `first`: nothing stands above."""
    from moe_lens.compress.report.report import check_lines, drift_rows, loss_rows, size_rows

    corpus = found.corpus
    screen.heading(
        f"Loss on held-out text ({corpus.tokens:,} tokens of {corpus.name}, {found.device})",
        first=first,
    )
    _show_rows(*loss_rows(found))
    if found.drift.layers:
        screen.heading(f"Routing drift ({found.drift.mapping})")
        _show_rows(*drift_rows(found))
    screen.heading("Size and speed")
    _show_rows(*size_rows(found))
    screen.show("", *check_lines(found))
    show_warnings(found)


def show_warnings(found: Verification | CompressionResult) -> None:
    """Say on stderr what must not be missed."""
    for warning in found.warnings:
        screen.warn(warning)


def _show_rows(names: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    screen.show(screen.table(names, rows, right=names[1:]))
