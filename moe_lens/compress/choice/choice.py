"""The best of all methods at one size, by what their plans lose on text that made none of them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from moe_lens.compress.plan.identity import CorpusIdentity
from moe_lens.compress.plan.plan import Plan
from moe_lens.compress.stages import PLANNING, trying
from moe_lens.compress.statistics.saliency import METHODS
from moe_lens.errors import DiskError, MoeLensError
from moe_lens.telling import StageProgress, begin

from .methods import Found, combined_candidates, single_candidates
from .readings import Readings
from .trials import Skipped, Trial, TrialBench, lead

AUTO = "auto"
FLOOR = "random"

DEFINITION = (
    "every plan is tried against the same parent on validation text, a part of the calibration "
    "text that made no plan: mean KL(parent || smaller) per token in nats, with the middle 95 % of "
    "1000 bootstrap samples of its prompts; the least is chosen"
)


@dataclass(frozen=True)
class Choice:
    """All trials of one size, the least loss first, and what was not tried."""

    trials: tuple[Trial, ...]
    skipped: tuple[Skipped, ...]
    validation: CorpusIdentity
    limit: int
    seed: int = 0

    @property
    def best(self) -> Trial:
        """The trial with the least loss."""
        return self.trials[0]

    @property
    def definition(self) -> str:
        """How the trials were compared."""
        return DEFINITION

    def text(self) -> str:
        """What was chosen and how sure that is, in one or two sentences."""
        best, kl = self.best, self.best.loss.kl
        text = (
            f"{best.name} is used: of {len({t.name for t in self.trials})} methods at "
            f"{self.limit / 1e6:.2f} MB or less it loses least on {best.loss.tokens:,} predicted "
            f"tokens of {best.loss.prompts} validation prompts, KL {kl}"
        )
        other = next((trial for trial in self.trials if trial.name != best.name), None)
        if other is None:
            return text
        ahead = lead(best, other, self.seed)
        sure = "" if ahead.low is None or ahead.low > 0 else "; that lead is within its error"
        floor = next((t.loss.kl for t in self.trials if t.name == FLOOR), None)
        return f"{text}; {other.name} follows with {other.loss.kl} ({ahead} more){sure}" + (
            "" if floor is None else f"; random removal has {floor}"
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON, without the plans."""
        return {
            "text": self.text(),
            "definition": DEFINITION,
            "limit_bytes": self.limit,
            "validation": self.validation.to_dict(),
            "trials": [trial.to_dict() for trial in self.trials],
            "skipped": [each.to_dict() for each in self.skipped],
        }

    def plan(self) -> Plan:
        """The plan of the best trial, with the table of all of them as evidence."""
        plan = self.best.plan
        return replace(plan, evidence={**plan.evidence, "choice": self.to_dict()})


def choose(
    readings: Readings,
    bench: TrialBench,
    validation: CorpusIdentity,
    limit: int,
    *,
    methods: Iterable[str] | None = None,
    experts_per_token: int | None = None,
    seed: int = 0,
    progress: StageProgress | None = None,
) -> Choice:
    """Try every method at one size.

    First each by itself; then the best way to remove experts together with narrower ones.

    Args:
        readings: Of the calibration text.
        bench: With the parent and the validation text.
        validation: What the validation text is.
        limit: Bytes of the weight files.
        methods: Only these (`methods.single_candidates` has their names); None for all.
        experts_per_token: Of the smaller model; None keeps it, and tries fewer for merges.
        seed: Of ``random``.
        progress: Called with the trial of each method, tokens done and in all, and with the layers
            of each plan.

    Raises:
        MoeLensError: No method can make so small a model; the message has all reasons.
    """
    trials: list[Trial] = []
    skipped: list[Skipped] = []
    settings: dict[str, Any] = {
        "experts_per_token": experts_per_token,
        "seed": seed,
        "progress": begin(progress, PLANNING),
    }

    def try_all(found: Iterator[Found]) -> None:
        for each in found:
            tried = try_one(bench, each, progress)
            if isinstance(tried, Skipped):
                skipped.append(tried)
            else:
                trials.extend(tried)
            begin(progress, PLANNING)  # of the next, while it is asked for

    table = bench.table
    try_all(single_candidates(readings, table, limit, methods=methods, **settings))
    removal = _best(trial for trial in trials if trial.name in METHODS and trial.name != FLOOR)
    if removal is not None and methods is None:
        try_all(combined_candidates(readings, table, limit, removal.name, **settings))
    if not trials:
        reasons = "; ".join(f"{each.name}: {each.reason}" for each in skipped)
        raise MoeLensError(f"no method can make a model of {limit / 1e6:.2f} MB: {reasons}")
    ranked = sorted(trials, key=lambda trial: (trial.loss.kl.value, trial.bytes))
    return Choice(tuple(ranked), tuple(skipped), validation, limit, seed)


def try_one(
    bench: TrialBench, found: Found, progress: StageProgress | None = None
) -> list[Trial] | Skipped:
    """The trials of a candidate, or why there are none."""
    if isinstance(found, Skipped):
        return found
    try:
        tried = bench.try_plan(
            found.name, found.plan, found.ks, begin(progress, trying(found.name))
        )
    except DiskError:
        raise
    except MoeLensError as error:
        return Skipped(found.name, str(error))
    finite = [trial for trial in tried if math.isfinite(trial.loss.kl.value)]
    return finite or Skipped(found.name, "the smaller model gives NaN or infinity")


def _best(trials: Iterable[Trial]) -> Trial | None:
    return min(trials, key=lambda trial: trial.loss.kl.value, default=None)
