"""Arguments and options that several commands share, with one wording each."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

TEXT = "The text"
RESULT = "The result"
"""Headings under which a command with many options shows them (see `help`)."""

Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        show_default=False,
        help="demo, a folder that mlx_lm.load opens, or a model of the hub (owner/name).",
    ),
]

Json = Annotated[
    bool,
    typer.Option(
        "--json",
        help="Print JSON to stdout, and nothing else there; what is said on stderr is JSON as "
        "well, one object a line, unless that is a terminal.",
    ),
]

TrustRemoteCode = Annotated[
    bool,
    typer.Option("--trust-remote-code", help="Let the model run the Python code it comes with."),
]

Stream = Annotated[
    bool | None,
    typer.Option(
        "--stream/--no-stream",
        show_default=False,
        help="Read the weights layer by layer, each time they are needed, for a model larger than "
        "memory. By default, if they take more than 60 % of the free memory.",
    ),
]

ExpertsPerToken = Annotated[
    int | None,
    typer.Option(metavar="K", help="Route every token to K experts instead of the model's own."),
]

MaskExperts = Annotated[
    list[str] | None,
    typer.Option(
        metavar="LAYER:EXPERTS",
        help="Experts that may not be chosen: 3:7,12 in layer 3, *:7 in all layers. Repeatable.",
    ),
]

ForceExperts = Annotated[
    list[str] | None,
    typer.Option(
        metavar="LAYER:EXPERTS",
        help="Experts that every token uses, written like --mask-experts. Repeatable.",
    ),
]


class KernelMode(StrEnum):
    """Whether changed routing runs in the fused kernel."""

    AUTO = "auto"
    NEVER = "never"
    ALWAYS = "always"


Kernel = Annotated[
    KernelMode | None,
    typer.Option(
        show_default=False,
        help="Run changed routing in the fused GPU kernel: auto (default) where it is proved, "
        "never, or always. MOE_LENS_KERNEL sets it, too.",
    ),
]

Prompt = Annotated[
    str | None,
    typer.Option("--prompt", "-p", metavar="TEXT", help="The prompt; - reads it from stdin."),
]

TEXT_FORMS = (
    "a text file (one prompt per line), JSONL (text, prompt or messages; optional label), "
    "a folder of text files, demo, or demo:evaluation"
)
"""What --data takes."""

Data = Annotated[
    str | None, typer.Option("--data", metavar="TEXT", help=f"Prompts to run: {TEXT_FORMS}.")
]

Source = Annotated[
    str,
    typer.Argument(
        metavar="MODEL|RUN",
        show_default=False,
        help="A model (demo, a folder, owner/name), or a folder that moe-lens trace wrote.",
    ),
]

AnalysedText = Annotated[
    str | None,
    typer.Option(
        "--data",
        metavar="TEXT",
        show_default=False,
        help=f"Prompts for a model to run: {TEXT_FORMS}. By default demo.",
    ),
]


def _picture(output: Path | None) -> Path | None:
    """Refuse a format that pictures are not written in before anything runs."""
    if output is not None:
        from moe_lens.figures.formats import picture_format

        picture_format(output)
    return output


PictureFile = Annotated[
    Path | None,
    typer.Option(
        "--output",
        "-o",
        metavar="FILE",
        callback=_picture,
        help="Write a picture: .png, .svg or .pdf.",
    ),
]


def _graphs(files: list[Path] | None) -> list[Path] | None:
    """Refuse a format that graphs are not written in before anything runs."""
    if files:
        from moe_lens.figures.formats import graph_format

        for file in files:
            graph_format(file)
    return files


GraphFile = Annotated[
    list[Path] | None,
    typer.Option(
        "--graph",
        metavar="FILE",
        callback=_graphs,
        help="Write the graph: .html (a page to explore), .dot, .json (node-link), .graphml or "
        ".mmd (Mermaid). Repeatable.",
    ),
]


class Theme(StrEnum):
    """The background of a picture."""

    LIGHT = "light"
    DARK = "dark"


PictureTheme = Annotated[Theme, typer.Option("--theme", help="Background of the picture.")]

RequiredData = Annotated[
    str,
    typer.Option(
        "--data", metavar="TEXT", show_default=False, help=f"Prompts to run: {TEXT_FORMS}."
    ),
]

SampleSize = Annotated[
    int | None, typer.Option(metavar="N", min=1, help="Run N prompts only, drawn with --seed.")
]

SequenceLength = Annotated[
    int | None,
    typer.Option(metavar="TOKENS", min=1, help="Cut longer prompts after this many tokens."),
]

PromptLength = Annotated[
    int,
    typer.Option(
        metavar="TOKENS",
        min=1,
        help="Cut longer prompts here.",
        rich_help_panel=TEXT,
    ),
]

EvalData = Annotated[
    str | None,
    typer.Option(
        metavar="TEXT",
        help="Prompts to measure the loss on, others than calibrated. The bundled text by default.",
        rich_help_panel=TEXT,
    ),
]

MaxKl = Annotated[
    float | None,
    typer.Option(
        metavar="NATS",
        help="Fail (exit code 1) if the mean KL divergence per token is above NATS.",
        rich_help_panel=RESULT,
    ),
]

ChatTemplate = Annotated[
    bool,
    typer.Option(
        "--chat-template",
        help="Put each prompt into the model's chat template.",
        rich_help_panel=TEXT,
    ),
]


class CpuExpertsMode(StrEnum):
    """How the experts are computed on MLX's CPU backend."""

    AUTO = "auto"
    STOCK = "stock"
    SEGMENTED = "segmented"


CpuExperts = Annotated[
    CpuExpertsMode,
    typer.Option(
        help="How experts are computed on a CPU: segmented (many times faster, other last bits), "
        "stock (as mlx-lm does), or auto (segmented on a CPU, stock on a GPU).",
    ),
]

Seed = Annotated[int, typer.Option(metavar="N", help="Seed of everything drawn at random.")]

OutputFolder = Annotated[
    Path, typer.Option("--output", "-o", metavar="DIR", show_default=False, help="Folder to write.")
]
