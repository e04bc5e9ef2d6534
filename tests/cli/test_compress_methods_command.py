"""``moe-lens compress --ratio``: how experts are chosen, and statistics that are kept."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from moe_lens.compress.statistics.saliency import METHODS


@pytest.fixture
def dry(files: Any) -> list[object]:
    texts = ["--data", files.text, "--eval-data", files.other_text]
    return ["compress", files.moe, *texts, "--ratio", "0.25", "--dry-run"]


@pytest.mark.parametrize("method", METHODS)
def test_every_method(method: str, run: Any, dry: list[object]) -> None:
    found = run(*dry, "--method", method, "--json")
    assert found.code == 0
    plan = found.json["plan"]
    assert plan["settings"]["method"] == method
    assert plan["definition"]
    assert all(len(layer["removed"]) == 2 for layer in plan["layers"])


def test_unknown_methods_are_listed(run: Any, dry: list[object]) -> None:
    found = run(*dry, "--method", "magic")
    assert found.code == 2
    for method in METHODS:
        assert method in found.err


def test_statistics_are_kept_and_used_again(run: Any, dry: list[object], tmp_path: Path) -> None:
    kept = tmp_path / "demo.statistics"
    first = run(*dry, "--statistics", kept)
    assert (first.code, kept.is_file()) == (0, True)
    assert "are kept in" in first.err
    again = run(*dry, "--statistics", kept)
    assert "are used again" in again.err
    assert again.out == first.out
    refused = run(*dry, "--statistics", kept, "--sequence-length", "5")
    assert refused.code == 2
    assert "--sequence-length" in refused.err
    assert "delete this one" in refused.err


def test_protection_is_in_the_plan(run: Any, dry: list[object]) -> None:
    evidence = run(*dry, "--protect", "--json").json["plan"]["evidence"]
    assert "99.5th percentile" in evidence["protection"]
    assert "protected" in evidence
    assert "protected" not in run(*dry, "--json").json["plan"]["evidence"]


def test_blends(run: Any, dry: list[object], files: Any, tmp_path: Path) -> None:
    for blend in ("max-min", "even=2,odd=1"):
        assert run(*dry, "--blend", blend, "--json").json["plan"]["settings"]["blend"] == blend
    wrong = run(*dry, "--blend", "c=1")
    assert wrong.code == 2
    assert "no label 'c'; it has even, odd" in wrong.err
    assert "calibrating" not in wrong.err
    plain = tmp_path / "plain.txt"
    plain.write_text("w1 w2 w3\n\nw4 w5 w6\n")
    unlabelled = ["compress", files.moe, "--data", plain, "--eval-data", files.other_text]
    found = run(*unlabelled, "--ratio", "0.25", "--dry-run", "--blend", "max-min")
    assert found.code == 2
    assert "no labels to blend" in found.err


def test_choices_need_a_ratio(run: Any, files: Any, tmp_path: Path) -> None:
    merge = ["compress", files.moe, "--threshold", "0.5", "--dry-run"]
    for option in (["--blend", "max-min"], ["--protect"]):
        found = run(*merge, *option)
        assert found.code == 2
        assert "--ratio" in found.err
    narrow = ["compress", files.moe, "--expert-width", "0.5", "--dry-run"]
    found = run(*narrow, "--statistics", tmp_path / "kept")
    assert found.code == 2
    assert "--statistics" in found.err
