"""``moe-lens info``."""

from __future__ import annotations

import json
from typing import Any


def test_facts(run: Any, files: Any) -> None:
    found = run("info", files.moe)
    assert found.code == 0
    assert "3, of which 2 have routed experts (1-2)" in found.out
    assert "8 in a layer, 2 for each token" in found.out
    assert "softmax" in found.out
    assert "shared_output: " in found.out
    assert str(files.moe) in found.out
    assert found.err == ""


def test_json(run: Any, files: Any) -> None:
    found = run("info", files.moe, "--json").json
    assert (found["num_experts"], found["experts_per_token"]) == (8, 2)
    assert found["moe_layers"] == [1, 2]
    assert found["path"] == str(files.moe)
    assert found["notes"] == []


def test_a_note_is_shown_beside_the_facts(run: Any, tmp_path: Any) -> None:
    import mlx.core as mx

    from tiny_models import save_checkpoint

    half = save_checkpoint("qwen3_moe", tmp_path / "half", dtype=mx.bfloat16)
    found = run("info", half, "--json")
    notes = found.json["notes"]  # JSON alone on stdout, whatever is said
    said = [json.loads(line) for line in found.err.splitlines()]
    assert [each["message"] for each in said if each["event"] == "note"] == notes
    if mx.default_device() == mx.cpu:
        assert "float32" in notes[0]
