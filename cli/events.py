"""With ``--json``: what a command tells while it runs, as one JSON object a line on stderr.

`docs/events.md` says what the objects hold. On a terminal there are bars in their place, since
nobody reads these there.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from . import screen

if TYPE_CHECKING:
    from moe_lens.telling import Stage
    from moe_lens.timing import Pace, Stopwatch

SECONDS_BETWEEN = 0.5
"""Between two steps of one stage; its last one always comes."""


class Events:
    """A `StageProgress` that writes events."""

    def __init__(self, watch: Stopwatch) -> None:
        self._watch = watch
        self._told: Pace | None = None

    def __call__(self, stage: Stage, done: int, total: int | None) -> None:
        before = self._watch.pace
        self._watch(stage, done, total)
        pace = self._watch.pace
        assert pace is not None
        if before is None or before.stage != stage:
            self.end_stage(before)
            screen.emit_event("stage", state="begin", **_names(stage))
            self._told = None
        if total is None:
            return
        told = self._told
        if (
            told is None
            or pace.seconds - told.seconds >= SECONDS_BETWEEN
            or (pace.finished and not told.finished)
        ):
            self._tell(pace)

    def _tell(self, pace: Pace) -> None:
        self._told = pace
        screen.emit_event(
            "progress",
            **_names(pace.stage),
            done=pace.done,
            total=pace.total,
            per_second=_rounded(pace.per_second),
            seconds_left=_rounded(pace.seconds_left),
            **_peak(),
        )

    def end_stage(self, pace: Pace | None) -> None:
        """Tell that a stage is over, and how far it came; None: there was none."""
        if pace is None:
            return
        if self._told is not None and self._told.done != pace.done:
            self._tell(pace)
        screen.emit_event(
            "stage",
            state="end",
            **_names(pace.stage),
            done=pace.done,
            total=pace.total,
            seconds=_rounded(pace.seconds),
        )

    def end(self, exit_code: int, message: str | None) -> None:
        """The last event of a command: done, or why not."""
        self.end_stage(self._watch.pace)
        what = {} if message is None else {"message": message}
        screen.emit_event(
            "done" if message is None else "error",
            **what,
            exit_code=exit_code,
            seconds=_rounded(self._watch.seconds),
            **_peak(),
        )


_events: Events | None = None


def reset() -> None:
    """Forget the events of a run before."""
    global _events
    _events = None


def begin() -> Events:
    """The events of the command that runs; `end` writes the last one."""
    global _events
    if _events is None:
        from moe_lens.timing import Stopwatch

        _events = Events(Stopwatch())
    return _events


def end(exit_code: int, message: str | None = None) -> None:
    """Write the last event, if there were others."""
    global _events
    if _events is not None:
        ended, _events = _events, None
        ended.end(exit_code, message)


def _names(stage: Stage) -> dict[str, Any]:
    return {"stage": stage.name, "of": stage.of, "unit": stage.unit}


def _rounded(number: float | None) -> float | None:
    return None if number is None else round(number, 3)


def _peak() -> dict[str, int | None]:
    from moe_lens.machine.process import usage

    found = usage()
    peaks = {"peak_memory_bytes": found.peak_memory}
    if found.peak_gpu_memory is not None:
        peaks["peak_gpu_memory_bytes"] = found.peak_gpu_memory
    return peaks
