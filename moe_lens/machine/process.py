"""What this process has used of the machine so far: memory at its peak, bytes read and written."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["Usage", "usage"]


@dataclass(frozen=True)
class Usage:
    """Bytes since the process began; None where the system does not say.

    Attributes:
        peak_memory: Most main memory that the process held at once.
        peak_gpu_memory: Most that MLX held at once where it computes on a GPU; where both share
            one memory, as on a Mac, it is the same memory in another light.
        read: Given to the process by the system, from files above all; a file that is read
            twice counts twice, wherever the system had it.
        written: Taken from the process by the system.
    """

    peak_memory: int | None
    peak_gpu_memory: int | None
    read: int | None
    written: int | None


_most = 0


def usage() -> Usage:
    """What has been used so far; takes about a twentieth of a millisecond."""
    global _most
    transfers = _lines(Path("/proc/self/io"))
    peak = _peak_memory()
    if peak is not None:
        # Linux adds up the pages of its cores now and then, so that its peak can fall a little.
        peak = _most = max(_most, peak)
    return Usage(
        peak_memory=peak,
        peak_gpu_memory=_peak_gpu_memory(),
        read=transfers.get("rchar"),
        written=transfers.get("wchar"),
    )


def _peak_memory() -> int | None:
    # What getrusage says on Linux begins with the peak of the parent process.
    kilobytes = _lines(Path("/proc/self/status")).get("VmHWM")
    if kilobytes is not None:
        return 1024 * kilobytes
    try:
        import resource
    except ImportError:  # not on Windows
        return None
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else 1024 * most


def _peak_gpu_memory() -> int | None:
    # Whoever has not imported MLX has no memory of it, and shall not wait for it.
    core: Any = sys.modules.get("mlx.core")
    if core is None or core.default_device() != core.gpu:
        return None
    return int(core.get_peak_memory())


def _lines(path: Path) -> dict[str, int]:
    """The whole numbers of a file of ``name: number`` lines; nothing where it is not there."""
    try:
        text = path.read_text(encoding="ascii", errors="replace")
    except OSError:
        return {}
    found = {}
    for line in text.splitlines():
        name, _, value = line.partition(":")
        number = value.split()[:1]
        if number and number[0].isdigit():
            found[name] = int(number[0])
    return found
