"""Variants of the same work, run in turns and compared with the first of them."""

from __future__ import annotations

import gc
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import mlx.core as mx
from rich.progress import track


@dataclass(frozen=True)
class Measured:
    """The turns of one variant, in seconds: one entry for each repetition."""

    variant: str
    cpu: list[float]
    wall: list[float]


def in_turns(
    variants: Mapping[str, Callable[[], None]], repetitions: int, what: str
) -> list[Measured]:
    """Run every variant `repetitions` times in turns, after one turn that is not counted."""
    names = list(variants)
    found = {name: Measured(name, [], []) for name in names}
    for turn in track(range(repetitions + 1), description=what, transient=True):
        shift = turn % len(names)
        for name in names[shift:] + names[:shift]:
            gc.collect()
            wall_start, cpu_start = time.perf_counter(), time.process_time()
            variants[name]()
            cpu_time = time.process_time() - cpu_start
            wall_time = time.perf_counter() - wall_start
            if turn:
                found[name].cpu.append(cpu_time)
                found[name].wall.append(wall_time)
    return list(found.values())


def paired(variant: list[float], first: list[float]) -> float:
    """The median over the turns of variant / first."""
    return statistics.median(v / p for v, p in zip(variant, first, strict=True))


def where() -> dict[str, Any]:
    """What the figures were taken with, for the JSON."""
    return {
        "mlx": version("mlx"),
        "mlx_lm": version("mlx-lm"),
        "device": str(mx.default_device()),
        "machine": f"{platform.system()} {platform.machine()}",
    }
