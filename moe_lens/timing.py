"""How long each part of long work took, how fast it goes now, and what the whole has used."""

from __future__ import annotations

import json
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from moe_lens.machine.process import Usage, usage
from moe_lens.telling import Stage, StageProgress

__all__ = ["Pace", "StageTime", "Stopwatch", "Timing"]

WINDOW = 20.0
"""Seconds that the present speed is a mean of: long enough for several batches, and short enough to
follow a machine that others use as well."""

_NEAR = 0.05
"""Seconds within which two reports are one point of the window, so that it holds few."""


@dataclass(frozen=True)
class Pace:
    """How far a stage is, and how fast it goes.

    Attributes:
        stage: Which.
        done: In units of the stage; an earlier run's part included.
        total: In all; None where that is not known.
        seconds: Since the stage began.
        per_second: Units per second over the last `WINDOW` seconds; None until there are two
            reports to compare.
        seconds_left: At this speed; None where `total` or the speed is not known.
    """

    stage: Stage
    done: int
    total: int | None
    seconds: float
    per_second: float | None
    seconds_left: float | None

    @property
    def finished(self) -> bool:
        """Whether all is done."""
        return self.total is not None and self.done >= self.total


@dataclass(frozen=True)
class StageTime:
    """What one kind of stage took, all its turns together.

    Attributes:
        name: Of the stage; trials of several methods are one.
        unit: What was counted.
        done: How many of them, in this run.
        seconds: In all.
    """

    name: str
    unit: str | None
    done: int
    seconds: float

    @property
    def per_second(self) -> float | None:
        """Units per second; None where nothing was counted."""
        return self.done / self.seconds if self.done and self.seconds else None

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "stage": self.name,
            "unit": self.unit,
            "done": self.done,
            "seconds": round(self.seconds, 3),
            "per_second": None if self.per_second is None else round(self.per_second, 3),
        }


@dataclass(frozen=True)
class Timing:
    """Where the time of one run went, and what it used.

    Attributes:
        stages: In the order in which they first began.
        seconds: From the beginning to now, between stages included.
        peak_memory: Of the process since it began, in bytes; None where the system does not say,
            as with the others.
        peak_gpu_memory: Of MLX on a GPU.
        read: Bytes that the process read in this time, from files above all.
        written: Bytes that it wrote.
    """

    stages: tuple[StageTime, ...]
    seconds: float
    peak_memory: int | None
    peak_gpu_memory: int | None
    read: int | None
    written: int | None

    @property
    def definition(self) -> str:
        """What the numbers mean."""
        return (
            "wall-clock seconds of each stage and of all; peak memory of the process since it "
            "began; bytes that the system gave to the process and took from it in this time, "
            "files that were read twice counted twice"
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "definition": self.definition,
            "seconds": round(self.seconds, 3),
            "stages": [each.to_dict() for each in self.stages],
            "peak_memory_bytes": self.peak_memory,
            "peak_gpu_memory_bytes": self.peak_gpu_memory,
            "bytes_read": self.read,
            "bytes_written": self.written,
        }

    def to_json(self) -> str:
        """Indented JSON."""
        return json.dumps(self.to_dict(), indent=2)


class Stopwatch:
    """Takes the time of all stages; a `StageProgress` that hands on what it is told.

    Args:
        progress: Told everything as well.
        clock: Seconds, from any beginning.
    """

    def __init__(
        self, progress: StageProgress | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._progress, self._clock = progress, clock
        self._start, self._used = clock(), usage()
        self._over: dict[str, StageTime] = {}
        self._running: _Running | None = None

    def __call__(self, stage: Stage, done: int, total: int | None) -> None:
        """Count; the first call with another stage ends the one before."""
        now = self._clock()
        if self._running is None or self._running.stage != stage:
            self._end(now)
            self._running = _Running(stage, now, done)
        self._running.move(now, done, total)
        if self._progress is not None:
            self._progress(stage, done, total)

    @property
    def pace(self) -> Pace | None:
        """Of the stage that runs; None before the first."""
        return None if self._running is None else self._running.pace(self._clock())

    @property
    def seconds(self) -> float:
        """Since the beginning."""
        return self._clock() - self._start

    def timing(self) -> Timing:
        """Up to now, the stage that runs included."""
        now, used = self._clock(), usage()
        stages = dict(self._over)
        if self._running is not None:
            self._running.add_to(stages, now)
        return Timing(
            stages=tuple(stages.values()),
            seconds=now - self._start,
            peak_memory=used.peak_memory,
            peak_gpu_memory=used.peak_gpu_memory,
            read=_since(self._used, used, "read"),
            written=_since(self._used, used, "written"),
        )

    def _end(self, now: float) -> None:
        if self._running is not None:
            self._running.add_to(self._over, now)


class _Running:
    """The stage that runs: its beginning, and the points of the window."""

    def __init__(self, stage: Stage, now: float, done: int) -> None:
        self.stage = stage
        self._start, self._first = now, done
        self._counted = 0
        self._total: int | None = None
        self._points = deque([(now, done)])

    def move(self, now: float, done: int, total: int | None) -> None:
        self._total = total
        if total is None:  # it was there before
            self._counted = self.counted
            self._first = done
            self._points = deque([(now, done)])
            return
        points = self._points
        if len(points) > 1 and now - points[-1][0] < _NEAR:
            points.pop()
        points.append((now, done))
        while points[1][0] <= now - WINDOW:
            points.popleft()

    def pace(self, now: float) -> Pace:
        (before, few), (last, done) = self._points[0], self._points[-1]
        speed = (done - few) / (last - before) if done > few and last > before else None
        left = None
        if self._total is not None and speed is not None:
            # What was done since the last report is not known, but its time has passed.
            left = max(0.0, (self._total - done) / speed - (now - last))
        return Pace(self.stage, done, self._total, now - self._start, speed, left)

    @property
    def counted(self) -> int:
        """What this run has done."""
        return self._counted + self._points[-1][1] - self._first

    def add_to(self, stages: dict[str, StageTime], now: float) -> None:
        name = self.stage.name
        known = stages.get(name, StageTime(name, self.stage.unit, 0, 0.0))
        stages[name] = replace(
            known,
            done=known.done + self.counted,
            seconds=known.seconds + now - self._start,
        )


def _since(before: Usage, now: Usage, what: str) -> int | None:
    first, last = getattr(before, what), getattr(now, what)
    return None if first is None or last is None else last - first
