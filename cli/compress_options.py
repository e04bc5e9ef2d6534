"""Options of ``moe-lens compress``, but for those that say how experts are merged."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from .options import RESULT, TEXT, TEXT_FORMS

SIZE = "How small"
CHOICE = "Which experts"


class Format(StrEnum):
    """The layout of the result: `moe_lens.compress.checkpoint.content.FORMATS`."""

    MLX = "mlx"
    HF = "hf"


class Method(StrEnum):
    """How a size is reached: `moe_lens.compress.statistics.saliency.METHODS`, and two more."""

    AUTO = "auto"
    REAP = "reap"
    GATED_SUM = "gated-sum"
    EAN_MEAN = "ean-mean"
    EAN_SUM = "ean-sum"
    MSAN = "msan"
    GATE_SUM = "gate-sum"
    FREQUENCY = "frequency"
    AIMER = "aimer"
    GREEDY = "greedy"
    RANDOM = "random"
    CHANNELS = "channels"


Threshold = Annotated[
    float | None,
    typer.Option(
        metavar="T",
        help="Merge experts whose similarity (0 to 1) reaches T.",
        rich_help_panel=SIZE,
    ),
]

Ratio = Annotated[
    float | None,
    typer.Option(
        metavar="R",
        help="A size: this share of each layer's experts less (0.25: a quarter), or as many bytes.",
        rich_help_panel=SIZE,
    ),
]

Experts = Annotated[
    int | None,
    typer.Option(
        metavar="N",
        min=1,
        help="A size: N experts in each layer, or the bytes they take.",
        rich_help_panel=SIZE,
    ),
]

TargetGb = Annotated[
    float | None,
    typer.Option(
        "--target-gb",
        metavar="G",
        help="A size: all weight files together take at most G GB (10^9 bytes).",
        rich_help_panel=SIZE,
    ),
]

ExpertWidth = Annotated[
    float | None,
    typer.Option(
        metavar="W",
        help="Keep this share (0.5) or this number (96) of the channels inside every expert, "
        "the most important ones. Alone, or together with a size, which then counts experts.",
        rich_help_panel=SIZE,
    ),
]

MethodOption = Annotated[
    Method | None,
    typer.Option(
        metavar="METHOD",
        show_default=False,
        help="With a size, how it is reached. auto (default): all methods are tried on a part "
        "of the calibration text, and the one that loses least is taken. Others remove exactly "
        "so many experts, those with the least: reap: mean of weight x L2 norm of the output "
        "over routed tokens; gated-sum: its sum. ean-mean, ean-sum: of the norm alone; msan: "
        "mean squared norm. gate-sum: sum of the weights. frequency: how often chosen. aimer: "
        "the shape of the weights. greedy: one by one, what the block's output misses least "
        "once its tokens are routed anew. random. channels: narrower experts in their place.",
        rich_help_panel=CHOICE,
    ),
]

Blend = Annotated[
    str | None,
    typer.Option(
        metavar="BLEND",
        help="With a size and one method, how the labels of the calibration text count: "
        "code=2,prose=1, or max-min (keep as much as possible of the label that loses most).",
        rich_help_panel=CHOICE,
    ),
]

Protect = Annotated[
    bool,
    typer.Option(
        "--protect",
        help="With a size and one method, keep super experts: largest |output| above the "
        "99.5th percentile of all experts and a tenth of the largest, in the first three "
        "quarters of the layers.",
        rich_help_panel=CHOICE,
    ),
]

Statistics = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="Keep what calibration measures in FILE; if it is there, use it again. Refused "
        "for another model, text or way of reading.",
        rich_help_panel=TEXT,
    ),
]

StopAt = Annotated[
    float | None,
    typer.Option(
        metavar="R",
        help="Stop calibrating once two halves of the text read so far rank the experts of "
        "every layer alike, to this rank correlation (0.95).",
        rich_help_panel=TEXT,
    ),
]

PlanFile = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="Apply this plan (plan.json of a model, or of --save-plan; it may be edited).",
        rich_help_panel=SIZE,
    ),
]

SavePlan = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="Write the plan to FILE, also after a dry run.",
        rich_help_panel=RESULT,
    ),
]

RepairRouter = Annotated[
    int | None,
    typer.Option(
        metavar="STEPS",
        min=1,
        help="Train the router rows of the smaller model for STEPS steps (200) to answer as "
        "the parent does; used only if that helps on text that did not train.",
        rich_help_panel=CHOICE,
    ),
]

PerLayer = Annotated[
    bool,
    typer.Option(
        "--per-layer",
        help="Let layers keep different numbers of experts: with a size and a method that "
        "removes experts, by measured sensitivity at the same bytes; with --threshold, all "
        "that reach it. Stock mlx_lm.load then needs trust_remote_code=True, for a small file "
        "that builds the layers.",
        rich_help_panel=CHOICE,
    ),
]

Output = Annotated[
    Path | None,
    typer.Option(
        "--output",
        "-o",
        metavar="DIR",
        help="Folder to write.",
        rich_help_panel=RESULT,
    ),
]

CalibrationData = Annotated[
    str | None,
    typer.Option(
        "--data",
        metavar="TEXT",
        help=f"Prompts to calibrate on: {TEXT_FORMS}. The bundled text by default.",
        rich_help_panel=TEXT,
    ),
]

PromptsOfEach = Annotated[
    int,
    typer.Option(
        metavar="N",
        min=1,
        help="Use N prompts of each text at most.",
        rich_help_panel=TEXT,
    ),
]

SmallerK = Annotated[
    int | None,
    typer.Option(
        metavar="K",
        min=1,
        help="Experts per token of the smaller model. By default the same, unless merging "
        "makes fewer better, which is measured on calibration text.",
        rich_help_panel=CHOICE,
    ),
]

FormatOption = Annotated[
    Format,
    typer.Option(
        metavar="FORMAT",
        help="mlx, or hf: names and tensors as Hugging Face transformers has them, for "
        "transformers, vLLM and llama.cpp's converter. mlx-lm opens both.",
        rich_help_panel=RESULT,
    ),
]

DryRun = Annotated[
    bool,
    typer.Option(
        "--dry-run",
        help="Show the plan and write nothing.",
        rich_help_panel=RESULT,
    ),
]

Force = Annotated[
    bool,
    typer.Option(
        "--force",
        help="Replace a model that is already at DIR.",
        rich_help_panel=RESULT,
    ),
]

Resume = Annotated[
    bool,
    typer.Option(
        "--resume",
        help="Go on with what a run of the same command, stopped by whatever, has done; the "
        "result is the same to the last byte.",
        rich_help_panel=RESULT,
    ),
]

UploadRepo = Annotated[
    str | None,
    typer.Option(
        metavar="ORG/NAME",
        help="Upload the result to this model repository of the Hugging Face hub, made if "
        "there is none; only after everything was checked.",
        rich_help_panel=RESULT,
    ),
]
