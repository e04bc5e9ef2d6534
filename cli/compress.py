"""``moe-lens compress``: a smaller model, and what it lost."""

from __future__ import annotations

import json
import os.path
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe_lens.atomic import write_bytes
from moe_lens.errors import UsageError
from moe_lens.telling import Stage

from . import screen
from .compress_options import (
    Blend,
    CalibrationData,
    DryRun,
    Experts,
    ExpertWidth,
    Force,
    Format,
    FormatOption,
    MethodOption,
    Output,
    PerLayer,
    PlanFile,
    PromptsOfEach,
    Protect,
    Ratio,
    RepairRouter,
    Resume,
    SavePlan,
    SmallerK,
    Statistics,
    StopAt,
    TargetGb,
    Threshold,
    UploadRepo,
)
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
    ChatTemplate,
    CpuExperts,
    CpuExpertsMode,
    EvalData,
    Json,
    MaxKl,
    Model,
    PromptLength,
    Seed,
    Stream,
    TrustRemoteCode,
)
from .plan import show_choice, show_plan
from .progress import stages
from .timing import show_timing
from .verification import show_verification, show_warnings

if TYPE_CHECKING:
    from moe_lens.compress import CompressionResult, NothingToMergeError


def compress(
    model: Model,
    threshold: Threshold = None,
    ratio: Ratio = None,
    experts: Experts = None,
    target_gb: TargetGb = None,
    expert_width: ExpertWidth = None,
    plan: PlanFile = None,
    method: MethodOption = None,
    merge: Merge = False,
    grouping: GroupingOption = None,
    similarity: SimilarityOption = None,
    merge_weights: WeightsOption = None,
    align: AlignOption = None,
    router_rows: RouterRowsOption = None,
    blend: Blend = None,
    protect: Protect = False,
    repair_router: RepairRouter = None,
    per_layer: PerLayer = False,
    data: CalibrationData = None,
    eval_data: EvalData = None,
    sample_size: PromptsOfEach = 128,
    sequence_length: PromptLength = 512,
    chat_template: ChatTemplate = False,
    stop_at: StopAt = None,
    statistics: Statistics = None,
    experts_per_token: SmallerK = None,
    output: Output = None,
    max_kl: MaxKl = None,
    format: FormatOption = Format.MLX,
    dry_run: DryRun = False,
    save_plan: SavePlan = None,
    force: Force = False,
    resume: Resume = False,
    upload_repo: UploadRepo = None,
    seed: Seed = 0,
    cpu_experts: CpuExperts = CpuExpertsMode.AUTO,
    trust_remote_code: TrustRemoteCode = False,
    stream: Stream = None,
    as_json: Json = False,
) -> None:
    """Merge, remove or narrow experts; measure the cost.

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
            format=format.value,
            dry_run=dry_run,
            force=force,
            resume=resume,
            seed=seed,
            cpu_experts=cpu_experts.value,
            trust_remote_code=trust_remote_code,
            stream=stream,
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
        show_warnings(result)
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

    with stages(Stage("uploading", of=f"to {repo}")):
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
    if result.output is None:
        screen.note("a dry run: nothing was written")
    if found is None:
        return
    show_verification(found)
    show_timing(result.timing)
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
