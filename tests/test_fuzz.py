"""Damaged files end in one clear sentence: a few cases of `tests/fuzz.py` of every target."""

from __future__ import annotations

from pathlib import Path

import pytest

from fuzz import fuzz
from fuzzing.files import GoodFiles
from fuzzing.mutations import ByteStep, JsonStep, changed_bytes, changed_json
from fuzzing.sandbox import HangError, judge
from fuzzing.targets import TARGETS
from moe_lens import MoeLensError

CASES = {"plan": 15, "ledger": 15}
"""Fewer of what takes longest."""


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> GoodFiles:
    return GoodFiles(tmp_path_factory.mktemp("good"))


@pytest.mark.slow
@pytest.mark.parametrize("name", TARGETS)
def test_damaged_files_are_refused_in_one_sentence(
    name: str, good: GoodFiles, tmp_path: Path
) -> None:
    cases = CASES.get(name, 40)
    outcomes = fuzz(TARGETS[name](good), cases, 1, tmp_path)
    assert outcomes.total() >= cases
    assert outcomes["refused"] > cases // 4


@pytest.mark.parametrize(
    ("steps", "expected"),
    [
        ([JsonStep(0, "replace", 7)], '{"a": 7, "b": [1, 2]}'),
        ([JsonStep(0, "delete", 0)], '{"b": [1, 2]}'),
        ([JsonStep(2, "twice", 0)], '{"a": {}, "b": [1, 1, 2]}'),
    ],
)
def test_steps_change_json(steps: list[JsonStep], expected: str) -> None:
    assert changed_json('{"a": {}, "b": [1, 2]}', steps) == expected


def test_steps_change_bytes() -> None:
    assert changed_bytes(b"abcdef", [ByteStep(2, "cut", b"x")]) == b"ab"
    assert changed_bytes(b"abcdef", [ByteStep(2, "insert", b"xy")]) == b"abxycdef"
    assert changed_bytes(b"abcdef", [ByteStep(2, "overwrite", b"xy")]) == b"abxyef"
    assert changed_bytes(b"abcdef", [ByteStep(7, "delete", b"xy")]) == b"cdef"
    assert changed_bytes(b"abcdef", [ByteStep(0, "flip", b"x")]) == b"cbcdef"


def test_what_must_not_happen_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> None:
        raise MoeLensError("a sentence")

    def two_lines() -> None:
        raise _TwoLinesError("one\ntwo")

    assert judge(lambda: None, tmp_path, ()) == "ok"
    assert judge(refuse, tmp_path, ()) == "a sentence"
    with pytest.raises(AssertionError, match="no single line"):
        judge(two_lines, tmp_path, ())
    with pytest.raises(ZeroDivisionError):
        judge(lambda: 1 / 0, tmp_path, ())
    with pytest.raises(AssertionError, match=r"files outside of the target changed: \['stray'\]"):
        judge(lambda: (tmp_path / "stray").write_text("x"), tmp_path, ())
    assert judge(lambda: (tmp_path / "stray").write_text("xy"), tmp_path, ("stray",)) == "ok"
    monkeypatch.setattr("fuzzing.sandbox.SECONDS", 0.05)
    with pytest.raises(HangError):
        judge(_forever, tmp_path, ())


class _TwoLinesError(MoeLensError):
    def __str__(self) -> str:
        return str(self.args[0])


def _forever() -> None:
    while True:
        pass
