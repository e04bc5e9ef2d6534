"""``moe-lens verify``, and the gate at the end of ``moe-lens compress``."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="session")
def child(files: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`files.moe` without 2 of the 8 experts of each layer, calibrated on `files.text`."""
    from moe_lens.cli import main

    folder = tmp_path_factory.mktemp("verify") / "small"
    words = ["compress", files.moe, "--ratio", "0.25", "--method", "reap", "--output", folder]
    texts = ["--data", files.text, "--eval-data", files.other_text, "--sample-size", "12"]
    assert main([str(word) for word in [*words, *texts]]) == 0
    return folder


@pytest.fixture
def words(files: Any, child: Path) -> list[object]:
    return ["verify", files.moe, child, "--eval-data", files.other_text, "--sample-size", "12"]


def test_shows_what_was_lost(run: Any, words: list[object], child: Path) -> None:
    found = run(*words)
    assert found.code == 0
    assert found.out.startswith("Loss on held-out text (")
    lines = found.out.splitlines()
    for start in ("all ", "even ", "odd ", "mean of 2 ", "MB ", "peak memory, MB ", "tokens/s w"):
        assert any(line.startswith(start) for line in lines), start
    assert "Routing drift (plan.json of the smaller model)" in lines
    assert "Repeated 4-grams in 12 greedy continuations: " in found.out
    assert "Stock mlx_lm.load gives the logits of the model that is measured" in found.out
    assert "note: verifying\n" in found.err


def test_is_what_compress_found(run: Any, words: list[object], child: Path) -> None:
    """Everything that does not depend on the clock."""
    found = run(*words, "--json")
    assert found.code == 0
    again = found.json
    stored = json.loads((child / "report.json").read_text())["verification"]
    assert stored["stock_load"].pop("against") == "the plan applied in memory"
    assert again["stock_load"].pop("against") == "the model that is measured"
    for each in (again, stored):
        del each["tokens_per_second"], each["memory"]
    assert again == stored
    assert again["compressed"] == "small"
    assert set(again["labels"]) == {"even", "odd"}
    assert set(again["routing_drift"]["layers"]) == {"1", "2"}
    assert 0.0 < again["routing_drift"]["mean"]["value"] < 1.0
    assert 0.0 < again["loss"]["kl"]["value"] <= again["loss"]["kl_99"]


def test_the_gate(run: Any, words: list[object]) -> None:
    assert run(*words, "--max-kl", "100").code == 0
    found = run(*words, "--max-kl", "0")
    assert found.code == 1
    assert found.out.startswith("Loss on held-out text (")
    last = found.err.splitlines()[-1]
    assert last.startswith("moe-lens: error: the KL divergence of small from moe is ")
    assert last.endswith(" nats per token, more than the 0 that --max-kl allows")
    as_json = run(*words, "--max-kl", "0", "--json")
    assert as_json.code == 1
    assert set(as_json.json) == {"error", "exit_code", "evidence"}
    assert as_json.json["evidence"]["loss"]["kl"]["value"] > 0


def test_a_model_against_itself(run: Any, files: Any) -> None:
    words = ["verify", files.moe, files.moe, "--eval-data", files.text, "--sample-size", "2"]
    found = run(*words, "--max-kl", "0", "--json")
    assert found.code == 0
    assert found.json["loss"]["kl"]["value"] == 0.0
    assert found.json["routing_drift"]["mapping"] == "experts keep their numbers"


def test_compress_leaves_nothing_that_lost_too_much(run: Any, files: Any, tmp_path: Path) -> None:
    small = tmp_path / "small"
    words = ["compress", files.moe, "--ratio", "0.5", "--method", "reap", "--output", small]
    words += ["--data", files.text, "--eval-data", files.other_text, "--sample-size", "4"]
    found = run(*words, "--max-kl", "0")
    assert found.code == 1
    assert found.out.startswith("Loss on held-out text (")
    assert f"nothing was written to {small}" in found.err.splitlines()[-1]
    assert list(tmp_path.iterdir()) == []
    assert run(*words, "--max-kl", "100").code == 0
    before = (small / "report.json").read_bytes()
    as_json = run(*words, "--max-kl", "0", "--force", "--json")
    assert as_json.code == 1
    assert as_json.json["evidence"]["loss"]["kl"]["value"] > 0
    assert (small / "report.json").read_bytes() == before
    assert os.listdir(tmp_path) == ["small"]


@pytest.mark.parametrize("most", ["-1", "nan"])
def test_a_gate_that_nothing_can_pass(run: Any, words: list[object], most: str) -> None:
    found = run(*words, "--max-kl", most)
    assert found.code == 2
    assert "at least 0" in found.err
    assert found.out == ""


def test_what_cannot_be_compared(run: Any, files: Any, child: Path, tmp_path: Path) -> None:
    missing = run("verify", files.moe, tmp_path / "missing")
    assert missing.code == 2
    assert "missing" in missing.err.splitlines()[-1]
    assert run("verify", tmp_path / "missing", child).code == 2
    assert run("verify", files.dense, child, "--eval-data", files.text).code == 1
    truncated = run("verify", files.moe, files.truncated, "--eval-data", files.text)
    assert truncated.code == 1
    assert "truncated" in truncated.err.splitlines()[-1]
    empty = run("verify", files.moe, child, "--eval-data", files.empty_text)
    assert empty.code == 1
    assert run("verify", files.moe).code == 2
    dry = ["compress", files.moe, "--ratio", "0.5", "--dry-run", "--max-kl", "1"]
    assert run(*dry).code == 2


def test_the_text_that_calibrated_is_refused(
    run: Any, files: Any, child: Path, tmp_path: Path
) -> None:
    words = ["verify", files.moe, child, "--eval-data", files.text, "--sample-size", "12"]
    found = run(*words)
    assert found.code == 2
    assert "12 of 12 different prompts for evaluation" in found.err
    assert "calibrated small" in found.err
    assert "--eval-data" in found.err
    mixed = tmp_path / "mixed.jsonl"
    mixed.write_text(files.text.read_text() + files.other_text.read_text())
    assert "12 of 48 different prompts" in run(*words[:3], "--eval-data", mixed).err


def test_bundled_text_is_said(run: Any, files: Any) -> None:
    found = run("verify", files.moe, files.moe, "--sample-size", "2", "--sequence-length", "8")
    assert found.code == 0
    assert "note: evaluation on the text that comes with moe-lens; it is small" in found.err
    assert "note: 2 of 192 prompts of demo:evaluation drawn with seed 0" in found.err


def test_as_installed(installed: Any, files: Any) -> None:
    found = installed("verify", files.moe, files.moe, "--eval-data", files.text, "--max-kl", "0")
    assert found.code == 0
    assert "Traceback" not in found.err
    assert "Stock mlx_lm.load gives the logits" in found.out
