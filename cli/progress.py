"""How far a command is: bars where a person is watching, lines in a log, events for a program."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from moe_lens.telling import Stage, StageProgress

from . import events, screen
from .quantities import amount, duration, size

if TYPE_CHECKING:
    from moe_lens.timing import Pace, Stopwatch

SECONDS_BETWEEN_LINES = 30.0
"""Into a pipe; a job of ten hours writes at most 1200 lines."""


@contextmanager
def working(what: str) -> Iterator[None]:
    """A spinner with a few words, for work whose length is not known."""
    if not screen.err().is_terminal:
        yield
        return
    with screen.err().status(f"{what} ..."):
        yield


@contextmanager
def stages(first: Stage | None = None) -> Iterator[StageProgress]:
    """Show the stages of a long command; yields what is called with stage, done and total.

    A bar for each of them on a terminal, an event for each step with ``--json`` (see `events`),
    otherwise a line at the start of each stage and every `SECONDS_BETWEEN_LINES` seconds.

    Args:
        first: What is done until another stage is named.
    """
    if screen.json_events():
        show: StageProgress = events.begin()
    elif screen.err().is_terminal:
        from .bars import Bars

        with Bars() as show:
            if first is not None:
                show(first, 0, None)
            yield show
        return
    else:
        from moe_lens.timing import Stopwatch

        show = Lines(Stopwatch())
    if first is not None:
        show(first, 0, None)
    yield show


class Lines:
    """A `StageProgress` that writes lines of a log."""

    def __init__(self, watch: Stopwatch) -> None:
        self._watch = watch
        self._told = 0.0

    def __call__(self, stage: Stage, done: int, total: int | None) -> None:
        before = self._watch.pace
        self._watch(stage, done, total)
        pace = self._watch.pace
        assert pace is not None
        now = self._watch.seconds
        if before is None or before.stage != stage:
            screen.note(str(stage))
            self._told = now
        elif now - self._told >= SECONDS_BETWEEN_LINES and total is not None:
            screen.note(f"{stage}: {_so_far(pace)}")
            self._told = now


def _so_far(pace: Pace) -> str:
    """``12,288 of 65,536 tokens, 410 tokens/s, 2 min 10 s left, peak memory 1.2 GB``."""
    from moe_lens.machine.process import usage

    unit = pace.stage.unit or ""
    assert pace.total is not None
    done = size(pace.done) if unit == "bytes" else f"{pace.done:,}"
    parts = [f"{done} of {amount(pace.total, unit)}"]
    if pace.per_second is not None:
        parts.append(f"{amount(pace.per_second, unit)}/s")
    if pace.seconds_left is not None:
        parts.append(f"{duration(pace.seconds_left)} left")
    most = usage().peak_memory
    if most is not None:
        parts.append(f"peak memory {size(most)}")
    return ", ".join(parts)
