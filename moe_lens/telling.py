"""What long work tells while it runs: which part of it, how far that is, and notes.

    def show(stage: Stage, done: int, total: int | None) -> None:
        print(stage, done, "of", total, stage.unit)

    compress("demo", ratio=0.25, output="demo-small", progress=show)

A function that does one part takes `Progress`, which counts and nothing else; what strings parts
together takes `StageProgress`, and hands each of them what `begin` gives.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Stage:
    """One part of long work.

    Attributes:
        name: What is done, as a person reads it: ``calibrating``.
        unit: What is counted, in the plural; None where the length of the part is never known.
        of: Which of several alike: the method that is tried.
    """

    name: str
    unit: str | None = None
    of: str | None = None

    def __str__(self) -> str:
        return self.name if self.of is None else f"{self.name} {self.of}"


LOADING = Stage("loading", "bytes")
"""A model on its way into memory."""

Progress = Callable[[int, int | None], None]
"""(done, in all)

None in all: that is not known, or not yet; and what is done by then was there before, so that no
speed is made of it. Only a run that goes on with another says so."""

StageProgress = Callable[[Stage, int, int | None], None]
"""(what is done now, done, in all)

Done and in all as in `Progress`. A stage lasts from its first call to the first call of another."""

Say = Callable[[str], None]
"""Takes each note, a sentence, as it arises."""


def begin(progress: StageProgress | None, stage: Stage) -> Progress | None:
    """Tell that a stage begins, and return its progress; None where nobody asks."""
    if progress is None:
        return None
    progress(stage, 0, None)
    return lambda done, total: progress(stage, done, total)
