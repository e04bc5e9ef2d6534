"""Errors that tell a user, in one sentence, what is wrong and what to do about it."""

from __future__ import annotations


class MoeLensError(Exception):
    """Something failed for a reason the user can act on. The command line exits with 1."""

    def __str__(self) -> str:
        """The sentence, on one line; what a file or a path put into it moves no cursor."""
        text = super().__str__()
        if text.isprintable():
            return text
        return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in " ".join(text.split()))


class UsageError(MoeLensError):
    """What was asked for cannot be: a wrong option, expert, layer or number. Exits with 2."""


class UnsupportedModelError(MoeLensError):
    """The model has no routed experts, or not in a form that can be seen or changed."""


class CaptureError(MoeLensError):
    """A capture or a recording that holds nothing, or not what was asked for."""


class DiskError(MoeLensError):
    """A disk that is full, read-only, gone or too slow to answer: nothing was wrong with the work.

    What was finished before stays of use.
    """
