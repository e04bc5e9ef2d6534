"""Where the time of a long command went, on the screen."""

from __future__ import annotations

from typing import TYPE_CHECKING

from . import screen
from .quantities import amount, duration, size

if TYPE_CHECKING:
    from moe_lens.timing import StageTime, Timing


def show_timing(found: Timing) -> None:
    """Print a row for each stage, and below them what the whole took."""
    screen.heading("Time")
    names = ("stage", "done", "time", "speed")
    rows = [_row(each) for each in found.stages]
    rows.append(("all", "", duration(found.seconds), ""))
    screen.show(screen.table(names, rows, right=names[1:]))
    used = {
        "peak memory": found.peak_memory,
        "peak GPU memory": found.peak_gpu_memory,
        "read": found.read,
        "written": found.written,
    }
    known = [f"{what} {size(number)}" for what, number in used.items() if number is not None]
    if known:
        line = ", ".join(known)
        screen.show("", line[0].upper() + line[1:])


def _row(each: StageTime) -> tuple[str, str, str, str]:
    if each.per_second is None or each.unit is None:
        return each.name, "", duration(each.seconds), ""
    speed = amount(each.per_second, each.unit)
    return each.name, amount(each.done, each.unit), duration(each.seconds), f"{speed}/s"
