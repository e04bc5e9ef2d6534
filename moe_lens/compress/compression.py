"""From a model to a smaller one on disk, in one call: calibrate, plan, write, verify."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlx.core as mx

from moe_lens.corpus import Corpus
from moe_lens.errors import UsageError
from moe_lens.loading import resolve

from .calibration.held_out import check_held_out, remember_text
from .calibration.texts import bundled_note, read_text
from .checkpoint.checkpoint import write_checkpoint
from .checkpoint.in_memory import in_memory
from .checkpoint.model_file import forget_compiled
from .checkpoint.staging import check_output, staged
from .choice.asked import Asked
from .merging.merging import Merging
from .plan.json_text import dump
from .plan.plan import Plan
from .plan_stage import PlanStage, Reading
from .report.commands import Texts, commands
from .report.report_file import write_report
from .telling import Say, StageProgress, of_stage
from .tensors.parent import Parent, open_parent
from .verification.stock_load import Live
from .verification.verification import LossTooLargeError, Verification, check_max_kl
from .verification.verify import verify

if TYPE_CHECKING:
    from moe_lens.router import ExpertRouter

STAGES = (
    "calibrating",
    "calibrating channels",
    "sampling layers",
    "measuring layers",
    "choosing experts per token",
    "repairing the router",
    "writing",
    "verifying",
)
"""What the progress of `compress` names, in this order, and ``trying ...`` for each method that is
tried."""

SAMPLE_SIZE = 128
SEQUENCE_LENGTH = 512


@dataclass(frozen=True)
class CompressionResult:
    """What `compress` did.

    `output` and `verification` are None after a dry run. `notes` are sentences a user should see:
    which text was used, experts that no token reached, how the model was made to run here.
    """

    plan: Plan
    output: Path | None
    verification: Verification | None
    notes: tuple[str, ...] = ()

    @property
    def definition(self) -> str:
        """What the numbers in plan and verification mean."""
        parts = [self.plan.definition]
        if self.verification is not None:
            parts.append(self.verification.definition)
        return "; ".join(parts)

    @property
    def warnings(self) -> tuple[str, ...]:
        """The warnings of the verification."""
        return () if self.verification is None else self.verification.warnings

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "output": None if self.output is None else str(self.output),
            "plan": self.plan.to_dict(),
            "verification": None if self.verification is None else self.verification.to_dict(),
            "notes": list(self.notes),
            "warnings": list(self.warnings),
        }

    def to_json(self) -> str:
        """Indented JSON."""
        return dump(self.to_dict())

    def _repr_html_(self) -> str:
        parts = [self.plan._repr_html_()]
        if self.verification is not None:
            parts.append(self.verification._repr_html_())
        return "".join(parts)


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
    dry_run: bool = False,
    force: bool = False,
    seed: int = 0,
    revision: str | None = None,
    trust_remote_code: bool = False,
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
        dry_run: Stop after the plan; nothing is written.
        force: Replace a model that stands at `output`, once the new one is complete.
        seed: Of every random choice; the same seed gives the same model.
        revision: Of a hub id.
        trust_remote_code: Let the tokenizer run code that comes with the model.
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
    _check_result(output, max_kl, dry_run)
    source = resolve(name, revision)
    folder = None if output is None else Path(output).expanduser().absolute()
    if folder is not None and not dry_run:
        check_output(folder, source, force=force)
    notes = _Notes(say)
    learn, test = _texts(name, calibration, evaluation, notes)
    if sample_size is not None:
        learn, test = learn.sample(sample_size, seed), test.sample(sample_size, seed)
    notes.extend([*learn.notes, *test.notes])
    check_held_out(learn, test)
    asked.check_text(learn)

    router = ExpertRouter.from_pretrained(source, trust_remote_code=trust_remote_code)
    router.name = str(name)
    notes.extend(router.notes)
    reading = Reading(sequence_length, chat_template, seed, trust_remote_code)
    stage = PlanStage(router, asked, learn, reading, progress=progress, say=notes.add)
    made = stage.plan()
    if asked.plan is None:
        made = remember_text(_with_settings(made, sample_size, chat_template), learn)
    del stage
    if dry_run or folder is None:
        return CompressionResult(made, None, None, tuple(notes.all))

    texts = Texts(calibration, evaluation, sample_size, sequence_length, chat_template, seed)
    again = commands(
        made,
        folder.name,
        asked if revision is None else None,  # the command line reads the newest only
        texts,
        _DEFAULTS,
        trust_remote_code=trust_remote_code,
    )
    with staged(folder, force=force, say=notes.add) as partial:
        parent = open_parent(source, trust_remote_code=trust_remote_code)
        write_checkpoint(
            parent, made, partial, progress=of_stage(progress, "writing"), say=notes.add
        )
        found = verify(
            router,
            partial,
            test,
            name=folder.name,
            live=_live(router, parent, made, trust_remote_code),
            trust_remote_code=trust_remote_code,
            trust_model_file=made.per_layer,
            sequence_length=sequence_length,
            chat_template=chat_template,
            seed=seed,
            progress=of_stage(progress, "verifying"),
        )
        forget_compiled(partial)
        _check_loss(found, max_kl, folder)
        write_report(partial, parent, made, again, found, notes.all)
    return CompressionResult(made, folder, found, tuple(notes.all))


_DEFAULTS = {
    name: parameter.default for name, parameter in inspect.signature(compress).parameters.items()
}


def _check_loss(found: Verification, max_kl: float | None, folder: Path) -> None:
    try:
        found.check(max_kl)
    except LossTooLargeError as error:
        raise LossTooLargeError(
            f"{error}; nothing was written to {folder}: remove less, calibrate on text like "
            "yours, or leave --max-kl out to keep such a model",
            found,
        ) from None


def _live(router: ExpertRouter, parent: Parent, plan: Plan, trust_remote_code: bool) -> Live | None:
    """The plan applied in memory; None where the model brings code that only a folder can run."""
    if parent.config.get("model_file"):
        return None

    def logits(tokens: Sequence[int]) -> mx.array:
        smaller = in_memory(router, plan, trust_remote_code=trust_remote_code)
        return smaller.forward([tokens])

    return logits


class _Notes:
    """Sentences for the user, said at once and kept."""

    def __init__(self, say: Say | None) -> None:
        self.all: list[str] = []
        self._say = say

    def add(self, note: str) -> None:
        if note in self.all:
            return
        self.all.append(note)
        if self._say is not None:
            self._say(note)

    def extend(self, notes: list[str]) -> None:
        for note in notes:
            self.add(note)


def _check_result(output: str | Path | None, max_kl: float | None, dry_run: bool) -> None:
    check_max_kl(max_kl)
    if max_kl is not None and dry_run:
        raise UsageError("a dry run measures no loss: leave out either --max-kl or --dry-run")
    if output is None and not dry_run:
        raise UsageError("give an output folder (--output DIR), or --dry-run to see the plan only")


def _texts(
    name: str | Path,
    calibration: Corpus | str | Path | None,
    evaluation: Corpus | str | Path | None,
    notes: _Notes,
) -> tuple[Corpus, Corpus]:
    given = {"calibration": calibration, "evaluation": evaluation}
    learn, test = (read_text(purpose, text) for purpose, text in given.items())
    note = bundled_note(name, [purpose for purpose, text in given.items() if text is None])
    notes.extend([] if note is None else [note])
    return learn, test


def _with_settings(plan: Plan, sample_size: int | None, chat_template: bool) -> Plan:
    settings = {**plan.settings, "sample_size": sample_size, "chat_template": chat_template}
    return replace(plan, settings=settings)
