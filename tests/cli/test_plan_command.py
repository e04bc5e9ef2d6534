"""``moe-lens plan``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="module")
def plan(files: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from moe_lens.cli import main

    file = tmp_path_factory.mktemp("plan") / "plan.json"
    words = ["compress", files.moe, "--ratio", "0.25", "--method", "reap", "--dry-run", "--json"]
    words += ["--data", files.text, "--eval-data", files.other_text, "--save-plan", file]
    assert main([str(word) for word in words]) == 0
    return file


def test_shows_what_becomes_of_every_layer(run: Any, plan: Path) -> None:
    found = run("plan", plan)
    assert found.code == 0
    lines = found.out.splitlines()
    assert lines[0].startswith("Plan: 8 -> 6 experts in each of 2 layers")
    removed = {
        str(each["layer"]): each["removed"] for each in json.loads(plan.read_text())["layers"]
    }
    for layer, ids in removed.items():
        (row,) = [line for line in lines if line.startswith(f"{layer} ")]
        assert row.split() == [layer, "8", "->", "6", *map(str, ids)]
    assert found.err == ""


@pytest.mark.parametrize("ending", ["png", "svg", "pdf"])
def test_writes_a_picture(run: Any, plan: Path, tmp_path: Path, ending: str) -> None:
    picture = tmp_path / f"plan.{ending}"
    found = run("plan", plan, "--output", picture)
    assert found.code == 0
    assert f"Written to {picture}" in found.out
    assert picture.stat().st_size > 1000


def test_json(run: Any, plan: Path, tmp_path: Path) -> None:
    found = run("plan", plan, "--output", tmp_path / "plan.png", "--json")
    assert found.json["plan"] == json.loads(plan.read_text())
    assert found.json["output"] == str(tmp_path / "plan.png")


def test_a_folder_stands_for_its_plan(run: Any, plan: Path) -> None:
    assert run("plan", plan.parent) == run("plan", plan)


def test_a_plan_that_does_not_add_up(run: Any, plan: Path, tmp_path: Path) -> None:
    content = json.loads(plan.read_text())
    content["layers"][0]["removed"].pop()
    edited = tmp_path / "edited.json"
    edited.write_text(json.dumps(content))
    found = run("plan", edited, "--output", tmp_path / "plan.png")
    assert found.code == 2
    assert "says nothing about expert" in found.err
    assert not (tmp_path / "plan.png").exists()


def test_what_is_no_plan(run: Any, plan: Path, tmp_path: Path) -> None:
    assert "there is no plan at" in run("plan", tmp_path / "none.json").err
    found = run("plan", plan, "--output", tmp_path / "plan.txt")
    assert found.code == 2
    assert "pictures are written as png, svg, pdf" in found.err
