"""The whole way: a model in, a smaller one out, on a model whose right compression is known."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm import generate
from mlx_lm.utils import load

from moe_lens import demo
from moe_lens.compress import (
    CompressionResult,
    NothingToMergeError,
    compress,
    read_plan,
    write,
)
from moe_lens.compress.verification.losses import compare
from moe_lens.corpus import read_corpus
from moe_lens.errors import UnsupportedModelError, UsageError
from moe_lens.router import ExpertRouter
from tiny_models import save_checkpoint
from twins import save_twins, write_words

TWINS = [[e, e + 8] for e in range(8)]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the twins and two texts."""
    folder = tmp_path_factory.mktemp("compress")
    save_twins(folder / "twins")
    write_words(folder / "learn.jsonl", 48, 1)
    write_words(folder / "test.jsonl", 24, 2)
    return folder


def run(place: Path, output: Path | None, **options: Any) -> CompressionResult:
    texts = {"calibration": place / "learn.jsonl", "evaluation": place / "test.jsonl"}
    return compress(place / "twins", output=output, **{**texts, **options})


@pytest.fixture(scope="module")
def merged(place: Path) -> CompressionResult:
    return run(place, place / "merged", threshold=0.8)


def test_the_groups_found_are_the_pairs_that_were_copied(merged: CompressionResult) -> None:
    assert merged.plan.num_experts == 8
    for layer in merged.plan.layers:
        assert [list(group.experts) for group in layer.groups] == TWINS
        for group in layer.groups:
            assert group.similarity is not None
            assert group.similarity >= 0.8
            assert min(group.weights) > 0.4


def test_half_as_many_experts_per_token_cost_less(merged: CompressionResult) -> None:
    assert merged.plan.experts_per_token == 1
    found = merged.plan.evidence["experts_per_token"]
    assert found["kl_by_k"]["1"] < found["kl_by_k"]["2"] / 5
    assert 1.0 <= found["distinct_groups_per_token"] < 1.2
    assert "1 is used" in found["text"]


def test_merging_copies_is_nearly_free(merged: CompressionResult) -> None:
    assert merged.verification is not None
    assert merged.verification.loss.kl.value < 1e-3
    assert merged.verification.loss.top1_agreement.value > 0.95
    assert merged.warnings == ()
    size = merged.verification
    assert size.size_after.bytes < 0.6 * size.size_before.bytes


def test_stock_mlx_lm_runs_it(merged: CompressionResult) -> None:
    model, tokenizer = load(str(merged.output))
    assert isinstance(generate(model, tokenizer, "w1 w2 w3", max_tokens=4), str)


def test_what_was_measured_is_in_the_folder(merged: CompressionResult) -> None:
    assert merged.output is not None
    assert merged.verification is not None
    stored = json.loads((merged.output / "report.json").read_text())
    assert stored["verification"] == json.loads(merged.verification.to_json())
    assert read_plan(merged.output / "plan.json") == merged.plan
    card = (merged.output / "README.md").read_text()
    assert f"{merged.verification.loss.perplexity_before}" in card
    assert "| 1 | 8 | 16 -> 8 | 0+8 1+9" in card
    assert "16 -> 8 experts in each of 2 layers (50% merged), 2 -> 1 experts per token" in card
    assert str(merged.output.parent) not in card + (merged.output / "plan.json").read_text()


def test_the_loss_of_the_plan_is_that_of_the_written_model(
    merged: CompressionResult, place: Path
) -> None:
    smaller = ExpertRouter.from_pretrained(str(merged.output))
    tokens = read_corpus(place / "learn.jsonl").tokenize(smaller.tokenizer, 512)
    loss = compare(smaller.forwards, [smaller.forwards], tokens, 128)[0].nll_after.mean()
    stored = merged.plan.evidence["experts_per_token"]["nll_by_k"]["1"]
    assert loss == pytest.approx(stored, abs=1e-5)


def test_the_plan_applied_again_gives_the_same_bytes(
    merged: CompressionResult, place: Path, tmp_path: Path
) -> None:
    assert merged.output is not None
    again = write(merged.output / "plan.json", place / "twins", tmp_path / "again")
    for name in ("model.safetensors", "config.json", "model.safetensors.index.json", "plan.json"):
        assert (again / name).read_bytes() == (merged.output / name).read_bytes()


def test_the_same_call_gives_the_same_model(
    merged: CompressionResult, place: Path, tmp_path: Path
) -> None:
    again = run(place, tmp_path / "again", threshold=0.8)
    assert again.plan == merged.plan
    assert again.verification is not None
    assert merged.verification is not None
    assert again.verification.loss == merged.verification.loss


def test_a_dry_run_writes_nothing(place: Path, tmp_path: Path, merged: CompressionResult) -> None:
    found = run(place, tmp_path / "smaller", threshold=0.8, dry_run=True)
    assert (found.output, found.verification) == (None, None)
    assert found.plan == merged.plan
    assert list(tmp_path.iterdir()) == []
    assert json.loads(found.to_json())["verification"] is None
    assert "0+8" in found._repr_html_()
    assert found.definition.startswith("similarity(i, j)")


def test_nothing_to_merge_writes_nothing(place: Path, tmp_path: Path) -> None:
    with pytest.raises(NothingToMergeError, match="would save 25% of the experts: --threshold 0"):
        run(place, tmp_path / "smaller", threshold=1.0)
    assert list(tmp_path.iterdir()) == []


def test_forced_experts_per_token(place: Path) -> None:
    found = run(place, None, threshold=0.8, experts_per_token=2, dry_run=True)
    assert found.plan.experts_per_token == 2
    assert "experts_per_token" not in found.plan.evidence


@pytest.mark.parametrize("method", ["reap", "frequency"])
def test_removing_by_ratio(method: str, place: Path, tmp_path: Path) -> None:
    stages: list[str] = []
    found = run(
        place,
        tmp_path / "smaller",
        ratio=0.25,
        method=method,
        progress=lambda stage, done, total: stages.append(str(stage)),
    )
    assert found.plan.num_experts == 12
    assert found.plan.experts_per_token == 2
    assert found.verification is not None
    assert found.verification.loss.kl.value > 0
    assert list(dict.fromkeys(stages)) == [
        "loading",
        "calibrating",
        "planning",
        "writing",
        "verifying",
        "reporting",
    ]
    model, _ = load(str(found.output))
    assert model.args.num_experts == 12
    assert found.definition.startswith(found.plan.definition)


def test_removing_equals_masking(place: Path, tmp_path: Path) -> None:
    found = run(place, tmp_path / "smaller", ratio=0.5, method="reap")
    from moe_lens.override import Override

    masks = {layer.layer: Override(mask=layer.removed) for layer in found.plan.layers}
    router = ExpertRouter.from_pretrained(place / "twins")
    tokens = [[1, 2, 3, 50, 60]]
    with router.override(masks):
        masked = np.array(router.forward(tokens))
    model, _ = load(str(found.output))
    np.testing.assert_allclose(np.array(model(mx.array(tokens))), masked, atol=1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "say how small"),
        ({"threshold": 0.8, "ratio": 0.5}, "either a threshold"),
        ({"threshold": 0.0}, "above 0 and at most 1"),
        ({"threshold": 1.5}, "above 0 and at most 1"),
        ({"ratio": 1.0}, "between 0 and 1"),
        ({"ratio": float("nan")}, "between 0 and 1"),
        ({"ratio": 0.5, "method": "magic"}, "no method 'magic'"),
        ({"ratio": 0.95, "method": "reap"}, "fewer experts"),
        ({"ratio": 0.5, "method": "reap", "experts_per_token": 9}, "could use at most 8, but 9"),
        ({"ratio": 0.5, "evaluation": "learn.jsonl"}, "the text that calibrates"),
        ({"ratio": 0.5, "sample_size": 0}, "must be at least 1"),
        ({"ratio": 0.5, "output": "twins"}, "the model that is read"),
        ({"ratio": 0.5, "output": "learn.jsonl"}, "no plain folder"),
        ({"ratio": 0.5, "output": None}, "output folder"),
    ],
)
def test_what_cannot_be_is_refused(options: dict[str, Any], message: str, place: Path) -> None:
    before = sorted(path.name for path in place.iterdir())
    output = options.pop("output", "smaller")
    if "evaluation" in options:
        options["evaluation"] = place / options["evaluation"]
    with pytest.raises(UsageError, match=message):
        run(place, None if output is None else place / output, **options)
    assert sorted(path.name for path in place.iterdir()) == before


def test_a_dense_model_is_refused(tmp_path: Path) -> None:
    source = save_checkpoint("qwen3_moe", tmp_path / "dense")
    config = json.loads((source / "config.json").read_text())
    config |= {"mlp_only_layers": [0, 1, 2]}
    (source / "config.json").write_text(json.dumps(config))
    weights = mx.load(str(source / "model.safetensors"))
    plain = {}
    for name, value in weights.items():
        if ".mlp.switch_mlp." in name:
            width = 96 if "down" not in name else 64
            plain[name.replace("switch_mlp.", "")] = mx.zeros((width, 160 - width))
        elif ".mlp.gate.weight" not in name:
            plain[name] = value
    (source / "model.safetensors.index.json").unlink()
    mx.save_safetensors(str(source / "model.safetensors"), plain)
    with pytest.raises(UnsupportedModelError, match="dense"):
        compress(source, ratio=0.5, output=tmp_path / "smaller")
    assert not (tmp_path / "smaller").exists()


def test_unreached_experts_and_bundled_text_are_said(place: Path, tmp_path: Path) -> None:
    said: list[str] = []
    write_words(tmp_path / "one.jsonl", 1, 3, words=3)
    found = run(
        place,
        None,
        ratio=0.25,
        method="reap",
        calibration=tmp_path / "one.jsonl",
        dry_run=True,
        say=said.append,
    )
    assert any("chosen by no calibration token" in note for note in found.notes)
    assert said == list(found.notes)
    for layer in found.plan.layers:
        assert layer.saliency is not None
        assert all(layer.saliency[expert] is None for expert in layer.removed)


def test_an_interrupted_verification_leaves_no_model_and_is_gone_on_with(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("moe_lens.compress.making.verify", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(place, tmp_path / "smaller", ratio=0.5, method="reap")
    assert [path.name for path in tmp_path.iterdir()] == [".smaller.work"]
    stages: list[str] = []
    found = run(
        place,
        tmp_path / "smaller",
        ratio=0.5,
        method="reap",
        resume=True,
        progress=lambda stage, done, total: stages.append(stage.name),
    )
    assert found.verification is not None
    assert "calibrating" not in stages
    assert "goes on with what an earlier run has done (calibrated, planned, weight files: 1)" in (
        found.notes
    )
    assert [path.name for path in tmp_path.iterdir()] == ["smaller"]


@pytest.mark.slow
def test_the_pairs_of_the_bundled_model_are_found() -> None:
    """Its training split 8 experts into pairs of near copies, and says which."""
    known = json.loads((demo.model_path() / "upcycling.json").read_text())["pairs"]
    found = compress("demo", threshold=0.8, dry_run=True, sample_size=24)
    assert found.plan.experts_per_token == 1
    for layer in found.plan.layers:
        pairs = sorted(sorted(pair) for pair in known[str(layer.layer)])
        assert [list(group.experts) for group in layer.groups] == pairs
    assert found.notes[0] == "calibration and evaluation on the text that comes with moe-lens"
