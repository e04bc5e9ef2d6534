"""Whether a model folder is still the one that was read first.

Compression reads the weights several times, hours apart: to calibrate, to write, to verify. A
folder that is downloaded again, converted or edited in between would give a model whose parts are
of two parents.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from moe_lens.errors import MoeLensError
from moe_lens.fingerprint import file_sha256, weights_sha256

__all__ = ["FolderState"]


@dataclass(frozen=True)
class FolderState:
    """How config.json and the weight files of a folder stood when `of` looked at them."""

    folder: Path
    files: dict[str, tuple[int, int, int]]
    """Size, time of change in nanoseconds and inode of every file, by name."""
    config_sha256: str
    weights_sha256: str

    @classmethod
    def of(cls, folder: Path) -> FolderState:
        """Look at a folder; milliseconds, since weights are sampled.

        Raises:
            MoeLensError: A file is gone or cannot be read.
        """
        try:
            return cls(
                folder,
                {file.name: _stat(file) for file in _files(folder)},
                file_sha256(folder / "config.json"),
                weights_sha256(folder),
            )
        except OSError as error:
            raise MoeLensError(
                f"{folder} cannot be read any more ({error.strerror or error}); copy the model to "
                "a place where it stays, and run again"
            ) from error

    @contextmanager
    def explaining(self) -> Iterator[None]:
        """Where the block fails and the folder changed, that is the error."""
        try:
            yield
        except MoeLensError as error:
            try:
                self.check()
            except MoeLensError as changed:
                raise changed from error
            raise

    def check(self) -> None:
        """Raise MoeLensError if a file changed, came or went since."""
        now = FolderState.of(self.folder)
        if now == self:
            return
        names = sorted(set(self.files) | set(now.files))
        changed = [name for name in names if self.files.get(name) != now.files.get(name)]
        what = changed[0] if changed else "its content"
        raise MoeLensError(
            f"{self.folder} changed while it was read ({what}); let nothing write to it, and run "
            "again"
        )


def _files(folder: Path) -> list[Path]:
    return [folder / "config.json", *sorted(folder.glob("*.safetensors"))]


def _stat(file: Path) -> tuple[int, int, int]:
    found = file.stat()
    return found.st_size, found.st_mtime_ns, found.st_ino
