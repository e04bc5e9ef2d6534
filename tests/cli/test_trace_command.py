"""``moe-lens trace``."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def test_summary(run: Any, files: Any, tmp_path: Path) -> None:
    found = run("trace", files.moe, "--data", files.text, "--output", tmp_path / "run")
    assert found.code == 0
    assert "120 tokens of 24 prompts" in found.out
    assert "even, odd" in found.out
    assert f"moe-lens heatmap {tmp_path / 'run'}" in found.err


def test_json(run: Any, files: Any, tmp_path: Path) -> None:
    import moe_lens

    found = run(
        "trace", files.moe, "--data", files.text, "--output", tmp_path / "run", "--json",
        "--sample-size", 6, "--sequence-length", 3, "--batch-size", 2, "--router-logits",
    ).json  # fmt: skip
    assert (found["tokens"], found["prompts"]) == (18, 6)
    trace = moe_lens.Trace.open(found["trace"])
    assert trace.num_tokens == 18
    assert trace.has_router_logits


def test_the_same_again_runs_nothing(run: Any, files: Any) -> None:
    found = run("trace", files.moe, "--data", files.text, "--output", files.run)
    assert found.code == 0
    assert "120 tokens had been recorded before" in found.err


def test_force_replaces(run: Any, files: Any, tmp_path: Path) -> None:
    words = ["trace", files.moe, "--data", files.text, "--output", tmp_path / "run", "--json"]
    assert run(*words).json["tokens"] == 120
    assert run(*words, "--force", "--sample-size", "2").json["tokens"] == 10


def test_overrides_are_recorded(run: Any, files: Any, tmp_path: Path) -> None:
    found = run(
        "trace", files.moe, "--data", files.text, "--output", tmp_path / "run", "--json",
        "--mask-experts", "2:0,1", "--experts-per-token", "1",
    ).json  # fmt: skip
    overrides = found["settings"]["overrides"]
    assert overrides["2"]["mask"] == [0, 1]
    assert overrides["1"] == {"k": 1}
    shown = run("heatmap", tmp_path / "run", "--json").json
    assert shown["share"][1][:2] == [0.0, 0.0]
