"""Tiny checkpoints, texts, and ways to run the command line."""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from moe_lens.cli import main
from tiny_models import save_checkpoint
from tiny_models.sizes import HIDDEN, VOCAB

PROMPT = "w1 w2 w3 w4"


@dataclass(frozen=True)
class Files:
    """Folders and files that the tests hand to commands; nothing changes them.

    `moe` is a Qwen3-MoE of 3 layers (layer 0 is dense) with 8 experts, 2 of them per token.
    """

    moe: Path
    dense: Path
    unknown: Path
    truncated: Path
    text: Path
    other_text: Path
    empty_text: Path
    run: Path


@dataclass(frozen=True)
class Outcome:
    """What a command printed and returned."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


Run = Callable[..., Outcome]


@pytest.fixture(scope="session")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    folder = tmp_path_factory.mktemp("command-line")
    moe = save_checkpoint("qwen3_moe", folder / "moe")
    text, other, empty = (folder / f"{name}.jsonl" for name in ("text", "other", "empty"))
    _write_prompts(text, 0)
    _write_prompts(other, 50)
    empty.write_text("")
    run = folder / "run"
    assert main(["trace", str(moe), "--data", str(text), "--output", str(run), "--json"]) == 0
    return Files(
        moe=moe,
        dense=_dense(moe, folder / "dense"),
        unknown=_unknown(moe, folder / "unknown"),
        truncated=_truncated(moe, folder / "truncated"),
        text=text,
        other_text=other,
        empty_text=empty,
        run=run,
    )


def _write_prompts(path: Path, first: int) -> None:
    lines = [
        {"text": f"w{first + n} w{n % 7} w{3 * n} w9 w{n + 5}", "label": ("even", "odd")[n % 2]}
        for n in range(24)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def _dense(moe: Path, folder: Path) -> Path:
    from mlx_lm.models import llama
    from mlx_lm.utils import save_config, save_model

    shutil.copytree(moe, folder)
    config = {
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "num_hidden_layers": 1,
        "intermediate_size": HIDDEN,
        "num_attention_heads": 2,
        "rms_norm_eps": 1e-6,
        "vocab_size": VOCAB,
    }
    model = llama.Model(llama.ModelArgs.from_dict(config))
    (folder / "model.safetensors").unlink()
    save_model(folder, model, donate_model=True)
    save_config(config, folder / "config.json")
    return folder


def _unknown(moe: Path, folder: Path) -> Path:
    shutil.copytree(moe, folder)
    config = json.loads((folder / "config.json").read_text())
    config["model_type"] = "no_such_architecture"
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def _truncated(moe: Path, folder: Path) -> Path:
    shutil.copytree(moe, folder)
    weights = folder / "model.safetensors"
    os.truncate(weights, weights.stat().st_size // 2)
    return folder


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Iterator[Run]:
    """Run a command in this process, as into a pipe; what it changed globally is put back."""
    monkeypatch.delenv("COLUMNS", raising=False)
    monkeypatch.delenv("MOE_LENS_DEBUG", raising=False)
    logger = logging.getLogger("moe_lens")
    handlers, propagate = list(logger.handlers), logger.propagate

    def run_command(*words: object) -> Outcome:
        capfd.readouterr()
        code = main([str(word) for word in words])
        printed = capfd.readouterr()
        return Outcome(code, printed.out, printed.err)

    with warnings.catch_warnings():
        yield run_command
    logger.handlers[:], logger.propagate = handlers, propagate


@pytest.fixture(scope="session")
def installed() -> Run:
    """Run the installed command in a process of its own."""
    command = Path(sys.executable).with_name("moe-lens")

    def run_command(*words: object, **options: Any) -> Outcome:
        environment = os.environ | options.pop("env", {})
        environment.pop("COLUMNS", None)
        done = subprocess.run(
            [command, *map(str, words)],
            capture_output=True,
            text=True,
            env=environment,
            timeout=120,
            **options,
        )
        return Outcome(done.returncode, done.stdout, done.stderr)

    return run_command
