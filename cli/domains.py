"""``moe-lens domains``: which experts prefer which label of the text, and how far layers know."""

from __future__ import annotations

from typing import Annotated

import typer

from .analysed import Reads, analysed
from .found import present
from .options import (
    AnalysedText,
    ChatTemplate,
    Json,
    PictureFile,
    PictureTheme,
    SampleSize,
    Seed,
    SequenceLength,
    Source,
    Stream,
    Theme,
    TrustRemoteCode,
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


def domains(
    source: Source,
    data: AnalysedText = None,
    choices: Choices = None,
    output: PictureFile = None,
    theme: PictureTheme = Theme.LIGHT,
    sample_size: SampleSize = None,
    sequence_length: SequenceLength = None,
    chat_template: ChatTemplate = False,
    seed: Seed = 0,
    trust_remote_code: TrustRemoteCode = False,
    stream: Stream = None,
    json: Json = False,
) -> None:
    """Show which experts prefer which domain.

    \b
    moe-lens domains demo
    moe-lens domains run/ --choices 1 --output domains.png
    moe-lens domains MODEL --data labelled.jsonl --json

    Domains are the labels of the prompts: "label" in JSONL, or the folder of a text file.
    """
    from moe_lens.analysis.domains import domains as find

    reads = Reads(
        data, sample_size, sequence_length, chat_template, seed, trust_remote_code, stream
    )
    with analysed(source, reads) as read:
        found = find(read.trace, choices=choices, seed=seed, progress=read.progress)
    from moe_lens.figures.domains import save_domains

    present(found, read.name, output=output, save=save_domains, theme=theme, as_json=json)
