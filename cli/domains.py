"""``moe-lens domains``: which experts prefer which label of the text, and how far layers know."""

from __future__ import annotations

from typing import Annotated

import typer

from .analysed import analysed
from .bundles import Reads, Shown, bundled
from .found import present
from .options import (
    Source,
)

Choices = Annotated[
    int | None,
    typer.Option(
        metavar="K",
        min=1,
        show_default=False,
        help="Count only the first K choices of each token, those with the highest weights. By "
        "default all.",
    ),
]


@bundled
def domains(
    source: Source,
    reads: Reads,
    shown: Shown,
    choices: Choices = None,
) -> None:
    """Show which experts prefer which domain.

    \b
    moe-lens domains demo
    moe-lens domains run/ --choices 1 --output domains.png
    moe-lens domains MODEL --data labelled.jsonl --json

    Domains are the labels of the prompts: "label" in JSONL, or the folder of a text file.
    """
    from moe_lens.analysis.domains import domains as find

    with analysed(source, reads) as read:
        found = find(read.trace, choices=choices, seed=reads.seed, progress=read.progress)
    from moe_lens.figures.domains import draw_domains

    present(found, read.name, shown, draw_domains)
