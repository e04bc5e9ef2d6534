"""``moe-lens heatmap``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

PROMPT = "w1 w2 w3 w4"


def test_default_views(run: Any, files: Any) -> None:
    def kind(*words: object) -> str:
        return str(run("heatmap", *words, "--json").json["kind"])

    assert kind(files.run) == "layer-expert heatmap"
    assert kind(files.run, "--number", "2") == "first-choice heatmap"
    assert kind(files.run, "--layer", "1", "--number", "2") == "token-expert heatmap"
    assert kind(files.moe, "--prompt", PROMPT) == "first-choice heatmap"
    assert kind(files.moe, "--prompt", PROMPT, "--layer", "2") == "token-expert heatmap"
    assert kind(files.moe, "--prompt", PROMPT, "--view", "layers") == "layer-expert heatmap"
    assert kind(files.moe, "--data", files.text) == "layer-expert heatmap"
    assert kind(files.moe, "--data", files.text, "--number", "1") == "first-choice heatmap"


def test_a_run_shows_what_the_model_does(run: Any, files: Any) -> None:
    recorded = run("heatmap", files.run, "--json").json
    live = run("heatmap", files.moe, "--data", files.text, "--json").json
    assert recorded["share"] == live["share"]
    of_label = run("heatmap", files.run, "--label", "odd", "--json").json
    assert of_label["num_tokens"] == 60
    assert of_label["label"] == "odd"


def test_in_the_terminal(run: Any, files: Any) -> None:
    found = run("heatmap", files.moe, "--prompt", PROMPT, "--layer", "1")
    assert found.code == 0
    rows = [line.split() for line in found.out.splitlines()]
    assert [row[:2] for row in rows if row and row[0].isdigit()] == [
        ["0", "w1"], ["1", "w2"], ["2", "w3"], ["3", "w4"],
    ]  # fmt: skip
    assert "Layer 1" in found.out
    part = run("heatmap", files.moe, "--prompt", PROMPT, "--tokens", "2:3", "--json").json
    assert part["tokens"] == ["w3"]


def test_only_used(run: Any, files: Any) -> None:
    words = ["heatmap", files.moe, "--prompt", "w1", "--layer", "1", "--json"]
    assert len(run(*words).json["experts"]) == 8
    assert len(run(*words, "--only-used").json["experts"]) == 2


def test_changed_routing(run: Any, files: Any) -> None:
    words = ["heatmap", files.moe, "--prompt", PROMPT, "--view", "layers", "--json"]
    found = run(*words, "--mask-experts", "*:3").json
    assert [share[3] for share in found["share"]] == [0.0, 0.0]
    assert found["model"].endswith("experts *:3 masked")


@pytest.mark.parametrize(
    ("ending", "begins"), [("png", b"\x89PNG"), ("svg", b"<?xml"), ("pdf", b"%PDF")]
)
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_pictures(
    run: Any, files: Any, tmp_path: Path, ending: str, begins: bytes, theme: str
) -> None:
    picture = tmp_path / f"map.{ending}"
    found = run("heatmap", files.run, "--output", picture, "--theme", theme)
    assert (found.code, found.out, found.err) == (0, f"{picture}\n", "")
    assert picture.read_bytes().startswith(begins)


def test_picture_and_json(run: Any, files: Any, tmp_path: Path) -> None:
    picture = tmp_path / "map.png"
    assert run("heatmap", files.run, "--output", picture, "--json").json["output"] == str(picture)
