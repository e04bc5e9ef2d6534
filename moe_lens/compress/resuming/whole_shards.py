"""Weight files that an earlier run has written whole, and those that this one adds."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from moe_lens.fingerprint import sampled_sha256

from .ledger import WholeFile

Save = Callable[[Mapping[str, WholeFile]], None]
"""Keeps the entries of all files."""


class WholeShards:
    """The weight files of one folder that need not be written again.

    Args:
        folder: Where they are.
        entries: Those that an earlier run wrote.
        save: Called with all entries whenever one is added.
    """

    def __init__(self, folder: Path, entries: Mapping[str, WholeFile], save: Save) -> None:
        self._folder, self._entries, self._save = folder, dict(entries), save

    def __contains__(self, name: str) -> bool:
        """Whether the file is there as it was when it was added."""
        try:
            return self._entries.get(name) == self._look(name)
        except OSError:
            return False

    @property
    def names(self) -> frozenset[str]:
        """Of all files that were added, whether they are there or not."""
        return frozenset(self._entries)

    @property
    def bytes(self) -> int:
        """The sizes of those that are there, which take no more room."""
        return sum(self._entries[name].bytes for name in self._entries if name in self)

    def add(self, name: str) -> None:
        """Remember a file that is whole and on the disk.

        Raises:
            OSError, DiskError: The disk refuses.
        """
        self._entries[name] = self._look(name)
        self._save(self._entries)

    def _look(self, name: str) -> WholeFile:
        path = self._folder / name
        return WholeFile(path.stat().st_size, sampled_sha256(path))
