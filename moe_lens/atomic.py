"""Files that are either there whole or not there at all."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from .errors import DiskError

__all__ = ["PART_SUFFIX", "replacing", "sync_folder", "write_bytes"]

PART_SUFFIX = ".part"


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path next to ``path``; on success it becomes ``path``, else it goes.

    The bytes are on disk before the new name is (``fsync``), so that a power cut cannot leave a
    name without its content. A process that is killed leaves at most a hidden ``.NAME.part``,
    which the next writer of the same file replaces.

    Raises:
        DiskError: The folder cannot be written to, or the disk is full.
    """
    part = path.with_name(f".{path.name}{PART_SUFFIX}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield part
        _sync(part)
        part.replace(path)
    except OSError as error:
        raise DiskError(
            f"{path} cannot be written: {error.strerror or error}; choose another place or make "
            "room there"
        ) from error
    finally:
        with suppress(OSError):  # the error above says what went wrong
            part.unlink(missing_ok=True)


def write_bytes(path: Path, data: bytes | str) -> None:
    """Write a whole file; see `replacing`. Text is written as UTF-8."""
    with replacing(path) as part:
        part.write_bytes(data.encode() if isinstance(data, str) else data)


def sync_folder(folder: Path, *, deep: bool = False) -> None:
    """Bring the names in a folder to the disk; with `deep`, all that is in it and below.

    Raises:
        OSError: The disk refuses.
    """
    for path in sorted(folder.iterdir()) if deep else ():
        if path.is_dir():
            sync_folder(path, deep=True)
        else:
            _sync(path)
    try:
        _sync(folder)
    except OSError as error:  # some file systems do not sync folders
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
