"""``moe-lens experts``: what does each expert do?"""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Any

import typer

from moe_lens.errors import UsageError

from .analysed import analysed
from .bundles import Reads, Shown, bundled
from .found import present
from .options import (
    Source,
)
from .routing import read_expert


class Role(StrEnum):
    """What an expert is for."""

    SPECIALIST = "specialist"
    SYNTAX = "syntax"
    POSITIONAL = "positional"
    GENERALIST = "generalist"
    RARELY_USED = "rarely-used"
    TOO_LITTLE = "too-little-data"


class Sort(StrEnum):
    """Order of the experts."""

    EXPERT = "expert"
    LIFT = "lift"
    SHARE = "share"


@bundled
def experts(
    source: Source,
    reads: Reads,
    shown: Shown,
    layer: Annotated[
        int | None, typer.Option(metavar="N", min=0, help="List the experts of layer N.")
    ] = None,
    expert: Annotated[
        str | None,
        typer.Option(
            metavar="LAYER:EXPERT",
            help="Show all the evidence of one expert: typical tokens, examples, labels, kinds.",
        ),
    ] = None,
    role: Annotated[
        Role | None, typer.Option(show_default=False, help="List the experts of one role.")
    ] = None,
    name: Annotated[
        str | None, typer.Option(metavar="TEXT", help="List the experts with TEXT in their name.")
    ] = None,
    sort: Annotated[Sort, typer.Option(help="Order of the list.")] = Sort.EXPERT,
    clusters: Annotated[
        int,
        typer.Option(
            metavar="N", min=0, help="Groups of tokens to make, for what nothing else describes."
        ),
    ] = 12,
    min_focus: Annotated[
        float,
        typer.Option(
            metavar="SHARE",
            min=0.0,
            max=1.0,
            help="Name an expert after a label or kind from this focus on: 0 where it does not "
            "care, 1 where it takes nothing else. Below 0.5, random routers get names, too.",
        ),
    ] = 0.5,
) -> None:
    """Name every expert by what it does, with the evidence.

    \b
    moe-lens experts demo
    moe-lens experts run/ --role specialist --sort lift
    moe-lens experts run/ --expert 2:6
    moe-lens experts MODEL --data prompts.jsonl --output experts.png

    Names come from the labels of the text, if it has any, and from kinds of token: digits, JSON
    keys, indentation, scripts, the start of the prompt and others.
    """
    from moe_lens.analysis.taxonomy import Thresholds, name_experts

    cell = _cell(expert, layer, role, name)
    with analysed(source, reads) as read:
        _check(read.trace, layer, cell)
        found = name_experts(
            read.trace,
            clusters=clusters,
            thresholds=Thresholds(focus=min_focus),
            seed=reads.seed,
            progress=read.progress,
        )

    from moe_lens.figures.experts import draw_experts

    page = found.page(*cell) if cell else None
    wanted = None if role is None else role.replace("-", " ")
    listed = page or found.select(layer=layer, role=wanted, name=name, sort=sort)

    def draw(_: Any, **options: Any) -> Any:
        return draw_experts(found, **options)  # the map is of all experts, whatever is listed

    present(listed, read.name, shown, draw)


def _cell(
    expert: str | None, layer: int | None, role: Role | None, name: str | None
) -> tuple[int, int] | None:
    """``3:7`` as numbers, and no list beside it."""
    if expert is None:
        return None
    if any(each is not None for each in (layer, role, name)):
        raise UsageError("--expert shows one expert: leave out --layer, --role and --name")
    return read_expert(expert)


def _check(trace: Any, layer: int | None, cell: tuple[int, int] | None) -> None:
    """Refuse what is not there before the trace is read."""
    from moe_lens.analysis.taxonomy.result import check_expert

    if layer is not None:
        check_expert(trace, layer, 0)
    if cell is not None:
        check_expert(trace, *cell)
