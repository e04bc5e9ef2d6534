"""Numbers as a person reads them, with units."""

from __future__ import annotations

from collections.abc import Sequence


def count(number: float) -> str:
    """A number of things: ``950``, ``12.3 k``, ``1.23 M``, ``30.5 B``."""
    return _scaled(number, ("", " k", " M", " B", " T"))


def size(number: float) -> str:
    """A number of bytes, in powers of 1000: ``4.12 MB``."""
    return _scaled(number, (" B", " kB", " MB", " GB", " TB"))


def _scaled(number: float, units: Sequence[str]) -> str:
    place = 0
    while abs(number) >= 999.5 and place < len(units) - 1:
        number /= 1000
        place += 1
    return (f"{number:.0f}" if place == 0 else f"{number:.3g}") + units[place]


def whole(number: int) -> str:
    """A whole number in full: ``12,345``."""
    return f"{number:,}"


def percent(share: float) -> str:
    """A share: ``12.3 %``, ``0.05 %``, ``100 %``."""
    return f"{share * 100:.3g} %"


def some(number: int, thing: str) -> str:
    """A number and its noun: ``1 token``, ``12,345 tokens``."""
    return f"{whole(number)} {thing}" + ("" if number == 1 else "s")


def ranges(numbers: Sequence[int]) -> str:
    """Ascending whole numbers with runs closed up: ``0, 2-5, 7``."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][-1] + 1:
            parts[-1].append(number)
        else:
            parts.append([number])
    return ", ".join(str(p[0]) if len(p) == 1 else f"{p[0]}-{p[-1]}" for p in parts)


def amount(number: float, unit: str) -> str:
    """So much of what a stage counts: ``4.12 MB``, ``12,345 tokens``, ``1 layer``, ``0.25 steps``.

    Units are plurals in s.
    """
    if unit == "bytes":
        return size(number)
    if number == 1:
        unit = unit.removesuffix("s")
    written = f"{number:,.0f}" if number >= 9.95 or number == int(number) else f"{number:.2g}"
    return f"{written} {unit}"


def duration(seconds: float) -> str:
    """A time: ``3.4 s``, ``42 s``, ``2 min 05 s``, ``3 h 12 min``."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole_seconds = round(seconds)
    if whole_seconds < 60:
        return f"{whole_seconds} s"
    minutes, rest = divmod(whole_seconds, 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    hours, rest = divmod(round(seconds / 60), 60)
    return f"{hours:,} h {rest:02d} min"
