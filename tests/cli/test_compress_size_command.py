"""``moe-lens compress`` by size or plan, and ``moe-lens frontier``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture
def words(files: Any) -> list[object]:
    return ["compress", files.moe, "--data", files.text, "--eval-data", files.other_text]


def test_auto_shows_every_method(run: Any, words: list[object], tmp_path: Path) -> None:
    plan = tmp_path / "plan.json"
    found = run(*words, "--ratio", "0.25", "--dry-run", "--save-plan", plan)
    assert found.code == 0
    assert "Methods at" in found.out
    for method in ("reap", "greedy", "channels", "merge", "random"):
        assert f"\n{method} " in found.out
    assert " is used: of " in found.out
    assert "note: trying greedy\n" in found.err
    assert "make no plan" in found.err
    assert json.loads(plan.read_text())["evidence"]["choice"]["trials"]
    assert [path.name for path in tmp_path.iterdir()] == ["plan.json"]


def test_a_plan_is_saved_and_applied(run: Any, words: list[object], tmp_path: Path) -> None:
    plan, small = tmp_path / "plan.json", tmp_path / "small"
    dry = run(*words, "--experts", "5", "--method", "reap", "--dry-run", "--save-plan", plan)
    assert dry.code == 0
    assert "8 -> 5 experts" in dry.out
    assert f"The plan is in {plan}" in dry.out
    done = run(*words, "--plan", plan, "--output", small, "--json")
    assert done.code == 0
    assert done.json["plan"] == json.loads(plan.read_text())
    assert (small / "plan.json").read_bytes() == plan.read_bytes()
    mixed = run(*words, "--plan", plan, "--ratio", "0.5", "--output", tmp_path / "other")
    assert mixed.code == 2
    assert "leave --ratio out" in mixed.err


def test_gigabytes(run: Any, words: list[object], files: Any, tmp_path: Path) -> None:
    whole = sum(path.stat().st_size for path in files.moe.glob("*.safetensors"))
    target = str(0.8 * whole / 1e9)
    small = tmp_path / "small"
    found = run(*words, "--target-gb", target, "--method", "reap", "--output", small)
    assert found.code == 0
    assert sum(path.stat().st_size for path in small.glob("*.safetensors")) <= 0.8 * whole
    refused = run(*words, "--target-gb", "1e-9", "--dry-run", "--json")
    assert refused.code == 2
    assert "smallest possible model" in refused.json["error"]


def test_repair_is_said(run: Any, words: list[object]) -> None:
    command = (*words, "--ratio", "0.5", "--method", "reap", "--dry-run", "--repair-router", "2")
    found = run(*command)
    assert found.code == 0
    assert "2 steps of training the router rows" in found.err
    assert run(*words, "--ratio", "0.5", "--repair-router", "0").code == 2


def test_frontier(run: Any, files: Any, tmp_path: Path) -> None:
    picture = tmp_path / "frontier.png"
    words = ["frontier", files.moe, "--data", files.text, "--method", "reap", "--method", "random"]
    found = run(*words, "--ratio", "0.25", "--ratio", "0.5", "--output", picture)
    assert found.code == 0
    assert found.out.count("\n") >= 7
    assert f"Written to {picture}" in found.out
    assert picture.read_bytes()[:4] == b"\x89PNG"
    as_json = run(*words, "--ratio", "0.25", "--json").json
    assert [len(size["trials"]) for size in as_json["sizes"]] == [2]
    assert run(*words, "--ratio", "0.25", "--output", tmp_path / "a.txt").code == 2
    assert run("frontier", files.moe, "--method", "magic").code == 2
    assert run("frontier", files.dense, "--data", files.text).code in (1, 2)
