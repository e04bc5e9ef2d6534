"""Runs one case, and judges it: it succeeds or ends in one sentence, in time, and stays inside."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from moe_lens import MoeLensError

SECONDS = 20.0
"""Longest time of a case; those that succeed take less than one."""


class HangError(AssertionError):
    """A case that did not end in time."""


def judge(act: Callable[[], object], around: Path, may_appear: tuple[str, ...]) -> str:
    """Run a case.

    Args:
        act: Opens the damaged file.
        around: The folder in which everything of the case lies.
        may_appear: First parts of names, relative to `around`, of what `act` may make or change.

    Returns:
        ``ok`` or the sentence of the refusal.

    Raises:
        AssertionError: The sentence is none, or a file appeared, changed or went elsewhere.
        Exception: Whatever `act` raised that is no `MoeLensError`.
    """
    before = _snapshot(around, may_appear)
    outcome = "ok"
    with _in_time():
        try:
            act()
        except MoeLensError as error:
            outcome = str(error)
    _check_sentence(outcome)
    after = _snapshot(around, may_appear)
    changed = {name for name in before | after if before.get(name) != after.get(name)}
    assert not changed, f"files outside of the target changed: {sorted(changed)}"
    return outcome


def _check_sentence(text: str) -> None:
    assert text.isprintable(), f"no single line of readable characters: {text!r}"
    text.encode()
    assert 0 < len(text) < 2000, f"no sentence: {text[:200]!r}"


def _snapshot(folder: Path, left_out: tuple[str, ...]) -> dict[str, tuple[int, int]]:
    found = {}
    for path in folder.rglob("*"):
        name = path.relative_to(folder)
        if name.parts[0] not in left_out and not path.is_dir():
            state = path.lstat()
            found[str(name)] = (state.st_size, state.st_mtime_ns)
    return found


@contextmanager
def _in_time() -> Iterator[None]:
    def stop(number: int, frame: FrameType | None) -> None:
        raise HangError(f"no end after {SECONDS:.0f} s")

    old = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, old)
