"""``moe-lens compress --expert-width``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture
def words(files: Any) -> list[object]:
    return ["compress", files.moe, "--data", files.text, "--eval-data", files.other_text]


def test_narrower_experts(run: Any, words: list[object], tmp_path: Path) -> None:
    small = tmp_path / "small"
    found = run(*words, "--expert-width", "0.5", "--output", small)
    assert found.code == 0, found.err
    assert "64 -> 32 channels in each expert of 2 layers (50% removed)" in found.out
    assert "importance kept" in found.out
    assert "note: calibrating channels\n" in found.err
    assert "note: calibrating\n" not in found.err
    about = run("info", small, "--json").json
    assert (about["num_experts"], about["expert_width"]) == (8, 32)
    assert run("generate", small, "--prompt", "w1 w2", "--max-tokens", "2").code == 0
    card = (small / "README.md").read_text()
    assert "# moe, 32 of 64 channels in each" in card
    assert "the 32 most important stay" in card
    assert "narrowed-experts" in card
    assert "experts were removed" not in card


def test_fewer_and_narrower_experts(run: Any, words: list[object], tmp_path: Path) -> None:
    small = tmp_path / "small"
    found = run(*words, "--expert-width", "40", "--ratio", "0.25", "--output", small, "--json")
    assert found.code == 0, found.err
    plan = found.json["plan"]
    assert (plan["kind"], plan["num_experts"], plan["expert_width"]) == ("prune", 6, 40)
    assert plan == json.loads((small / "plan.json").read_text())
    assert found.json["verification"]["stock_load"]["largest_difference"] < 1e-4
    about = run("info", small, "--json").json
    assert (about["num_experts"], about["expert_width"]) == (6, 40)
    card = (small / "README.md").read_text()
    assert "# moe, 6 of 8 experts, 40 of 64 channels in each" in card


def test_fewer_experts_per_token_as_well(run: Any, words: list[object], tmp_path: Path) -> None:
    options = ["--expert-width", "0.5", "--experts-per-token", "1", "--dry-run", "--json"]
    found = run(*words, *options)
    assert found.code == 0, found.err
    assert found.json["plan"]["experts_per_token"] == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--expert-width", "64"], "cannot have 64; the nearest possible width is 63"),
        (["--expert-width", "1.5"], "a whole number of 2 or more"),
        (["--expert-width", "0"], "a share of the channels below 1"),
        (["--expert-width", "0.5", "--threshold", "0.8"], "--threshold"),
        (["--expert-width", "0.5", "--method", "reap"], "(--method)"),
        (["--expert-width", "0.5", "--experts-per-token", "9"], "experts per token"),
    ],
)
def test_what_cannot_be_is_refused(
    options: list[str], message: str, run: Any, words: list[object]
) -> None:
    found = run(*words, *options, "--dry-run")
    assert found.code != 0
    assert message in " ".join(found.err.split())
