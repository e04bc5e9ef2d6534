"""``moe-lens compress``: a smaller model, and what it lost."""

from __future__ import annotations

import json
import os.path
import shlex
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moe_lens.atomic import write_bytes
from moe_lens.errors import UsageError

from . import screen
from .merge_options import (
    AlignOption,
    GroupingOption,
    Merge,
    RouterRowsOption,
    SimilarityOption,
    WeightsOption,
    read_merging,
)
from .options import (
    TEXT_FORMS,
    ChatTemplate,
    EvalData,
    Json,
    MaxKl,
    Model,
    PromptLength,
    Seed,
    TrustRemoteCode,
)
from .plan import show_choice, show_plan
from .progress import stages, working
from .verification import show_verification

if TYPE_CHECKING:
    from moe_lens.compress import CompressionResult, NothingToMergeError


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


def compress(
    model: Model,
    threshold: Annotated[
        float | None,
        typer.Option(metavar="T", help="Merge experts whose similarity (0 to 1) reaches T."),
    ] = None,
    ratio: Annotated[
        float | None,
        typer.Option(
            metavar="R",
            help="A size: this share of each layer's experts less (0.25: a quarter), or as many "
            "bytes.",
        ),
    ] = None,
    experts: Annotated[
        int | None,
        typer.Option(
            metavar="N", min=1, help="A size: N experts in each layer, or the bytes they take."
        ),
    ] = None,
    target_gb: Annotated[
        float | None,
        typer.Option(
            "--target-gb",
            metavar="G",
            help="A size: all weight files together take at most G GB (10^9 bytes).",
        ),
    ] = None,
    expert_width: Annotated[
        float | None,
        typer.Option(
            metavar="W",
            help="Keep this share (0.5) or this number (96) of the channels inside every expert, "
            "the most important ones. Alone, or together with a size, which then counts experts.",
        ),
    ] = None,
    method: Annotated[
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
        ),
    ] = None,
    merge: Merge = False,
    grouping: GroupingOption = None,
    similarity: SimilarityOption = None,
    merge_weights: WeightsOption = None,
    align: AlignOption = None,
    router_rows: RouterRowsOption = None,
    blend: Annotated[
        str | None,
        typer.Option(
            metavar="BLEND",
            help="With a size and one method, how the labels of the calibration text count: "
            "code=2,prose=1, or max-min (keep as much as possible of the label that loses most).",
        ),
    ] = None,
    protect: Annotated[
        bool,
        typer.Option(
            "--protect",
            help="With a size and one method, keep super experts: largest |output| above the "
            "99.5th percentile of all experts and a tenth of the largest, in the first three "
            "quarters of the layers.",
        ),
    ] = False,
    statistics: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Keep what calibration measures in FILE; if it is there, use it again. Refused "
            "for another model, text or way of reading.",
        ),
    ] = None,
    stop_at: Annotated[
        float | None,
        typer.Option(
            metavar="R",
            help="Stop calibrating once two halves of the text read so far rank the experts of "
            "every layer alike, to this rank correlation (0.95).",
        ),
    ] = None,
    plan: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Apply this plan (plan.json of a model, or of --save-plan; it may be edited).",
        ),
    ] = None,
    save_plan: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Write the plan to FILE, also after a dry run."),
    ] = None,
    repair_router: Annotated[
        int | None,
        typer.Option(
            metavar="STEPS",
            min=1,
            help="Train the router rows of the smaller model for STEPS steps (200) to answer as "
            "the parent does; used only if that helps on text that did not train.",
        ),
    ] = None,
    per_layer: Annotated[
        bool,
        typer.Option(
            "--per-layer",
            help="Let layers keep different numbers of experts: with a size and a method that "
            "removes experts, by measured sensitivity at the same bytes; with --threshold, all "
            "that reach it. Stock mlx_lm.load then needs trust_remote_code=True, for a small file "
            "that builds the layers.",
        ),
    ] = False,
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
    eval_data: EvalData = None,
    sample_size: Annotated[
        int, typer.Option(metavar="N", min=1, help="Use N prompts of each text at most.")
    ] = 128,
    sequence_length: PromptLength = 512,
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
    max_kl: MaxKl = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show the plan and write nothing.")
    ] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Replace a model that is already at DIR.")
    ] = False,
    upload_repo: Annotated[
        str | None,
        typer.Option(
            metavar="ORG/NAME",
            help="Upload the result to this model repository of the Hugging Face hub, made if "
            "there is none; only after everything was checked.",
        ),
    ] = None,
    seed: Seed = 0,
    trust_remote_code: TrustRemoteCode = False,
    as_json: Json = False,
) -> None:
    """Merge, remove or narrow experts, and measure what that costs.

    \b
    moe-lens compress demo --ratio 0.25 --output demo-small
    moe-lens compress demo --target-gb 0.003 --output demo-small
    moe-lens compress demo --threshold 0.8 --output demo-small
    moe-lens compress demo --ratio 0.5 --merge --output demo-small
    moe-lens compress demo --expert-width 0.5 --output demo-small
    moe-lens compress demo --ratio 0.25 --dry-run --save-plan plan.json
    moe-lens compress demo --plan plan.json --output demo-small

    Similarity is the mean of two numbers, both measured on calibration text (--data): how alike
    the outputs of two experts are on the same input (cosine, 0 if opposite), and how often a
    token chose both of those that chose either.

    \b
    0    unrelated (or opposite) outputs, and no token chose both
    0.5  half of it: outputs that point the same way from experts never chosen
         together, or unrelated outputs from experts always chosen together
    1    the same direction on every token, and exactly the same tokens

    Every pair of a merged group reaches T. All layers keep the same number of experts (but for
    --per-layer), so that stock mlx_lm.load opens the result. If no pair reaches T, the command
    shows which T would save something, writes nothing and exits with 1.

    A size (--ratio, --experts, --target-gb) is reached by the method that loses least: all are
    tried on a third of the calibration text, which makes no plan, and shown as a table.
    """
    merging = read_merging(
        merge=merge,
        threshold=threshold,
        grouping=grouping,
        similarity=similarity,
        weights=merge_weights,
        align=align,
        router_rows=router_rows,
    )
    if upload_repo is not None:
        _check_upload(upload_repo, dry_run)
    with stages() as progress:
        result = _compress(
            model,
            as_json=as_json,
            threshold=threshold,
            ratio=ratio,
            experts=experts,
            target_gb=target_gb,
            expert_width=expert_width,
            merge=merge,
            merging=merging,
            method=None if method is None else method.value,
            plan=plan,
            repair_router=repair_router,
            per_layer=per_layer,
            output=output,
            calibration=data,
            evaluation=eval_data,
            sample_size=sample_size,
            sequence_length=sequence_length,
            chat_template=chat_template,
            experts_per_token=experts_per_token,
            blend=blend,
            protect=protect,
            statistics_file=statistics,
            stop_at=stop_at,
            max_kl=max_kl,
            dry_run=dry_run,
            force=force,
            seed=seed,
            trust_remote_code=trust_remote_code,
            progress=progress,
            say=screen.note,
        )
    if save_plan is not None:
        write_bytes(save_plan.expanduser(), result.plan.to_json().encode())
    if not as_json:
        _show(result, save_plan)
    uploaded = None
    if upload_repo is not None and result.output is not None:
        uploaded = _upload(result.output, upload_repo)
    if as_json:
        screen.emit_json({**result.to_dict(), **({"uploaded": uploaded} if uploaded else {})})
    elif uploaded:
        screen.show(f"Uploaded to {uploaded}")


def _check_upload(repo: str, dry_run: bool) -> None:
    if dry_run:
        raise UsageError(
            "a dry run makes nothing to upload: leave out either --upload-repo or --dry-run"
        )
    from moe_lens.compress.report.upload import check_upload

    check_upload(repo)


def _upload(folder: Path, repo: str) -> str:
    from moe_lens.compress import upload

    with working(f"uploading to {repo}"):
        return upload(folder, repo)


def _compress(model: str, *, as_json: bool, **options: Any) -> CompressionResult:
    from moe_lens.compress import LossTooLargeError, NothingToMergeError, compress

    try:
        return compress(model, **options)
    except NothingToMergeError as error:
        if not as_json:
            _show_best_pairs(error)
        raise
    except LossTooLargeError as error:
        if not as_json:
            show_verification(error.verification, first=True)
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


def _show(result: CompressionResult, save_plan: Path | None) -> None:
    show_choice(result.plan, first=True)
    show_plan(result.plan, first=not result.plan.evidence.get("choice"))
    if save_plan is not None:
        screen.show("", f"The plan is in {save_plan}")
    found = result.verification
    if found is None:
        screen.note("a dry run: nothing was written")
        return
    show_verification(found)
    screen.show("")
    folder = os.path.relpath(str(result.output))
    folder = str(result.output) if folder.startswith("..") else folder
    screen.show(f"Written to {folder}. To use it:")
    # Unequal layers are built by a file that comes with the model.
    option, argument = "", ""
    if result.plan.per_layer:
        option, argument = " --trust-remote-code", ", trust_remote_code=True"
    screen.commands(
        f"moe-lens generate {shlex.quote(folder)} --prompt TEXT{option}",
        f"model, tokenizer = mlx_lm.load({json.dumps(folder)}{argument})",
    )
