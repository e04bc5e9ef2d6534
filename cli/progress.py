"""Progress on stderr, where a person is watching; nothing at all into a pipe."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from . import screen

Progress = Callable[[int, int], None]
"""Called with how much is done and how much there is."""

_MOST_BARS = 8
"""Stages that are shown at once; older ones are over, and give way."""


@contextmanager
def working(what: str) -> Iterator[None]:
    """A spinner with a few words, for work whose length is not known."""
    if not screen.err().is_terminal:
        yield
        return
    with screen.err().status(f"{what} ..."):
        yield


@contextmanager
def bar(what: str, unit: str = "tokens") -> Iterator[Progress]:
    """A bar with the time left; yields what the library calls to move it."""
    if not screen.err().is_terminal:
        yield lambda done, total: None
        return
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn(f"{{task.completed:,.0f}}/{{task.total:,.0f}} {unit}"),
        TimeRemainingColumn(compact=True),
        TextColumn("left"),
    )
    with Progress(*columns, console=screen.err(), transient=True) as shown:
        task = shown.add_task(what, total=1)
        yield lambda done, total: shown.update(task, completed=done, total=total)


@contextmanager
def stages() -> Iterator[Callable[[str, int, int], None]]:
    """A bar for each stage of a long command; yields what is called with stage, done and total.

    Into a pipe, where nothing moves, each stage is said once: it may be minutes.
    """
    if not screen.err().is_terminal:
        yield lambda stage, done, total: screen.note(stage)
        return
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=screen.err(), transient=True) as shown:
        tasks = {"loading": shown.add_task("loading", total=None)}

        def report(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                shown.update(tasks[list(tasks)[-1]], total=1, completed=1)
                tasks[stage] = shown.add_task(stage)
                if len(tasks) > _MOST_BARS:
                    shown.update(tasks[list(tasks)[-1 - _MOST_BARS]], visible=False)
            shown.update(tasks[stage], completed=done, total=total)

        yield report
