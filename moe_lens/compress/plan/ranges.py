"""Ascending numbers as short text: ``0-3 7 9-12``."""

from __future__ import annotations

from collections.abc import Sequence


def write_ranges(numbers: Sequence[int]) -> str:
    """Runs of neighbours as ``first-last``, separated by spaces."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1][1:] = [number]
        else:
            runs.append([number])
    return " ".join("-".join(map(str, run)) for run in runs)


def read_ranges(text: str) -> tuple[int, ...]:
    """The numbers that `write_ranges` wrote, in the order of the text.

    Raises:
        ValueError: A part is no number and no range.
    """
    numbers: list[int] = []
    for part in text.split():
        first, dash, last = part.partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()):
            raise ValueError(f"{part!r} is no number and no range such as 0-3")
        start, stop = int(first), int(last or first)
        if stop < start or stop - start > 1 << 20:
            raise ValueError(f"{part!r} is no rising range")
        numbers += range(start, stop + 1)
    return tuple(numbers)
