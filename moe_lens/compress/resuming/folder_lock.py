"""A lock on a folder, which ends with the process that holds it, however that ends."""

from __future__ import annotations

import fcntl
import os
from contextlib import suppress
from pathlib import Path

FILE = "lock"


class FolderInUseError(Exception):
    """Another process holds the folder. Carries its id, where that is known."""

    def __init__(self, process: int | None) -> None:
        super().__init__()
        self.process = process


class FolderLock:
    """Holds a folder, which is made, until `release`.

    Where a file system knows no locks, the id of the process in the lock file decides, which
    tells nothing about processes of other machines.

    Raises:
        FolderInUseError: Another process, or another part of this one, holds it.
        OSError: The folder cannot be made.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / FILE
        self._file = self._held()

    def _held(self) -> int:
        while True:
            self.path.parent.mkdir(exist_ok=True)
            try:
                file = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
            except FileNotFoundError:  # whoever held it is just removing the folder
                continue
            if self._locked(file):
                os.ftruncate(file, 0)
                os.pwrite(file, f"{os.getpid()}\n".encode(), 0)
                return file
            os.close(file)

    def _locked(self, file: int) -> bool:
        """Whether it is ours now; False if the name belongs to another file meanwhile."""
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            process = _process(file)
            os.close(file)
            raise FolderInUseError(process) from None
        except OSError:  # no locks here
            process = _process(file)
            if process not in (None, os.getpid()) and _alive(process):
                os.close(file)
                raise FolderInUseError(process) from None
        try:
            return os.path.samestat(os.fstat(file), os.stat(self.path))
        except FileNotFoundError:
            return False

    def release(self) -> None:
        """Let go of the folder."""
        os.close(self._file)


def _process(file: int) -> int | None:
    with suppress(OSError, ValueError):
        return int(os.pread(file, 32, 0))
    return None


def _alive(process: int | None) -> bool:
    try:
        os.kill(process or 0, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):
        return True
    return True
