"""A folder that appears whole or not at all."""

from __future__ import annotations

import glob
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from moe_lens.compress.telling import Say
from moe_lens.errors import MoeLensError, UsageError

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
        raise UsageError(
            f"{output} exists; give another --output, or --force to replace it when the new model "
            "is complete"
        )
    if any(output.iterdir()) and not (output / "config.json").is_file():
        raise UsageError(
            f"{output} holds something that is no model (no config.json), so --force does not "
            "replace it; give another --output"
        )


def _check_parent(output: Path) -> None:
    """Find out before hours of calibration that `output` cannot be made."""
    place = next(parent for parent in output.parents if parent.exists())
    if not place.is_dir():
        raise UsageError(f"{place} is a file, so {output} cannot be made; give another --output")
    if not os.access(place, os.W_OK | os.X_OK):
        raise UsageError(f"you may not write in {place}; give another --output")


def check_space(output: Path, needed: int) -> None:
    """Raise MoeLensError unless the disk of `output` has room for `needed` bytes and a margin."""
    place = output.parent
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if free < needed + _MARGIN:
        raise MoeLensError(
            f"the smaller model takes {needed / 1e9:.2f} GB, but {place} has {free / 1e9:.2f} GB "
            "free; make room or give another --output"
        )


@contextmanager
def staged(output: Path, *, force: bool = False, say: Say | None = None) -> Iterator[Path]:
    """Yield ``.<name>.partial-<pid>`` beside `output`; it takes the name when the block succeeds.

    On any failure, Ctrl-C included, the partial folder is removed and what stood at `output`
    stays. With `force` the old folder is moved aside just before and deleted just after. Partial
    folders of the same output whose process is gone (it was killed) are removed first.

    Raises:
        UsageError: `output` exists and `force` is off.
        MoeLensError: The disk refuses (full, read-only, no permission).
    """
    if output.exists() and not force:
        raise UsageError(f"{output} exists; give another folder, or force to replace it")
    partial = output.with_name(f".{output.name}.partial-{os.getpid()}")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        _remove_stale(output, say)
        partial.mkdir()
        yield partial
        _sync(partial)
        _take_name(partial, output)
    except OSError as error:
        raise MoeLensError(
            f"{output} could not be written ({error.strerror or error}); nothing is left there; "
            "make room or give another --output"
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _take_name(partial: Path, output: Path) -> None:
    if not output.exists():
        partial.rename(output)
        return
    old = output.with_name(f".{output.name}.old-{os.getpid()}")
    output.rename(old)
    try:
        partial.rename(output)
    except BaseException:
        old.rename(output)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _sync(folder: Path) -> None:
    """Bring every file to the disk before the name says that it is complete."""
    for file in folder.iterdir():
        if file.is_file():
            with file.open("rb") as content:
                os.fsync(content.fileno())


def _remove_stale(output: Path, say: Say | None) -> None:
    """Clear up after runs that were killed; an old model that lost its name gets it back."""
    for folder in _left_behind(output, "old"):
        if output.exists():
            shutil.rmtree(folder, ignore_errors=True)
        else:
            folder.rename(output)
            raise MoeLensError(
                f"a run was killed while it replaced {output}; the old model is back in its "
                "place, run again to replace it"
            )
    for folder in _left_behind(output, "partial"):
        shutil.rmtree(folder, ignore_errors=True)
        if say is not None:
            say(f"removed {folder.name}, left by a run that was killed")


def _left_behind(output: Path, what: str) -> Iterator[Path]:
    for folder in sorted(output.parent.glob(f".{glob.escape(output.name)}.{what}-*")):
        process = folder.name.rpartition("-")[2]
        if process.isdigit() and (int(process) == os.getpid() or not _alive(int(process))):
            yield folder


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True
