"""Whether a smaller model may and can be written where it was asked for; asked before any work."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from moe_lens.errors import DiskError, UsageError

_MARGIN = 64 << 20


def check_output(output: Path, source: Path, *, force: bool) -> None:
    """Refuse an output folder that exists (without `force`) or that touches the source.

    With `force`, only a folder that is empty or holds a model may be replaced: a slip such as
    ``--output ~`` must not cost a home directory.

    Raises:
        UsageError: With the remedy.
    """
    place, origin = output.resolve(), source.resolve()
    if place == origin or origin in place.parents or place in origin.parents:
        raise UsageError(
            f"{output} is the model that is read, or inside it, or around it; give another folder"
        )
    if not output.exists() and not output.is_symlink():
        _check_parent(output)
        return
    if not output.is_dir() or output.is_symlink():
        raise UsageError(f"{output} is no plain folder; give another --output")
    if not force:
        raise exists(output)
    if any(output.iterdir()) and not (output / "config.json").is_file():
        raise UsageError(
            f"{output} holds something that is no model (no config.json), so --force does not "
            "replace it; give another --output"
        )


def exists(output: Path) -> UsageError:
    """What is said of an output that is there, where it was not asked to replace it."""
    return UsageError(
        f"{output} exists; give another --output, or --force to replace it when the new model "
        "is complete"
    )


def _check_parent(output: Path) -> None:
    """Find out before hours of calibration that `output` cannot be made."""
    place = next(parent for parent in output.parents if parent.exists())
    if not place.is_dir():
        raise UsageError(f"{place} is a file, so {output} cannot be made; give another --output")
    if not os.access(place, os.W_OK | os.X_OK):
        raise UsageError(f"you may not write in {place}; give another --output")


def check_space(output: Path, needed: int) -> None:
    """Raise DiskError unless the disk of `output` has room for `needed` bytes and a margin."""
    place = output.parent
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if free < needed + _MARGIN:
        raise DiskError(
            f"the smaller model takes {needed / 1e9:.2f} GB, but {place} has {free / 1e9:.2f} GB "
            "free; make room or give another --output"
        )
