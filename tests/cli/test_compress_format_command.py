"""``moe-lens compress --format hf``."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest


@pytest.fixture
def words(files: Any) -> list[object]:
    return ["compress", files.moe, "--data", files.text, "--eval-data", files.other_text]


def test_from_mlx_to_hugging_face_and_on(run: Any, words: list[object], tmp_path: Path) -> None:
    small, smaller = tmp_path / "small", tmp_path / "smaller"
    size = ["--ratio", "0.25", "--method", "reap"]
    found = run(*words, *size, "--format", "hf", "--output", small)
    assert found.code == 0, found.err
    assert "comparing the export" in found.err + found.out
    names = set(mx.load(str(small / "model.safetensors")))
    assert "model.layers.1.mlp.experts.5.down_proj.weight" in names
    assert "model.layers.1.mlp.experts.6.down_proj.weight" not in names
    assert run("generate", small, "--prompt", "w1 w2", "--max-tokens", "2").code == 0
    report = json.loads((small / "report.json").read_text())
    assert report["layout"] == "hf"
    assert "--format hf" in report["commands"]["plan"]
    assert "--format hf" in report["commands"]["compress"]

    words[1] = small
    found = run(
        *words, "--experts", "3", "--merge", "--format", "hf", "--output", smaller, "--json"
    )
    assert found.code == 0, found.err
    assert found.json["verification"]["stock_load"]["largest_difference"] < 1e-4
    assert set(mx.load(str(smaller / "model.safetensors"))) < names


def test_the_command_of_the_card_gives_the_same_bytes(
    run: Any, files: Any, words: list[object], tmp_path: Path
) -> None:
    small, again = tmp_path / "small", tmp_path / "again"
    size = ["--ratio", "0.5", "--method", "frequency"]
    assert run(*words, *size, "--format", "hf", "--output", small).code == 0
    report = json.loads((small / "report.json").read_text())
    command = shlex.split(report["commands"]["plan"])[1:]
    places = {"moe": files.moe, "plan.json": small / "plan.json", "../small-again": again}
    texts = {"text.jsonl": files.text, "other.jsonl": files.other_text}
    assert run(*((places | texts).get(word, word) for word in command)).code == 0
    for name in ("model.safetensors", "config.json"):
        assert (small / name).read_bytes() == (again / name).read_bytes()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--format", "gguf"], "gguf"),
        (["--format", "hf", "--per-layer"], "leave out either --per-layer or --format hf"),
    ],
)
def test_what_is_refused(
    options: list[str], message: str, run: Any, words: list[object], tmp_path: Path
) -> None:
    size = ["--ratio", "0.25", "--method", "reap"]
    found = run(*words, *size, *options, "--output", tmp_path / "small")
    assert found.code == 2
    assert message in found.err
    assert "Traceback" not in found.err
    assert list(tmp_path.iterdir()) == []


def test_a_quantised_parent_is_refused_before_anything_runs(run: Any, tmp_path: Path) -> None:
    size = ["--ratio", "0.25", "--method", "reap", "--format", "hf"]
    found = run("compress", "demo", *size, "--output", tmp_path / "small")
    assert found.code != 0
    assert "--dequantize" in found.err
    assert "calibrating" not in found.err
    assert list(tmp_path.iterdir()) == []
