"""From a model to a smaller one on disk, in one call: calibrate, plan, write, verify."""

from __future__ import annotations

import inspect
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from moe_lens.checkpoint_files.unchanged import FolderState
from moe_lens.corpus import Corpus
from moe_lens.errors import UsageError
from moe_lens.families import AUTO, LIST_NOTE, SEGMENTED, decide
from moe_lens.loading import resolve
from moe_lens.telling import LOADING, Say, StageProgress, begin
from moe_lens.timing import Stopwatch

from .calibration.held_out import check_held_out
from .calibration.texts import bundled_note, read_text
from .checkpoint.content import check_format
from .choice.asked import Asked
from .compression_result import CompressionResult
from .hugging_face.exported import check_exportable
from .making import Making
from .merging.merging import Merging
from .merging.planning import NothingToMergeError
from .notes import Notes
from .plan.plan import Plan
from .plan.plan_json import read_plan
from .plan_stage import Reading
from .report.commands import Texts, commands
from .requests import compression_request
from .resuming.output_place import check_output
from .resuming.work_folder import WorkFolder
from .resuming.working import working_at
from .tensors.parent import open_parent
from .verification.verification import LossTooLargeError, check_max_kl

SAMPLE_SIZE = 128
SEQUENCE_LENGTH = 512


def compress(
    name: str | Path,
    *,
    threshold: float | None = None,
    ratio: float | None = None,
    experts: int | None = None,
    target_gb: float | None = None,
    expert_width: float | None = None,
    merge: bool = False,
    method: str | None = None,
    merging: Merging | None = None,
    plan: Plan | str | Path | None = None,
    repair_router: int | None = None,
    per_layer: bool = False,
    output: str | Path | None = None,
    calibration: Corpus | str | Path | None = None,
    evaluation: Corpus | str | Path | None = None,
    sample_size: int | None = SAMPLE_SIZE,
    sequence_length: int | None = SEQUENCE_LENGTH,
    chat_template: bool = False,
    experts_per_token: int | None = None,
    blend: str | None = None,
    protect: bool = False,
    statistics_file: str | Path | None = None,
    stop_at: float | None = None,
    max_kl: float | None = None,
    format: str = "mlx",
    dry_run: bool = False,
    force: bool = False,
    resume: bool = False,
    seed: int = 0,
    revision: str | None = None,
    trust_remote_code: bool = False,
    stream: bool | None = None,
    cpu_experts: str = AUTO,
    progress: StageProgress | None = None,
    say: Say | None = None,
) -> CompressionResult:
    """Make a smaller model of `name` that stock ``mlx_lm.load`` opens, and measure what it lost.

    Say how small with `ratio`, `experts` or `target_gb`; the method that loses least at that size
    is found by trying all of them, unless one is named. Or give `threshold` to merge what is
    similar, `expert_width` to make every expert narrower, or a `plan`.

    Args:
        name: A folder, a hub id, or ``demo``.
        threshold: Merge experts whose similarity reaches this, above 0 and at most 1
            (`similarity.SCALE` says what 0, 0.5 and 1 mean).
        ratio: This share of the experts of each layer less, or as many bytes, between 0 and 1.
        experts: So many experts in each layer, or as many bytes as they take.
        target_gb: All weight files together take at most so many GB (10^9 bytes).
        expert_width: Keep this many channels inside every expert (2 or more), or this share of
            them (below 1; the nearest width that can be stored and loaded). Alone, or with a
            size that then counts experts.
        merge: With a size, merge so many experts into the others, not remove them.
        method: With a size: ``auto`` tries all methods on a third of the calibration text, which
            makes no plan; one of `saliency.METHODS` removes exactly so many experts, and
            ``channels`` narrows all of them. None: ``auto``, or ``reap`` where an expert width, a
            blend or the protection of super experts needs one method.
        merging: How a merge groups experts and makes one of them. None: `merging.BY_THRESHOLD`
            with a threshold and `merging.TO_A_NUMBER` with a size.
        plan: A plan, or the path of its JSON, to apply as it is: the same plan on the same
            checkpoint gives the same bytes.
        repair_router: Train the rows of the smaller model's routers for so many steps to answer
            as the parent does, on calibration text, and use them if that helps on the part of it
            that is kept for comparing. None: do not.
        per_layer: Layers may keep different numbers of experts. With a size and a method that
            removes experts: by measured sensitivity (`layer_budget.DEFINITION`), at the bytes of
            equal layers, where that loses less on calibration text that made no plan. With a
            threshold: all groups that reach it, in every layer. Stock mlx-lm then
            loads the result for ``trust_remote_code=True`` only, since it runs a small file that
            comes with it.
        output: The folder to make; not needed for a dry run.
        calibration: Text to calibrate on; None for the bundled one.
        evaluation: Other text to measure the loss on; None for the bundled one.
        sample_size: Most prompts of either text, drawn with `seed`; None for all.
        sequence_length: Tokens after which a prompt is cut.
        chat_template: Render prompts through the tokenizer's chat template.
        experts_per_token: Of the smaller model. None keeps the parent's, except that a merge
            measures on calibration text whether fewer are better.
        blend: With a size and one method, how the labels of the calibration text count:
            ``max-min``, or weights such as ``code=2,prose=1``. None: each token alike.
        protect: With a size and one method, keep the super experts (`super_experts.DEFINITION`).
        statistics_file: Where the statistics of the calibration are kept. If the file is there,
            it is read in place of calibrating, and refused if it is of another model or text.
        stop_at: Stop calibrating when two halves of what was read rank the experts this much
            alike (see `calibrate`). None: read all of the text.
        max_kl: Refuse to leave a model whose mean KL divergence on the held-out text is above
            this, in nats per token.
        format: ``mlx``, or ``hf`` for names and tensors as Hugging Face transformers has them, so
            that transformers, vLLM and llama.cpp's converter read it; mlx-lm opens both.
        dry_run: Stop after the plan; nothing is written.
        force: Replace a model that stands at `output`, once the new one is complete.
        resume: Go on with what a stopped run of the same call has done; the result is the same,
            to the last bit. Otherwise that is removed.
        seed: Of every random choice; the same seed gives the same model.
        revision: Of a hub id.
        trust_remote_code: Let the tokenizer run code that comes with the model.
        stream: Whether weights are read layer by layer, for models larger than memory; the result
            is the same. None: if they take more than 60 % of the free memory.
        cpu_experts: How experts are computed while the parent is read and plans are tried and
            measured: ``stock``, ``segmented`` (`RoutedModel.cpu_experts`), or ``auto``. The last
            bits of what is measured depend on it, so plan and verification say which it was.
        progress: Called with the stage, and how much of how much is done.
        say: Called with each note as it arises; all notes are in the result as well.

    Raises:
        UsageError: Arguments that cannot be met: nothing to do, a threshold together with a ratio
            or a width, numbers out of range, an output that exists, one text for both purposes,
            too few experts left, a width that cannot be stored, a size that cannot be reached (the
            message names the smallest), a plan that does not add up or is for another model.
        LossTooLargeError: The loss is above `max_kl`; nothing is written, and what stood at
            `output` stays. It carries the verification.
        NothingToMergeError: No expert would disappear at this threshold; the message shows the
            similarities found and which threshold would save how much. Nothing is written.
        UnsupportedModelError: A model that cannot be compressed, with the reason.
        MoeLensError: A full disk, an unreadable checkpoint.
    """
    from moe_lens.router import ExpertRouter

    clock = Stopwatch(progress)
    asked = Asked(
        threshold=threshold,
        ratio=ratio,
        experts=experts,
        target_gb=target_gb,
        expert_width=expert_width,
        merge=merge,
        merging=merging,
        method=method,
        plan=plan,
        experts_per_token=experts_per_token,
        blend=blend,
        protect=protect,
        statistics_file=statistics_file,
        stop_at=stop_at,
        repair_steps=repair_router,
        per_layer=per_layer,
    )
    asked.check()
    computed = decide(cpu_experts)
    check_format(format, per_layer=per_layer)
    _check_result(output, max_kl, dry_run, resume)
    source = resolve(name, revision)
    folder = None if output is None else Path(output).expanduser().absolute()
    if folder is not None and not dry_run:
        check_output(folder, source, force=force or resume)
    notes = Notes(say)
    learn, test = _texts(name, calibration, evaluation, notes)
    if sample_size is not None:
        learn, test = learn.sample(sample_size, seed), test.sample(sample_size, seed)
    notes.extend([*learn.notes, *test.notes])
    check_held_out(learn, test)
    asked.check_text(learn)
    if format == "hf":
        check_exportable(
            open_parent(source, trust_remote_code=trust_remote_code),
            changed=asked.may_change_experts,
        )

    first_seen = FolderState.of(source)
    if folder is None or dry_run:
        place: AbstractContextManager[WorkFolder | None] = nullcontext()
    else:
        settings: dict[str, Any] = {
            "sample_size": sample_size,
            "sequence_length": sequence_length,
            "chat_template": chat_template,
            "seed": seed,
            "trust_remote_code": trust_remote_code,
            "cpu_experts": computed,
            "format": format,
        }
        request = compression_request(name, first_seen, asked, (learn, test), settings)
        place = working_at(
            folder,
            request,
            resume=resume,
            force=force,
            refusals=(NothingToMergeError, LossTooLargeError),
            say=notes.aside,
        )
    with place as work, first_seen.explaining():
        if work is not None and work.finished:
            notes.aside(f"{work.output} is already made, by a run that was asked for just this")
            made = read_plan(work.output / "plan.json")
            return CompressionResult(made, work.output, None, clock.timing(), notes.said)
        begin(clock, LOADING)
        router = ExpertRouter.from_pretrained(
            source, trust_remote_code=trust_remote_code, stream=stream
        )
        router.name = str(name)
        if not router.streamed:
            clock(LOADING, router.info.bytes, router.info.bytes)
        notes.extend(router.notes)
        computed = decide(computed, router.layers)
        if cpu_experts == SEGMENTED != computed:
            notes.add(LIST_NOTE)
        making = Making(
            router=router,
            source=source,
            asked=asked,
            reading=Reading(sequence_length, chat_template, seed, trust_remote_code, computed),
            sample_size=sample_size,
            stream=stream,
            format=format,
            clock=clock,
            notes=notes,
            unchanged=first_seen.check,
        )
        made = making.plan(learn, work)
        if work is None:
            return CompressionResult(made, None, None, clock.timing(), notes.said)
        texts = Texts(
            calibration,
            evaluation,
            sample_size,
            sequence_length,
            chat_template,
            seed,
            cpu_experts,
        )
        again = commands(
            made,
            work.output.name,
            asked if revision is None else None,  # the command line reads the newest only
            texts,
            _DEFAULTS,
            format=format,
            trust_remote_code=trust_remote_code,
        )
        found = making.model(made, test, work, again, max_kl)
        return CompressionResult(made, work.output, found, clock.timing(), notes.said)


_DEFAULTS = {
    name: parameter.default for name, parameter in inspect.signature(compress).parameters.items()
}


def _check_result(
    output: str | Path | None, max_kl: float | None, dry_run: bool, resume: bool
) -> None:
    check_max_kl(max_kl)
    if max_kl is not None and dry_run:
        raise UsageError("a dry run measures no loss: leave out either --max-kl or --dry-run")
    if resume and dry_run:
        raise UsageError(
            "a dry run keeps nothing to go on with: leave out either --resume or --dry-run "
            "(--statistics FILE keeps what is calibrated)"
        )
    if output is None and not dry_run:
        raise UsageError("give an output folder (--output DIR), or --dry-run to see the plan only")


def _texts(
    name: str | Path,
    calibration: Corpus | str | Path | None,
    evaluation: Corpus | str | Path | None,
    notes: Notes,
) -> tuple[Corpus, Corpus]:
    given = {"calibration": calibration, "evaluation": evaluation}
    learn, test = (read_text(purpose, text) for purpose, text in given.items())
    note = bundled_note(name, [purpose for purpose, text in given.items() if text is None])
    notes.extend([] if note is None else [note])
    return learn, test
