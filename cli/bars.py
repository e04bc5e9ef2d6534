"""Progress on a terminal: a bar for each stage of a long command, and what the whole has taken."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from rich.progress import BarColumn, Progress, ProgressColumn, Task, TaskID
from rich.table import Column
from rich.text import Text

from moe_lens.machine.process import usage
from moe_lens.timing import Pace, Stopwatch

from . import screen
from .quantities import amount, duration, size

if TYPE_CHECKING:
    from rich.console import RenderableType

    from moe_lens.telling import Stage

_MOST_BARS = 8
"""Stages that are shown at once; older ones are over, and give way."""


class Bars:
    """A `StageProgress` that draws while its block lasts, and leaves nothing behind."""

    def __init__(self) -> None:
        self._watch = Stopwatch()
        self._shown = _Shown(
            self._watch,
            _Words(lambda task, pace: task.description),
            BarColumn(bar_width=None, table_column=Column(ratio=1, min_width=5)),
            _Words(_done),
            _Words(_speed),
            _Words(_time),
            console=screen.err(),
            transient=True,
            expand=True,
        )
        self._tasks: dict[str, TaskID] = {}

    def __enter__(self) -> Bars:
        self._shown.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._shown.stop()

    def __call__(self, stage: Stage, done: int, total: int | None) -> None:
        before = self._watch.pace
        self._watch(stage, done, total)
        if before is not None and before.stage != stage:
            self._end(before)
            if str(stage) in self._tasks:  # it was over, and takes another turn
                self._shown.remove_task(self._tasks.pop(str(stage)))
        name = str(stage)
        if name not in self._tasks:
            self._tasks[name] = self._shown.add_task(name, total=None, pace=None)
            if len(self._tasks) > _MOST_BARS:
                old = list(self._tasks.values())[-1 - _MOST_BARS]
                self._shown.update(old, visible=False)
        pace = self._watch.pace
        self._shown.update(self._tasks[name], completed=done, total=total, pace=pace)

    def _end(self, pace: Pace) -> None:
        # Some stages are over sooner than was thought, and some never knew their length.
        length = pace.total or 1
        task = self._tasks[str(pace.stage)]
        self._shown.update(task, total=length, completed=length, pace=pace)


class _Shown(Progress):
    """The bars, and below them one line about the whole."""

    def __init__(self, watch: Stopwatch, *columns: ProgressColumn, **options: object) -> None:
        self._watch = watch
        super().__init__(*columns, **options)  # type: ignore[arg-type]

    def get_renderables(self) -> Iterable[RenderableType]:
        yield from super().get_renderables()
        words = duration(self._watch.seconds)
        most = usage().peak_memory
        if most is not None:
            words += f", peak memory {size(most)}"
        yield Text(words, style="dim")


class _Words(ProgressColumn):
    """A cell of text, from the task and how fast its stage goes."""

    def __init__(self, say: Callable[[Task, Pace | None], str]) -> None:
        super().__init__(Column(no_wrap=True))
        self._say = say

    def render(self, task: Task) -> Text:
        return Text(self._say(task, task.fields["pace"]))


def _done(task: Task, pace: Pace | None) -> str:
    """``12,288/65,536 tokens``, ``1.2 GB of 3.4 GB``; nothing before anything is counted."""
    if pace is None or pace.total is None or pace.stage.unit is None:
        return ""
    if task.finished:
        return amount(pace.done, pace.stage.unit)
    if pace.stage.unit == "bytes":
        return f"{size(pace.done)} of {size(pace.total)}"
    return f"{pace.done:,}/{pace.total:,} {pace.stage.unit}"


def _speed(task: Task, pace: Pace | None) -> str:
    """``410/s``, ``1.2 GB/s``: what is counted stands beside it."""
    if task.finished or pace is None or pace.per_second is None or pace.stage.unit is None:
        return ""
    speed = amount(pace.per_second, pace.stage.unit)
    return (speed if pace.stage.unit == "bytes" else speed.partition(" ")[0]) + "/s"


def _time(task: Task, pace: Pace | None) -> str:
    """What is left, where that is known; otherwise what it has taken."""
    if pace is None:
        return ""
    if task.finished:
        return duration(pace.seconds)
    if pace.seconds_left is not None:
        return f"{duration(pace.seconds_left)} left"
    return duration(task.elapsed or 0.0)
