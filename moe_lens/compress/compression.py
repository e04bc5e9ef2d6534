"""From a model to a smaller one on disk, in one call: calibrate, plan, write, verify."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from moe_lens.corpus import Corpus, read_corpus
from moe_lens.errors import UsageError
from moe_lens.loading import resolve

from .calibration import calibrate
from .card import write_card
from .checkpoint import write_checkpoint
from .experts_per_token import choose_experts_per_token
from .held_out import check_held_out
from .json_text import dump
from .parent import open_parent
from .plan import Plan
from .planning import plan_merge, plan_prune
from .saliency import METHODS
from .staging import check_output, staged
from .verification import Verification
from .verify import verify

StageProgress = Callable[[str, int, int], None]
"""(stage, done, in all); the stages are ``STAGES``, in this order."""

STAGES = ("calibrating", "choosing experts per token", "writing", "verifying")

Say = Callable[[str], None]

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
    method: str = "reap",
    output: str | Path | None = None,
    calibration: Corpus | str | Path | None = None,
    evaluation: Corpus | str | Path | None = None,
    sample_size: int | None = SAMPLE_SIZE,
    sequence_length: int | None = SEQUENCE_LENGTH,
    chat_template: bool = False,
    experts_per_token: int | None = None,
    dry_run: bool = False,
    force: bool = False,
    seed: int = 0,
    revision: str | None = None,
    trust_remote_code: bool = False,
    progress: StageProgress | None = None,
    say: Say | None = None,
) -> CompressionResult:
    """Make a smaller model of `name` that stock ``mlx_lm.load`` opens, and measure what it lost.

    Give `threshold` to merge similar experts, or `ratio` to remove the least salient ones.

    Args:
        name: A folder, a hub id, or ``demo``.
        threshold: Merge experts whose similarity reaches this, above 0 and at most 1
            (`similarity.SCALE` says what 0, 0.5 and 1 mean).
        ratio: Remove this share of the experts of each layer, between 0 and 1.
        method: With `ratio`: ``reap`` or ``frequency``.
        output: The folder to make; not needed for a dry run.
        calibration: Text to calibrate on; None for the bundled one.
        evaluation: Other text to measure the loss on; None for the bundled one.
        sample_size: Most prompts of either text, drawn with `seed`; None for all.
        sequence_length: Tokens after which a prompt is cut.
        chat_template: Render prompts through the tokenizer's chat template.
        experts_per_token: Of the smaller model. None keeps the parent's, except that a merge
            measures on calibration text whether fewer are better.
        dry_run: Stop after the plan; nothing is written.
        force: Replace a model that stands at `output`, once the new one is complete.
        seed: Of every random choice; the same seed gives the same model.
        revision: Of a hub id.
        trust_remote_code: Let the tokenizer run code that comes with the model.
        progress: Called with the stage, and how much of how much is done.
        say: Called with each note as it arises; all notes are in the result as well.

    Raises:
        UsageError: Arguments that cannot be met: neither or both of threshold and ratio, numbers
            out of range, an output that exists, one text for both purposes, too few experts left.
        NothingToMergeError: No expert would disappear at this threshold; the message shows the
            similarities found and which threshold would save how much. Nothing is written.
        UnsupportedModelError: A model that cannot be compressed, with the reason.
        MoeLensError: A full disk, an unreadable checkpoint.
    """
    from moe_lens.router import ExpertRouter

    _check(threshold, ratio, method, experts_per_token, output, dry_run)
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

    router = ExpertRouter.from_pretrained(source, trust_remote_code=trust_remote_code)
    router.name = str(name)
    notes.extend(router.notes)
    statistics = calibrate(
        router,
        learn,
        sequence_length=sequence_length,
        similarity=threshold is not None,
        chat_template=chat_template,
        seed=seed,
        progress=_stage(progress, STAGES[0]),
    )
    if threshold is not None:
        plan = plan_merge(statistics, threshold, experts_per_token=experts_per_token)
        if experts_per_token is None:
            plan = choose_experts_per_token(
                router,
                statistics,
                plan,
                learn.tokenize(router.tokenizer, sequence_length, chat_template),
                trust_remote_code=trust_remote_code,
                seed=seed,
                progress=_stage(progress, STAGES[1]),
            )
    else:
        assert ratio is not None
        plan = plan_prune(statistics, ratio, method, experts_per_token=experts_per_token)
    plan = _with_settings(plan, sample_size, chat_template)
    notes.extend(_unreached(statistics.unreached(), plan))
    if dry_run or folder is None:
        return CompressionResult(plan, None, None, tuple(notes.all))

    with staged(folder, force=force, say=notes.add) as partial:
        parent = open_parent(source, trust_remote_code=trust_remote_code)
        write_checkpoint(parent, plan, partial, progress=_stage(progress, STAGES[2]), say=notes.add)
        smaller = ExpertRouter.from_pretrained(partial, trust_remote_code=trust_remote_code)
        smaller.name = folder.name
        found = verify(
            router,
            smaller,
            test,
            sequence_length=sequence_length,
            chat_template=chat_template,
            seed=seed,
            progress=_stage(progress, STAGES[3]),
        )
        (partial / "verification.json").write_text(found.to_json(), encoding="utf-8")
        write_card(partial, parent, plan, found)
    return CompressionResult(plan, folder, found, tuple(notes.all))


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


def _check(
    threshold: float | None,
    ratio: float | None,
    method: str,
    experts_per_token: int | None,
    output: str | Path | None,
    dry_run: bool,
) -> None:
    if (threshold is None) == (ratio is None):
        raise UsageError(
            "give either a threshold (--threshold 0.8 merges similar experts) or a ratio "
            "(--ratio 0.25 removes a quarter of them)"
        )
    if threshold is not None and not 0.0 < threshold <= 1.0:
        raise UsageError(f"the threshold is {threshold:g}; it must be above 0 and at most 1")
    if ratio is not None and not 0.0 < ratio < 1.0:
        raise UsageError(f"the ratio is {ratio:g}; it must lie between 0 and 1")
    if method not in METHODS:
        raise UsageError(f"there is no method {method!r}; choose one of {', '.join(METHODS)}")
    if experts_per_token is not None and experts_per_token < 1:
        raise UsageError(f"the experts per token are {experts_per_token}; a token needs at least 1")
    if output is None and not dry_run:
        raise UsageError("give an output folder (--output DIR), or --dry-run to see the plan only")


def _texts(
    name: str | Path,
    calibration: Corpus | str | Path | None,
    evaluation: Corpus | str | Path | None,
    notes: _Notes,
) -> tuple[Corpus, Corpus]:
    learn = read_corpus("demo" if calibration is None else calibration)
    test = read_corpus("demo:evaluation" if evaluation is None else evaluation)
    bundled = [
        what
        for what, given in (("calibration", calibration), ("evaluation", evaluation))
        if given is None
    ]
    if bundled:
        note = f"{' and '.join(bundled)} on the text that comes with moe-lens"
        if str(name) != "demo":
            note += (
                "; it is small and may not resemble what your model is for: give your own with "
                "--data and --eval-data"
            )
        notes.add(note)
    return learn, test


def _unreached(experts: dict[int, tuple[int, ...]], plan: Plan) -> list[str]:
    if not experts:
        return []
    listed = ", ".join(
        f"layer {layer}: {' '.join(map(str, ids))}" for layer, ids in experts.items()
    )
    count = sum(map(len, experts.values()))
    what = (
        "their saliency is unknown and they were removed first"
        if plan.kind == "prune"
        else "nothing is known about their outputs when they are chosen"
    )
    return [
        f"{count} experts were chosen by no calibration token, so {what} ({listed}); more or more "
        "varied calibration text would tell"
    ]


def _with_settings(plan: Plan, sample_size: int | None, chat_template: bool) -> Plan:
    settings = {**plan.settings, "sample_size": sample_size, "chat_template": chat_template}
    return replace(plan, settings=settings)


def _stage(progress: StageProgress | None, stage: str) -> Callable[[int, int], None] | None:
    if progress is None:
        return None
    return lambda done, total: progress(stage, done, total)
