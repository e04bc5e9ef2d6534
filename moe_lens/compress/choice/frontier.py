"""Loss against size: every method at several sizes, tried and not written."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from moe_lens.compress.calibration.calibration import identify_corpus
from moe_lens.compress.calibration.texts import bundled_note, read_text
from moe_lens.compress.calibration.validation_split import split
from moe_lens.compress.plan.identity import CorpusIdentity, public_name
from moe_lens.compress.plan.json_text import dump
from moe_lens.compress.tensors.parent import open_parent
from moe_lens.compress.tensors.size_table import SizeTable
from moe_lens.corpus import Corpus
from moe_lens.errors import MoeLensError, UsageError
from moe_lens.families import AUTO, LIST_NOTE, SEGMENTED, decide
from moe_lens.loading import resolve
from moe_lens.telling import LOADING, Say, Stage, StageProgress, begin

from .asked_size import AskedSize
from .choice import DEFINITION, Choice, choose
from .methods import check_method_names, possible_shapes
from .readings import read_all
from .trial_table import Row, choice_rows
from .trials import TrialBench

RATIOS = (0.125, 0.25, 0.5, 0.75)
"""Shares of the expert bytes that go, where nothing else is asked for."""


@dataclass(frozen=True)
class Frontier:
    """The choices at several sizes, smallest model last.

    `parent_bytes` are those of the weight files, `expert_bytes` the part of them that can go.
    """

    model: str
    calibration: CorpusIdentity
    validation: CorpusIdentity
    parent_bytes: int
    expert_bytes: int
    choices: tuple[Choice, ...]
    left_out: tuple[tuple[int, str], ...] = ()
    """Sizes in bytes at which nothing could be tried, and why."""
    notes: tuple[str, ...] = ()

    @property
    def definition(self) -> str:
        """What the numbers mean."""
        return DEFINITION

    def curves(self) -> dict[str, list[tuple[int, float, float | None, float | None]]]:
        """By method: (bytes, KL, low, high) of its best plan at every size, largest model first."""
        found: dict[str, dict[int, tuple[int, float, float | None, float | None]]] = {}
        for choice in self.choices:
            for trial in reversed(choice.trials):  # the best comes last, and stays
                kl = trial.loss.kl
                point = (trial.bytes, kl.value, kl.low, kl.high)
                found.setdefault(trial.name, {})[choice.limit] = point
        return {name: sorted(set(points.values()), reverse=True) for name, points in found.items()}

    def rows(self) -> tuple[Row, list[Row]]:
        """Column names, and a row for every method at every size."""
        names: Row = ("at most MB",)
        rows: list[Row] = []
        for choice in self.choices:
            columns, found = choice_rows(choice.to_dict())
            names = ("at most MB", *columns)
            rows += [(f"{choice.limit / 1e6:.2f}", *row) for row in found]
        return names, rows

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "model": self.model,
            "definition": DEFINITION,
            "calibration": self.calibration.to_dict(),
            "validation": self.validation.to_dict(),
            "parent_bytes": self.parent_bytes,
            "expert_bytes": self.expert_bytes,
            "sizes": [choice.to_dict() for choice in self.choices],
            "left_out": [{"limit_bytes": size, "reason": why} for size, why in self.left_out],
            "notes": list(self.notes),
        }

    def to_json(self) -> str:
        """Indented JSON."""
        return dump(self.to_dict())


def frontier(
    name: str | Path,
    *,
    ratios: Sequence[float] = RATIOS,
    methods: Iterable[str] | None = None,
    calibration: Corpus | str | Path | None = None,
    sample_size: int | None = 128,
    sequence_length: int | None = 512,
    chat_template: bool = False,
    experts_per_token: int | None = None,
    seed: int = 0,
    revision: str | None = None,
    trust_remote_code: bool = False,
    stream: bool | None = None,
    cpu_experts: str = AUTO,
    progress: StageProgress | None = None,
    say: Say | None = None,
) -> Frontier:
    """Try all methods at several sizes. Nothing is written.

    Args:
        name: A folder, a hub id, or ``demo``.
        ratios: Shares of the experts, or of as many bytes, that go; each between 0 and 1.
        methods: Only these; None for all.
        calibration: Text to calibrate on, a third of which compares; None for the bundled one.
        sample_size: Most prompts of it, drawn with `seed`; None for all.
        sequence_length: Tokens after which a prompt is cut.
        chat_template: Render prompts through the tokenizer's chat template.
        experts_per_token: Of the smaller models. None keeps the parent's, and tries fewer for
            merges.
        seed: Of every random choice.
        revision: Of a hub id.
        trust_remote_code: Let the model and its tokenizer run code that comes with them.
        stream: As in `compress`.
        cpu_experts: How experts are computed (`RoutedModel.cpu_experts`); ``auto``: by segment on
            MLX's CPU backend.
        progress: Called with a stage, and how much of how much of it is done.
        say: Called with each note as it arises.

    Raises:
        UsageError: A ratio that cannot be, an unknown method, too little text.
        UnsupportedModelError: A model that cannot be compressed, with the reason.
        MoeLensError: No size could be tried.
    """
    from moe_lens.router import ExpertRouter

    decide(cpu_experts)
    only = None if methods is None else tuple(methods)
    check_method_names(only)
    sizes = [AskedSize(ratio=ratio) for ratio in sorted(set(ratios))]
    if not sizes:
        raise UsageError("give at least one size (--ratio 0.25)")
    corpus = read_text("calibration", calibration)
    drawn = corpus if sample_size is None else corpus.sample(sample_size, seed)
    learn, held = split(drawn, seed)
    source = resolve(name, revision)
    loaded = begin(progress, LOADING)
    router = ExpertRouter.from_pretrained(
        source, trust_remote_code=trust_remote_code, stream=stream
    )
    router.name = str(name)
    if loaded is not None and not router.streamed:
        loaded(router.info.bytes, router.info.bytes)
    bundled = bundled_note(name, [] if calibration is not None else ["calibration"])
    notes = [*([] if bundled is None else [bundled]), *drawn.notes, *router.notes]
    if cpu_experts == SEGMENTED != decide(cpu_experts, router.layers):
        notes.append(LIST_NOTE)
    if say is not None:
        for note in notes:
            say(note)
    readings = read_all(
        router,
        learn,
        sequence_length=sequence_length,
        chat_template=chat_template,
        seed=seed,
        cpu_experts=cpu_experts,
        progress=progress,
    )
    table = SizeTable.of(open_parent(source, trust_remote_code=trust_remote_code))
    tokens = held.tokenize(router.tokenizer, sequence_length, chat_template)
    bench = TrialBench(readings.router, tokens, table, seed=seed)
    validation = identify_corpus(held, tokens, sequence_length, seed)
    model, shapes = readings.statistics.model, possible_shapes(readings, experts_per_token)
    choices: list[Choice] = []
    left_out: list[tuple[int, str]] = []
    for size in sizes:
        limit = 0
        try:
            limit = size.limit(table, model, shapes)
            found = choose(
                readings,
                bench,
                validation,
                limit,
                methods=only,
                experts_per_token=experts_per_token,
                seed=seed,
                progress=_sized(progress, limit),
            )
        except MoeLensError as error:
            left_out.append((limit, str(error)))
        else:
            choices.append(found)
    if not choices:
        raise MoeLensError(left_out[0][1])
    return Frontier(
        model=public_name(name),
        calibration=readings.statistics.corpus,
        validation=validation,
        parent_bytes=table.bytes(table.full),
        expert_bytes=table.bytes(table.full) - table.fixed,
        choices=tuple(choices),
        left_out=tuple(left_out),
        notes=tuple(notes),
    )


def _sized(progress: StageProgress | None, limit: int) -> StageProgress | None:
    if progress is None:
        return None

    def at_this_size(stage: Stage, done: int, total: int | None) -> None:
        if stage.of is not None:
            stage = replace(stage, of=f"{stage.of}, {limit / 1e6:.4g} MB")
        progress(stage, done, total)

    return at_this_size
