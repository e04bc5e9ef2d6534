"""``moe-lens compress --per-layer``, and a plan in which layers differ."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture
def words(files: Any) -> list[object]:
    return ["compress", files.moe, "--data", files.text, "--eval-data", files.other_text]


def test_a_plan_with_unequal_layers(run: Any, words: list[object], tmp_path: Path) -> None:
    plan, small = tmp_path / "plan.json", tmp_path / "small"
    sized = ("--ratio", "0.25", "--method", "reap")
    assert run(*words, *sized, "--dry-run", "--save-plan", plan).code == 0
    content = json.loads(plan.read_text())
    first = content["layers"][0]
    first["groups"].append({"experts": [first["removed"].pop()]})
    plan.write_text(json.dumps(content))
    refused = run(*words, "--plan", plan, "--output", small)
    assert refused.code == 2
    assert f"layer {first['layer']} of the plan keeps 7 experts" in refused.err
    assert '"per_layer": true' in refused.err
    plan.write_text(json.dumps({**content, "num_experts": 7, "per_layer": True}))
    found = run(*words, "--plan", plan, "--output", small)
    assert found.code == 0
    assert "8 -> 6 to 7 experts" in found.out
    assert "trust_remote_code=True" in found.out
    prompt = ("generate", small, "--prompt", "w1 w2", "--max-tokens", "2")
    assert "--trust-remote-code" in run(*prompt).err
    assert run(*prompt, "--trust-remote-code").code == 0


def test_the_measured_budget(run: Any, words: list[object]) -> None:
    found = run(*words, "--experts", "6", "--per-layer", "--dry-run", "--json")
    assert found.code == 0
    budget = found.json["plan"]["evidence"]["layer_budget"]
    assert budget["equal"] == 6
    kept = [len(layer["groups"]) for layer in found.json["plan"]["layers"]]
    assert sum(kept) <= 6 * len(kept)
    assert '"stage": "measuring layers", "of": null, "unit": "measurements"' in found.err


def test_what_it_does_not_go_with(run: Any, words: list[object]) -> None:
    found = run(*words, "--ratio", "0.5", "--method", "channels", "--per-layer", "--dry-run")
    assert found.code == 2
    assert "--per-layer" in found.err
