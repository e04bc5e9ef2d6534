"""A model five times larger than the memory that the operating system grants is calibrated."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from moe_lens.router import ExpertRouter
from moe_lens.streaming.memory import WeightMemory
from twins import write_words

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="the limit of data is Linux's"),
]

LAYERS = 12
LIMIT = 250_000_000
"""Bytes of data beyond what Python with MLX takes; the weights are 1.2 GB."""

ACTIVATIONS = 100_000_000
"""What the batches of the test may take, beside the weights."""


def limited(*words: str | Path) -> subprocess.CompletedProcess[str]:
    here = Path(__file__).parent
    return subprocess.run(
        [sys.executable, str(here / "limited_memory.py"), *map(str, words)],
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"PYTHONPATH": str(here)},
    )


@pytest.fixture(scope="module")
def big(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("memory") / "big"
    assert limited("--generate", folder, str(LAYERS)).returncode == 0
    return folder


def test_a_model_larger_than_memory_is_calibrated_bit_for_bit(big: Path, tmp_path: Path) -> None:
    text = write_words(tmp_path / "words.jsonl", 12, 0, words=100)
    bytes_of = WeightMemory.of(ExpertRouter.from_pretrained(big, stream=True).model)
    assert bytes_of.total > 4 * LIMIT
    streamed, whole = tmp_path / "streamed.safetensors", tmp_path / "whole.safetensors"
    found = limited(big, text, streamed, "--stream", "--limit", str(LIMIT))
    assert found.returncode == 0, found.stderr
    told = json.loads(found.stdout)
    assert told["peak"] < bytes_of.streamed + ACTIVATIONS
    assert f"at most {bytes_of.streamed / 1e9:.2f} GB" in told["notes"][0]
    # The limit is a limit: the same model cannot be held whole under it.
    refused = limited(big, text, whole, "--limit", str(LIMIT))
    assert refused.returncode == 1, refused.stdout
    assert "cannot be read" in refused.stderr
    assert not whole.exists()
    assert limited(big, text, whole).returncode == 0
    assert streamed.read_bytes() == whole.read_bytes()


def test_a_model_larger_than_memory_is_compressed_and_verified(big: Path, tmp_path: Path) -> None:
    text = write_words(tmp_path / "words.jsonl", 8, 0, words=60)
    held = write_words(tmp_path / "held.jsonl", 4, 1, words=40)
    asked = ["--ratio", "0.5", "--method", "reap", "--data", text, "--eval-data", held]
    outputs = tmp_path / "streamed", tmp_path / "whole"
    for output, limit, how in zip(
        outputs, (LIMIT, 100 * LIMIT), ("--stream", "--no-stream"), strict=True
    ):
        found = limited("--compress", str(limit), big, *asked, "--output", output, how)
        assert found.returncode == 0, found.stderr
    names = {file.name for file in outputs[0].iterdir() if file.is_file()}
    assert names == {file.name for file in outputs[1].iterdir() if file.is_file()}
    for name in names - {"report.json", "README.md"}:  # these hold speeds
        assert (outputs[0] / name).read_bytes() == (outputs[1] / name).read_bytes(), name
    losses = [json.loads((each / "report.json").read_text())["verification"] for each in outputs]
    assert losses[0]["loss"] == losses[1]["loss"]
    assert losses[0]["memory"] is None
    assert losses[1]["memory"]["before"] > 4 * LIMIT
