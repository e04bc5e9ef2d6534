"""Files that are either there whole or not there at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from .errors import MoeLensError

__all__ = ["PART_SUFFIX", "replacing", "write_bytes"]

PART_SUFFIX = ".part"


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path next to ``path``; on success it becomes ``path``, else it goes.

    The bytes are on disk before the new name is (``fsync``), so that a power cut cannot leave a
    name without its content. A process that is killed leaves at most a hidden ``.NAME.part``,
    which the next writer of the same file replaces.

    Raises:
        MoeLensError: The folder cannot be written to, or the disk is full.
    """
    part = path.with_name(f".{path.name}{PART_SUFFIX}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield part
        with part.open("rb") as written:
            os.fsync(written.fileno())
        part.replace(path)
    except OSError as error:
        raise MoeLensError(
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
