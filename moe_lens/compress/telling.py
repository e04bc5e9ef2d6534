"""What long work tells while it runs: how far it is, and notes."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[int, int], None]
"""(done, in all)"""

StageProgress = Callable[[str, int, int], None]
"""(what is done now, done, in all)"""

Say = Callable[[str], None]
"""Takes each note, a sentence, as it arises."""


def of_stage(progress: StageProgress | None, stage: str) -> Progress | None:
    """The progress of one stage; None where nobody asks."""
    if progress is None:
        return None
    return lambda done, total: progress(stage, done, total)
