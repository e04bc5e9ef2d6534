"""What a compression says while it runs."""

from __future__ import annotations

from collections.abc import Iterable

from moe_lens.telling import Say


class Notes:
    """Sentences for the user, said at once and kept."""

    def __init__(self, say: Say | None) -> None:
        self.all: list[str] = []
        """What belongs to the result and its report, in the order it was said."""
        self._aside: list[str] = []
        self._say = say

    def add(self, note: str) -> None:
        """Say something that belongs to the result, once."""
        if note in self.all:
            return
        self.all.append(note)
        if self._say is not None:
            self._say(note)

    def aside(self, note: str) -> None:
        """Say something of this run that is not true of its result."""
        self._aside.append(note)
        if self._say is not None:
            self._say(note)

    @property
    def said(self) -> tuple[str, ...]:
        """Everything."""
        return (*self._aside, *self.all)

    def extend(self, notes: Iterable[str]) -> None:
        """Say each of several that belong to the result."""
        for note in notes:
            self.add(note)
