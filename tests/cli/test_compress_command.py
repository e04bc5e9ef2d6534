"""``moe-lens compress``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture
def words(files: Any) -> list[object]:
    return ["compress", files.moe, "--data", files.text, "--eval-data", files.other_text]


def test_by_ratio(run: Any, words: list[object], tmp_path: Path) -> None:
    small = tmp_path / "small"
    found = run(*words, "--ratio", "0.25", "--method", "reap", "--output", small)
    assert found.code == 0
    assert "8 -> 6 experts" in found.out
    assert "held-out text" in found.out
    assert "perplexity before" in found.out
    assert f'  model, tokenizer = mlx_lm.load("{small}")' in found.out
    assert "note: calibrating\n" in found.err
    about = run("info", small, "--json").json
    assert about["num_experts"] == 6
    assert run("generate", small, "--prompt", "w1 w2", "--max-tokens", "2").code == 0


def test_by_threshold(run: Any, words: list[object], tmp_path: Path) -> None:
    found = run(*words, "--threshold", "0.05", "--output", tmp_path / "small", "--json")
    assert found.code == 0
    plan = found.json["plan"]
    assert plan["kind"] == "merge"
    assert found.json["verification"]["loss"]["tokens"] > 0
    assert found.json["output"] == str(tmp_path / "small")


def test_nothing_similar_enough(run: Any, words: list[object], tmp_path: Path) -> None:
    found = run(*words, "--threshold", "0.99", "--output", tmp_path / "small")
    assert found.code == 1
    assert "most similar experts" in found.out
    assert "--threshold" in found.err
    assert "25%" in found.err
    assert not (tmp_path / "small").exists()
    as_json = run(*words, "--threshold", "0.99", "--output", tmp_path / "small", "--json")
    assert as_json.code == 1
    assert set(as_json.json) == {"error", "exit_code", "evidence"}
    assert set(as_json.json["evidence"]["threshold_that_saves"]) == {"25%", "50%"}


def test_dry_run(run: Any, words: list[object], tmp_path: Path) -> None:
    found = run(
        *words, "--ratio", "0.5", "--method", "reap", "--dry-run", "--output", tmp_path / "small"
    )
    assert found.code == 0
    assert "8 -> 4 experts" in found.out
    assert "nothing was written" in found.err
    assert list(tmp_path.iterdir()) == []
    assert (
        run(*words, "--ratio", "0.5", "--method", "reap", "--dry-run", "--json").json[
            "verification"
        ]
        is None
    )


def test_force(run: Any, words: list[object], tmp_path: Path) -> None:
    small = tmp_path / "small"
    assert run(*words, "--ratio", "0.25", "--method", "reap", "--output", small).code == 0
    assert run(*words, "--ratio", "0.5", "--method", "reap", "--output", small).code == 2
    assert run(*words, "--ratio", "0.5", "--method", "reap", "--output", small, "--force").code == 0
    assert json.loads((small / "config.json").read_text())["num_experts"] == 4


def test_a_large_loss_is_a_warning(
    run: Any, words: list[object], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("moe_lens.compress.verification.verification.MAX_KL", 0.0)
    choice = ["--ratio", "0.5", "--method", "reap", "--output", tmp_path / "small"]
    found = run(*words, *choice)
    assert found.code == 0
    assert "warning: the loss is large: KL divergence" in found.err
    as_json = run(*words, *choice, "--force", "--json")
    told = [json.loads(line) for line in as_json.err.splitlines()]
    warnings = [each["message"] for each in told if each["event"] == "warning"]
    assert warnings == as_json.json["warnings"]
    assert warnings[0].startswith("the loss is large: KL divergence")
