"""The stages of one compression, from a loaded model on: plan, write, verify, report."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import mlx.core as mx

from moe_lens.corpus import Corpus
from moe_lens.telling import begin
from moe_lens.timing import Stopwatch

from .calibration.held_out import remember_text
from .checkpoint.checkpoint import write_checkpoint
from .checkpoint.in_memory import in_memory
from .checkpoint.model_file import forget_compiled
from .checkpoint.same_parameters import check_same_parameters
from .choice.asked import Asked
from .notes import Notes
from .plan.plan import Plan
from .plan.plan_json import read_plan
from .plan_stage import PlanStage, Reading
from .report.commands import Commands
from .report.report_file import write_report
from .resuming.work_folder import WorkFolder
from .stages import COMPARING, REPORTING, VERIFYING, WRITING
from .tensors.parent import Parent, open_parent
from .verification.stock_load import Live
from .verification.verification import LossTooLargeError, Verification
from .verification.verify import verify

if TYPE_CHECKING:
    from moe_lens.router import ExpertRouter


@dataclass(frozen=True)
class Making:
    """One compression under way.

    Attributes:
        router: The parent.
        source: Its folder.
        asked: What was asked for, checked.
        reading: How texts are read and experts computed.
        sample_size: Most prompts of a text.
        stream: As in `compress`.
        format: Of the smaller model.
        clock: Told of all progress.
        notes: Sentences for the user.
        unchanged: Raises MoeLensError if the parent's files have changed.
    """

    router: ExpertRouter
    source: Path
    asked: Asked
    reading: Reading
    sample_size: int | None
    stream: bool | None
    format: str
    clock: Stopwatch
    notes: Notes
    unchanged: Callable[[], None]

    def plan(self, text: Corpus, work: WorkFolder | None) -> Plan:
        """The plan, by the calibration text; the one that an earlier run finished, if there is."""
        reading = self.reading
        known = None if work is None else work.plan
        if work is not None and known is not None:
            self.notes.extend(work.notes)
            return read_plan(known)
        stage = PlanStage(
            self.router,
            self.asked,
            text,
            reading,
            work,
            format=self.format,
            progress=self.clock,
            say=self.notes.add,
        )
        made = stage.plan()
        if self.asked.plan is None:
            said = {
                "sample_size": self.sample_size,
                "chat_template": reading.chat_template,
                "cpu_experts": reading.cpu_experts,
            }
            made = replace(made, settings={**made.settings, **said})
            made = remember_text(made, text)
        self.unchanged()
        if work is not None:
            work.keep_plan(made.to_json(), self.notes.all)
        return made

    def model(
        self, made: Plan, text: Corpus, work: WorkFolder, again: Commands, max_kl: float | None
    ) -> Verification:
        """The smaller model in the work folder, measured on the held-out text.

        Raises:
            LossTooLargeError: It lost more than `max_kl`.
        """
        reading, clock = self.reading, self.clock
        parent = open_parent(self.source, trust_remote_code=reading.trust_remote_code)
        write_checkpoint(
            parent,
            made,
            work.model,
            format=self.format,
            whole=work.shards,
            progress=begin(clock, WRITING),
            say=self.notes.add,
        )
        if self.format == "hf":
            check_same_parameters(work.model, self.source, made, begin(clock, COMPARING))
        found = verify(
            self.router,
            work.model,
            text,
            name=work.output.name,
            live=_live(self.router, parent, made, reading.trust_remote_code),
            trust_remote_code=reading.trust_remote_code,
            trust_model_file=made.per_layer,
            stream=self.stream,
            cpu_experts=reading.cpu_experts,
            sequence_length=reading.sequence_length,
            chat_template=reading.chat_template,
            seed=reading.seed,
            progress=begin(clock, VERIFYING),
        )
        self.unchanged()
        forget_compiled(work.model)
        _check_loss(found, max_kl, work.output)
        begin(clock, REPORTING)
        write_report(
            work.model,
            parent,
            made,
            again,
            found,
            self.notes.all,
            clock.timing(),
            work.request.sha256,
            layout=self.format,
        )
        return found


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
