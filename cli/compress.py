"""``moe-lens compress``: a smaller model, and what it lost."""

from __future__ import annotations

import json
import os.path
import shlex
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moe_lens.errors import UsageError

from . import screen
from .options import TEXT_FORMS, ChatTemplate, Json, Model, Seed, TrustRemoteCode
from .progress import stages

if TYPE_CHECKING:
    from moe_lens.compress import CompressionResult, NothingToMergeError, Plan

_MOST_ROWS = 40
"""Merged groups up to which each is shown; more stand in plan.json."""


class Method(StrEnum):
    """How experts are chosen for removal."""

    REAP = "reap"
    FREQUENCY = "frequency"


def compress(
    model: Model,
    threshold: Annotated[
        float | None,
        typer.Option(metavar="T", help="Merge experts whose similarity (0 to 1) reaches T."),
    ] = None,
    ratio: Annotated[
        float | None,
        typer.Option(
            metavar="R", help="Remove this share of each layer's experts (0.25: a quarter)."
        ),
    ] = None,
    method: Annotated[
        Method | None,
        typer.Option(
            show_default=False,
            help="With --ratio, which experts go. reap (default): those with the lowest mean of "
            "weight x L2 norm of their output. frequency: those chosen least.",
        ),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="DIR", help="Folder to write.")
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            "--data",
            metavar="TEXT",
            help=f"Prompts to calibrate on: {TEXT_FORMS}. The bundled text by default.",
        ),
    ] = None,
    eval_data: Annotated[
        str | None,
        typer.Option(
            metavar="TEXT",
            help="Other prompts, to measure the loss on. The bundled text by default.",
        ),
    ] = None,
    sample_size: Annotated[
        int, typer.Option(metavar="N", min=1, help="Use N prompts of each text at most.")
    ] = 128,
    sequence_length: Annotated[
        int, typer.Option(metavar="TOKENS", min=1, help="Cut longer prompts here.")
    ] = 512,
    chat_template: ChatTemplate = False,
    experts_per_token: Annotated[
        int | None,
        typer.Option(
            metavar="K",
            min=1,
            help="Experts per token of the smaller model. By default the same, unless merging "
            "makes fewer better, which is measured on calibration text.",
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show the plan and write nothing.")
    ] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Replace a model that is already at DIR.")
    ] = False,
    seed: Seed = 0,
    trust_remote_code: TrustRemoteCode = False,
    as_json: Json = False,
) -> None:
    """Merge or remove experts, and measure what that costs.

    \b
    moe-lens compress demo --threshold 0.8 --output demo-small
    moe-lens compress demo --ratio 0.25 --output demo-small
    moe-lens compress demo --threshold 0.8 --dry-run

    Similarity is the mean of two numbers, both measured on calibration text (--data): how alike
    the outputs of two experts are on the same input (cosine, 0 if opposite), and how often a
    token chose both of those that chose either.

    \b
    0    unrelated (or opposite) outputs, and no token chose both
    0.5  half of it: outputs that point the same way from experts never chosen
         together, or unrelated outputs from experts always chosen together
    1    the same direction on every token, and exactly the same tokens

    Every pair of a merged group reaches T. All layers keep the same number of experts, so that
    stock mlx_lm.load opens the result. If no pair reaches T, the command shows which T would save
    something, writes nothing and exits with 1.
    """
    if method is not None and ratio is None:
        raise UsageError("--method belongs to --ratio: a merge (--threshold) has one method only")
    with stages() as progress:
        result = _compress(
            model,
            as_json=as_json,
            threshold=threshold,
            ratio=ratio,
            method=(method or Method.REAP).value,
            output=output,
            calibration=data,
            evaluation=eval_data,
            sample_size=sample_size,
            sequence_length=sequence_length,
            chat_template=chat_template,
            experts_per_token=experts_per_token,
            dry_run=dry_run,
            force=force,
            seed=seed,
            trust_remote_code=trust_remote_code,
            progress=progress,
            say=screen.note,
        )
    if as_json:
        screen.emit_json(result.to_dict())
    else:
        _show(result)


def _compress(model: str, *, as_json: bool, **options: Any) -> CompressionResult:
    from moe_lens.compress import NothingToMergeError, compress

    try:
        return compress(model, **options)
    except NothingToMergeError as error:
        if not as_json:
            _show_best_pairs(error)
        raise


def _show_best_pairs(error: NothingToMergeError) -> None:
    names = ("layer", "most similar experts", "similarity", "outputs", "overlap")
    numbers = ("similarity", "output_similarity", "activation_overlap")
    pairs: Any = error.evidence["best_pair_by_layer"]
    rows = [
        (layer, " and ".join(map(str, pair["experts"])), *(f"{pair[name]:.3f}" for name in numbers))
        for layer, pair in pairs.items()
    ]
    screen.show(screen.table(names, rows, right=(names[0], *names[2:])), "")


def _show(result: CompressionResult) -> None:
    from moe_lens.compress.report import loss_rows, size_rows

    _show_plan(result.plan)
    found = result.verification
    if found is None:
        screen.note("a dry run: nothing was written")
        return
    corpus = found.corpus
    screen.heading(f"Loss on held-out text ({corpus.tokens:,} tokens of {corpus.name})")
    _show_rows(*loss_rows(found))
    screen.heading("Size and speed")
    _show_rows(*size_rows(found))
    screen.show("")
    for warning in result.warnings:
        screen.warn(warning)
    folder = os.path.relpath(str(result.output))
    folder = str(result.output) if folder.startswith("..") else folder
    screen.show(f"Written to {folder}. To use it:")
    screen.commands(
        f"moe-lens generate {shlex.quote(folder)} --prompt TEXT",
        f"model, tokenizer = mlx_lm.load({json.dumps(folder)})",
    )


def _show_plan(plan: Plan) -> None:
    from moe_lens.compress.report import pair_rows, plan_rows

    screen.heading(f"Plan: {plan.summary()}", first=True)
    screen.show(screen.table(*plan_rows(plan)))
    if plan.kind != "merge":
        return
    names, rows = pair_rows(plan)
    if len(rows) <= _MOST_ROWS:
        screen.heading("Similarity in each merged group (of its least similar pair)")
        screen.show(screen.table(names, rows))
    chosen = plan.evidence.get("experts_per_token")
    if chosen:
        screen.show("", chosen["text"])


def _show_rows(names: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    screen.show(screen.table(names, rows, right=names[1:]))
