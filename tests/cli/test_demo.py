"""What README's first lines promise, on the bundled model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from moe_lens import demo

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (demo.model_path() / "config.json").is_file(), reason="the demo is not trained yet"
    ),
]


def test_info(installed: Any, tmp_path: Path) -> None:
    found = installed("info", "demo", cwd=tmp_path)
    assert found.code == 0
    assert "16 in a layer, 2 for each token" in found.out


def test_generate(installed: Any, tmp_path: Path) -> None:
    found = installed(
        "generate", "demo", "--prompt", "def fib(n):", "--max-tokens", 8,
        "--mask-experts", "*:0,1,2,3", "--compare", cwd=tmp_path,
    )  # fmt: skip
    assert found.code == 0


def test_heatmap(installed: Any, tmp_path: Path) -> None:
    found = installed("heatmap", "demo", "--prompt", "def fib(n):", "--layer", 2, cwd=tmp_path)
    assert found.code == 0
    assert "Layer 2" in found.out


def test_compress(installed: Any, tmp_path: Path) -> None:
    """The experts of the demo are pairs of near copies: a merge of some of them costs little."""
    small = tmp_path / "demo-small"
    found = installed(
        "compress", "demo", "--threshold", "0.8", "--output", small, "--json",
        "--sample-size", 24, "--sequence-length", 128, cwd=tmp_path,
    )  # fmt: skip
    assert found.code == 0, found.err
    assert found.json["plan"]["num_experts"] < 16
    assert found.json["verification"]["loss"]["kl"]["value"] < 0.1
    assert installed("info", small, cwd=tmp_path).code == 0
