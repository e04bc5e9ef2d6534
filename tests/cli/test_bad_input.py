"""What a user gets wrong is answered in one sentence, with the right exit code."""

from __future__ import annotations

import io
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

PROMPT = "w1 w2 w3 w4"


def check(outcome: Any, code: int, *words: str) -> None:
    """One sentence on stderr that has these words, nothing on stdout."""
    assert outcome.code == code, outcome
    assert outcome.out == ""
    last = outcome.err.splitlines()[-1]
    assert last.startswith("moe-lens: error: ")
    assert "Traceback" not in outcome.err
    assert "internal error" not in last
    for word in words:
        assert word in last


@pytest.mark.parametrize(
    ("name", "code", "words"),
    [
        ("dense", 1, ["dense"]),
        ("unknown", 1, ["no_such_architecture"]),
        ("truncated", 1, ["truncated", "download"]),
        ("text", 2, ["is a file"]),
        ("run", 2, ["no config.json"]),
    ],
)
def test_models_that_are_none(run: Any, files: Any, name: str, code: int, words: list[str]) -> None:
    model = getattr(files, name)
    check(run("info", model), code, *words)
    check(run("generate", model, "--prompt", PROMPT), code, *words)
    check(run("compress", model, "--threshold", "0.5", "--output", "never"), code, *words)
    assert not Path("never").exists()


def test_a_folder_that_is_not_there(run: Any, tmp_path: Path) -> None:
    check(run("info", tmp_path / "missing"), 2, "missing")
    check(run("trace", tmp_path / "missing", "--data", "demo", "--output", tmp_path / "run"), 2)
    check(run("heatmap", tmp_path / "missing", "--prompt", PROMPT), 2, "missing")


def test_remote_code_needs_trust(run: Any, files: Any, tmp_path: Path) -> None:
    folder = tmp_path / "own-code"
    shutil.copytree(files.moe, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_file": "own.py"}))
    check(run("info", folder), 1, "--trust-remote-code")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--experts-per-token", "9"], ["from 1 to 8"]),
        (["--experts-per-token", "0"], ["from 1 to 8"]),
        (["--mask-experts", "0:1"], ["layer 0"]),
        (["--mask-experts", "7:1"], ["layer 7"]),
        (["--mask-experts", "1:8"], ["expert 8"]),
        (["--force-experts", "1:8"], ["expert 8"]),
        (["--mask-experts", "1:2", "--force-experts", "1:2"], ["both masked and forced"]),
        (["--mask-experts", "*:0,1,2,3,4,5,6"], ["masked"]),
        (["--force-experts", "*:0,1,2"], ["forced"]),
        (["--mask-experts", "1"], ["LAYER:EXPERT", "'1'"]),
        (["--mask-experts", "1:"], ["LAYER:EXPERT"]),
        (["--mask-experts", ":1"], ["LAYER:EXPERT"]),
        (["--mask-experts", "1:2-3"], ["LAYER:EXPERT"]),
        (["--mask-experts", "-1:2"], ["LAYER:EXPERT"]),
        (["--mask-experts", "1:2,"], ["LAYER:EXPERT"]),
        (["--force-experts", "one:2"], ["--force-experts", "LAYER:EXPERT"]),
        (["--compare"], ["--compare", "--experts-per-token"]),
        (["--temp", "-1"], ["temp"]),
        (["--temp", "nan"], ["temp"]),
        (["--top-p", "2"], ["top_p"]),
        (["--max-tokens", "0"], ["--max-tokens"]),
    ],
)
def test_generate(run: Any, files: Any, options: list[str], words: list[str]) -> None:
    check(run("generate", files.moe, "--prompt", PROMPT, *options), 2, *words)


def test_an_empty_prompt(run: Any, files: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    check(run("generate", files.moe, "--prompt", ""), 2, "prompt is empty")
    check(run("heatmap", files.moe, "--prompt", ""), 2, "prompt is empty")
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"\n")))
    check(run("generate", files.moe, "--prompt", "-"), 2, "prompt is empty")


def test_a_prompt_that_is_no_text(run: Any, files: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"\xff\xfe")))
    check(run("generate", files.moe, "--prompt", "-"), 2, "not UTF-8")


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        (["--threshold", "1.5"], 2, ["1.5"]),
        (["--threshold", "-1"], 2, ["-1"]),
        (["--threshold", "0"], 2, ["threshold"]),
        (["--threshold", "nan"], 2, ["nan"]),
        (["--ratio", "0", "--method", "reap"], 2, ["ratio"]),
        (["--ratio", "1", "--method", "reap"], 2, ["ratio"]),
        (["--ratio", "nan", "--method", "reap"], 2, ["nan"]),
        (["--ratio", "0.01", "--method", "reap"], 2, ["0.125"]),
        (["--ratio", "0.9", "--method", "reap"], 2, ["keep 1"]),
        ([], 2, ["--threshold", "--ratio"]),
        (["--threshold", "0.5", "--ratio", "0.5"], 2, ["--threshold", "--ratio"]),
        (["--threshold", "0.5", "--method", "reap"], 2, ["--method", "--ratio"]),
        (["--ratio", "0.5", "--method", "reap", "--experts-per-token", "5"], 2, ["5"]),
        (
            ["--ratio", "0.5", "--method", "reap", "--experts-per-token", "0"],
            2,
            ["--experts-per-token"],
        ),
    ],
)
def test_compress(
    run: Any, files: Any, tmp_path: Path, options: list[str], code: int, words: list[str]
) -> None:
    output = tmp_path / "small"
    texts = ["--data", files.text, "--eval-data", files.other_text]
    check(run("compress", files.moe, *options, *texts, "--output", output), code, *words)
    assert not output.exists()


def test_compress_texts(run: Any, files: Any, tmp_path: Path) -> None:
    command = [
        "compress",
        files.moe,
        "--ratio",
        "0.25",
        "--method",
        "reap",
        "--output",
        tmp_path / "small",
    ]
    check(run(*command, "--data", files.empty_text), 1, "empty.jsonl")
    check(run(*command, "--data", tmp_path / "missing"), 2, "missing")
    check(run(*command, "--data", files.text, "--eval-data", files.text), 2, "--eval-data")
    assert list(tmp_path.iterdir()) == []


def test_compress_output(run: Any, files: Any, tmp_path: Path) -> None:
    command = ["compress", files.moe, "--ratio", "0.25", "--method", "reap"]
    check(run(*command), 2, "--output")
    check(run(*command, "--output", files.moe, "--force"), 2, "the model that is read")
    check(run(*command, "--output", tmp_path), 2, "--force")
    (tmp_path / "mine.txt").write_text("mine")
    check(run(*command, "--output", tmp_path, "--force"), 2, "no model")
    assert [each.name for each in tmp_path.iterdir()] == ["mine.txt"]


def test_trace(run: Any, files: Any, tmp_path: Path) -> None:
    command = ["trace", files.moe, "--data", files.text]
    check(run("trace", files.moe, "--data", files.empty_text, "-o", tmp_path / "run"), 1)
    check(run("trace", files.moe, "--data", tmp_path / "missing", "-o", tmp_path / "run"), 2)
    check(run(*command, "-o", files.moe), 2, "no trace")
    check(run(*command, "-o", files.run, "--no-resume"), 2, "already")
    check(run(*command, "-o", files.run, "--sample-size", "3"), 2, "recorded with")
    check(run(*command, "-o", tmp_path / "run", "--mask-experts", "0:1"), 2, "layer 0")
    check(run(*command, "-o", tmp_path / "run", "--sample-size", "0"), 2, "--sample-size")
    check(run(*command, "-o", tmp_path / "run", "--chat-template"), 2, "chat template")


def test_outputs_that_cannot_be_written(run: Any, files: Any, tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("in the way")
    texts = ["--data", files.text, "--eval-data", files.other_text]
    inside = blocked / "inside"
    assert run("trace", files.moe, "--data", files.text, "--output", inside).code in (1, 2)
    assert run(
        "compress", files.moe, "--ratio", "0.25", "--method", "reap", *texts, "--output", inside
    ).code in (1, 2)
    check(run("heatmap", files.run, "--output", inside / "x.png"), 1)
    assert blocked.read_text() == "in the way"
    assert [each.name for each in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--prompt", PROMPT, "--data", "demo"], ["takes no prompt"]),
        (["--experts-per-token", "1"], ["no change of routing"]),
        (["--view", "tokens"], ["--layer"]),
        (["--layer", "0"], ["layer 0"]),
        (["--layer", "1", "--view", "layers"], ["--layer", "--view tokens"]),
        (["--only-used", "--view", "choices"], ["--only-used"]),
        (["--number", "3", "--view", "layers"], ["--number"]),
        (["--number", "24"], ["prompt 24"]),
        (["--number", "0", "--tokens", "9:12"], ["5 tokens"]),
        (["--tokens", "5"], ["FROM:TO"]),
        (["--label", "neither"], ["even, odd"]),
        (["--output", "picture.gif"], ["png"]),
        (["--number", "0", "--label", "even"], ["--label"]),
    ],
)
def test_heatmap_of_a_run(run: Any, files: Any, options: list[str], words: list[str]) -> None:
    check(run("heatmap", files.run, *options), 2, *words)


def test_heatmap_of_a_model(run: Any, files: Any, tmp_path: Path) -> None:
    check(run("heatmap", files.moe), 2, "--prompt")
    check(run("heatmap", tmp_path), 2, "--prompt")
    check(run("heatmap", files.moe, "--prompt", PROMPT, "--data", files.text), 2, "not both")
    check(run("heatmap", files.moe, "--prompt", PROMPT, "--number", "1"), 2, "--number")
    check(run("heatmap", files.moe, "--data", files.text, "--number", "24"), 2, "0 to 23")


def test_heatmap_of_a_damaged_run(run: Any, files: Any, tmp_path: Path) -> None:
    damaged = tmp_path / "run"
    shutil.copytree(files.run, damaged)
    shard = next(damaged.glob("shard-*.safetensors"))
    os.truncate(shard, shard.stat().st_size - 10)
    check(run("heatmap", damaged), 1, "cut short")
    (damaged / "trace.json").write_text("{")
    check(run("heatmap", damaged), 1, "damaged")
