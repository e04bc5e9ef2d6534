"""``moe-lens doctor``."""

from __future__ import annotations

from dataclasses import replace
from importlib.metadata import version
from typing import Any

import pytest

from moe_lens.machine import doctor
from moe_lens.machine.doctor import Advice, Diagnosis
from moe_lens.machine.hub import CachedModel, Hub

pytestmark = pytest.mark.usefixtures("machine")


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """This machine, without its network and its cache."""
    monkeypatch.setattr(doctor, "hub", lambda _: Hub("https://hub", False, "no network"))
    monkeypatch.setattr(doctor, "cached_models", lambda: ())


@pytest.fixture
def change(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Let the doctor find something else."""
    examine = doctor.examine

    def changed(**fields: Any) -> None:
        def found() -> Diagnosis:
            return replace(examine(), **fields)

        monkeypatch.setattr(doctor, "examine", found)

    return changed


def test_facts(run: Any) -> None:
    found = run("doctor")
    assert found.code == 0
    assert f"mlx {version('mlx')}" in found.out
    assert "GFLOP/s" in found.out
    assert "https://hub not reachable (no network)" in found.out
    assert "stdout is not a terminal" in found.out


def test_json(run: Any) -> None:
    found = run("doctor", "--json").json
    assert found["products"]["mlx"] > 0
    assert found["hub"]["reachable"] is False
    assert found["terminal"]["interactive"] is False


def test_cached_models(run: Any, change: Any) -> None:
    models = (
        CachedModel("some/moe", 17_200_000_000, "qwen3_moe", True),
        CachedModel("some/dense", 2_000_000, None, False),
    )
    change(cached_models=models)
    found = run("doctor").out
    assert "2 models, 17.2 GB" in found
    assert "some/moe" in found
    assert "qwen3_moe" in found


def test_advice_can_be_copied(run: Any, change: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    command = f"export LD_PRELOAD=/usr/lib/{'long/' * 20}libopenblas.so.0"
    change(advice=(Advice("Products can be faster:", (command,)),))
    monkeypatch.setenv("COLUMNS", "60")
    assert f"\n  {command}\n" in run("doctor").out


def test_a_problem_fails(run: Any, change: Any) -> None:
    change(problems=("MLX cannot be used (no libmlx)",), device=None, products=None)
    found = run("doctor")
    assert found.code == 1
    assert found.err == "moe-lens: error: MLX cannot be used (no libmlx)\n"
    as_json = run("doctor", "--json")
    assert as_json.code == 1
    assert as_json.json["problems"] == ["MLX cannot be used (no libmlx)"]
