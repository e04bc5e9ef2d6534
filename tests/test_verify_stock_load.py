"""What stands on disk must be what is measured: every child goes through stock mlx_lm.load."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from moe_lens.compress import Plan, verify, write
from moe_lens.compress.checkpoint.in_memory import in_memory
from moe_lens.compress.verification.stock_load import check_stock_load
from moe_lens.corpus import Corpus, read_corpus
from moe_lens.errors import MoeLensError, UsageError
from moe_lens.router import ExpertRouter
from tiny_models import save_checkpoint
from twins import prepared, write_words


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Plan, Corpus]:
    """The parent, a plan, and text; the plan is applied at `child` beside the parent."""
    folder = tmp_path_factory.mktemp("stock")
    source, plan = prepared(folder)
    write(plan, source, folder / "child")
    return source, plan, read_corpus(write_words(folder / "words.jsonl", 2, 5))


def copy(place: tuple[Path, Plan, Corpus], folder: Path) -> Path:
    shutil.copytree(place[0].parent / "child", folder)
    return folder


def test_the_plan_applied_in_memory_is_what_is_on_disk(place: tuple[Path, Plan, Corpus]) -> None:
    source, plan, corpus = place
    parent, child = ExpertRouter.from_pretrained(source), source.parent / "child"
    live = in_memory(parent, plan)
    found = verify(parent, child, corpus, live=lambda tokens: live.forward([tokens]))
    assert found.stock_load is not None
    assert found.stock_load.largest_difference == 0.0
    assert found.stock_load.largest_logit > 0.0
    assert found.stock_load.tokens == 40
    assert found.stock_load.against == "the plan applied in memory"
    assert verify(parent, live, corpus).stock_load is None


def test_weights_that_are_not_the_plans_are_an_error(
    place: tuple[Path, Plan, Corpus], tmp_path: Path
) -> None:
    source, plan, corpus = place
    child = copy(place, tmp_path / "child")
    weights = dict(mx.load(str(child / "model.safetensors")))
    name = next(name for name in weights if "switch_mlp.down_proj" in name)
    weights[name] = weights[name][::-1]
    mx.save_safetensors(str(child / "model.safetensors"), weights, {"format": "mlx"})
    parent = ExpertRouter.from_pretrained(source)
    with pytest.raises(MoeLensError, match="does not give the logits of the plan applied"):
        verify(parent, child, corpus, live=lambda t: in_memory(parent, plan).forward([t]))


def test_a_model_that_was_changed_in_memory_is_not_its_folder(
    place: tuple[Path, Plan, Corpus],
) -> None:
    source, _, corpus = place
    child = ExpertRouter.from_pretrained(source.parent / "child")
    gate = child.layers[0].block.gate
    gate.weight = -gate.weight
    with pytest.raises(MoeLensError, match="does not give the logits of the model that is"):
        verify(source, child, corpus)


@pytest.mark.parametrize(
    ("fault", "message"),
    [("cut", "truncated"), ("config", "stock mlx_lm.load cannot use child"), ("gone", "no ")],
)
def test_a_folder_that_does_not_load(
    fault: str, message: str, place: tuple[Path, Plan, Corpus], tmp_path: Path
) -> None:
    source, _, corpus = place
    child = copy(place, tmp_path / "child")
    weights = child / "model.safetensors"
    if fault == "cut":
        os.truncate(weights, weights.stat().st_size // 2)
    elif fault == "config":
        config = json.loads((child / "config.json").read_text())
        (child / "config.json").write_text(json.dumps(config | {"num_experts": 7}))
    else:
        shutil.rmtree(child)
    with pytest.raises(MoeLensError, match=message):
        verify(source, child, corpus)


def test_half_precision_is_compared_in_float32(
    place: tuple[Path, Plan, Corpus], tmp_path: Path
) -> None:
    source = save_checkpoint("qwen3_moe", tmp_path / "half", dtype=mx.bfloat16)
    found = verify(source, source, place[2])
    assert found.stock_load is not None
    assert found.stock_load.largest_difference == 0.0
    assert found.loss.kl.value == 0.0
    assert found.use.memory.weights_before == 2 * found.size_before.bytes
    if mx.default_device() == mx.cpu:
        assert found.device == "CPU in float32, experts by segment"


def test_logits_that_are_ruled_out_must_be_so_in_both() -> None:
    stock = np.array([[1.0, -np.inf, 3.0]], np.float32)
    same = check_stock_load(stock, stock.copy(), "a")
    assert (same.largest_difference, same.largest_logit, same.tokens) == (0.0, 3.0, 1)
    close = stock + np.float32(2e-4)
    assert check_stock_load(stock, close, "a").largest_difference == pytest.approx(2e-4, rel=1e-2)
    for other in (stock + np.float32(1e-3), np.nan_to_num(stock, neginf=0.0), stock * np.nan):
        with pytest.raises(MoeLensError, match="write it again"):
            check_stock_load(stock, other, "a")
    with pytest.raises(MoeLensError, match="shape"):
        check_stock_load(stock, stock[:, :2], "a")


def test_another_tokenizer_is_refused(place: tuple[Path, Plan, Corpus], tmp_path: Path) -> None:
    source, _, corpus = place
    child = copy(place, tmp_path / "child")
    text = (child / "tokenizer.json").read_text()
    tokenizer = json.loads(text)
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["w3"], vocabulary["w4"] = vocabulary["w4"], vocabulary["w3"]
    (child / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(UsageError, match="2 tokens of the first are missing or numbered"):
        verify(source, child, corpus)


def test_a_tokenizer_that_splits_otherwise_is_refused(
    place: tuple[Path, Plan, Corpus], tmp_path: Path
) -> None:
    source, _, corpus = place
    child = copy(place, tmp_path / "child")
    tokenizer = json.loads((child / "tokenizer.json").read_text())
    tokenizer["normalizer"] = {"type": "Replace", "pattern": {"String": "w1"}, "content": "w2"}
    (child / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(UsageError, match=r"read prompt 1 of .*words\.jsonl differently"):
        verify(source, child, corpus)
