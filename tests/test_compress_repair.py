"""Training the router rows of a smaller model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from moe_lens.compress import compress, read_plan, write
from moe_lens.compress.choice.simulate import simulated
from moe_lens.compress.choice.trials import TrialBench
from moe_lens.compress.plan.router_row import RouterRow
from moe_lens.compress.repair.router_repair import repair_router
from moe_lens.compress.repair.router_training import (
    batches,
    check_trainable,
    router_loss,
    train,
    trained_rows,
)
from moe_lens.compress.tensors.parent import open_parent
from moe_lens.compress.tensors.size_table import SizeTable
from moe_lens.compress.verification.losses import compare
from moe_lens.errors import UnsupportedModelError, UsageError
from moe_lens.router import ExpertRouter
from tiny_models import save_checkpoint
from twins import kept_per_layer, prune_plan, save_twins, write_words

VOCABULARY = 100


def words(seed: int, prompts: int = 6, length: int = 24) -> list[list[int]]:
    return np.random.default_rng(seed).integers(1, VOCABULARY, (prompts, length)).tolist()


def bench_of(source: Path, seed: int = 9) -> TrialBench:
    router = ExpertRouter.from_pretrained(source)
    return TrialBench(router, words(seed), SizeTable.of(open_parent(source)))


@pytest.fixture(scope="module")
def twins(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_twins(tmp_path_factory.mktemp("repair") / "twins")


def test_gradients_of_the_router_are_those_of_differences(twins: Path) -> None:
    """A central difference of the loss along the gradient gives the gradient's length."""
    from moe_lens.compress.verification.losses import log_softmax

    bench = bench_of(twins)
    plan = prune_plan(bench.router, kept_per_layer(bench.router, 8))
    child = bench.build(plan)
    ids = mx.array(words(1, 1, 12))
    counted = mx.ones(ids.shape)
    target = log_softmax(bench.router.forward(ids))
    router = child.layers[-1].router
    child.model.freeze()
    router.unfreeze(keys=["weight"], recurse=False)
    _, gradients = nn.value_and_grad(child.model, router_loss)(child.model, ids, counted, target)
    found = np.array(dict(tree_flatten(gradients))[f"{child.layers[-1].path}.gate.weight"])
    weight, size = np.array(router.weight), float(np.linalg.norm(found))
    direction, step = found / size, 0.003 * np.linalg.norm(weight)
    losses = []
    for sign in (1, -1):
        router.weight = mx.array(weight + sign * step * direction)
        losses.append(float(router_loss(child.model, ids, counted, target)))
    assert (losses[0] - losses[1]) / (2 * step) == pytest.approx(size, rel=0.05)


def test_only_router_rows_are_trained_and_the_loss_falls(twins: Path) -> None:
    bench = bench_of(twins)
    child = bench.build(prune_plan(bench.router, kept_per_layer(bench.router, 8)))
    before = {name: np.array(value) for name, value in tree_flatten(child.model.parameters())}
    losses = train(bench.router.forward, child, words(1), steps=24)
    assert np.mean(losses[-6:]) < 0.95 * np.mean(losses[:6])
    changed = {
        name
        for name, value in tree_flatten(child.model.parameters())
        if not np.array_equal(before[name], np.array(value))
    }
    assert changed == {f"{layer.path}.gate.weight" for layer in child.layers}


@pytest.mark.parametrize("quantise", [None, 4])
def test_the_rows_that_were_measured_are_those_written(
    quantise: int | None, tmp_path: Path
) -> None:
    source = save_checkpoint("qwen3_moe", tmp_path / "source", quantise, experts=16)
    bench = bench_of(source)
    plan = prune_plan(bench.router, kept_per_layer(bench.router, 8))
    done: list[int] = []
    made = repair_router(
        bench, plan, words(9), steps=12, progress=lambda step, steps: done.append(step)
    )
    # Trained on the validation text itself, so that it must help here.
    evidence = made.evidence["router_repair"]
    assert evidence["kept"]
    assert evidence["kl_after"]["value"] < evidence["kl_before"]["value"]
    assert done == list(range(1, 13))
    folder = write(made, source, tmp_path / "small")
    again = read_plan(folder / "plan.json")
    assert again == made
    written = ExpertRouter.from_pretrained(folder)
    found = compare(bench.router.forwards, [written.forwards], words(9), VOCABULARY)[0]
    assert found.kl.mean() == pytest.approx(evidence["kl_after"]["value"], rel=1e-3)
    router: Any = written.layers[0].router
    parent: Any = bench.router.layers[0].router
    assert type(router) is type(parent)
    assert getattr(router, "bits", None) == getattr(parent, "bits", None)
    with pytest.raises(UsageError, match="router rows of its own"), simulated(bench.router, made):
        pass


def test_rows_that_do_not_help_are_dropped(twins: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Trained towards another model, the rows are worse on the validation text."""
    bench = bench_of(twins)
    plan = prune_plan(bench.router, kept_per_layer(bench.router, 8))

    def damage(parent: Any, child: ExpertRouter, *args: Any, **options: Any) -> None:
        for layer in child.layers:
            layer.router.weight = -layer.router.weight

    monkeypatch.setattr("moe_lens.compress.repair.router_repair.train", damage)
    made = repair_router(bench, plan, words(1), steps=1)
    evidence = made.evidence["router_repair"]
    assert not evidence["kept"]
    assert "the rows stay as they were" in evidence["text"]
    assert made.layers == plan.layers


def test_a_correction_bias_and_identity_experts_stay(tmp_path: Path) -> None:
    source = save_checkpoint("longcat_flash", tmp_path / "source", experts=16)
    bench = bench_of(source)
    plan = prune_plan(bench.router, kept_per_layer(bench.router, 8))
    child = bench.build(plan)
    layer = child.layers[0]
    assert layer.zero_experts
    before = np.array(layer.router.weight)
    train(bench.router.forward, child, words(1), steps=3)
    after = np.array(layer.router.weight)
    np.testing.assert_array_equal(before[8:], after[8:])
    assert not np.array_equal(before[:8], after[:8])
    assert len(trained_rows(layer)) == 8
    kept = replace(plan.layers[0].groups[0], router_row=RouterRow.of(before[0], None, 0.25))
    layers = (replace(plan.layers[0], groups=(kept, *plan.layers[0].groups[1:])), *plan.layers[1:])
    made = repair_router(bench, replace(plan, layers=layers), words(9), steps=4)
    row = made.layers[0].groups[0].router_row
    assert isinstance(row, RouterRow)
    assert row.selection_bias == 0.25


def test_without_gradients_it_is_refused_before_anything_else(tmp_path: Path) -> None:
    source = save_checkpoint("deepseek_v41", tmp_path / "source", 4)
    router = ExpertRouter.from_pretrained(source)
    before = dict(router.model.named_modules())
    with pytest.raises(UnsupportedModelError, match=r"no gradients.*VJP.*--repair-router"):
        check_trainable(router)
    assert dict(router.model.named_modules()) == before
    plan = prune_plan(router, kept_per_layer(router, router.info.num_experts // 2))
    with pytest.raises(UnsupportedModelError, match="no gradients"):
        repair_router(bench_of(source), plan, words(1), steps=1)
    stages: list[str] = []
    with pytest.raises(UnsupportedModelError, match="no gradients"):
        compress(
            source,
            ratio=0.5,
            repair_router=1,
            calibration=write_words(tmp_path / "learn.jsonl", 6, 1, words=8),
            evaluation=write_words(tmp_path / "test.jsonl", 2, 2, words=8),
            dry_run=True,
            progress=lambda stage, done, total: stages.append(str(stage)),
        )
    assert set(stages) == {"loading"}


def test_a_model_that_can_be_trained_stays_as_it_was(tmp_path: Path) -> None:
    source = save_checkpoint("qwen3_moe", tmp_path / "source", 4)
    router = ExpertRouter.from_pretrained(source)
    before, modules = router.forward([[1, 2, 3]]), dict(router.model.named_modules())
    mx.eval(before)
    check_trainable(router)
    assert all(module is modules[name] for name, module in router.model.named_modules())
    assert mx.array_equal(router.forward([[1, 2, 3]]), before)


def test_a_loss_that_does_not_reach_the_router_is_refused(
    twins: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "moe_lens.compress.repair.router_training.router_loss",
        lambda model, ids, counted, target: mx.stop_gradient(model(ids)).sum(),
    )
    with pytest.raises(UnsupportedModelError, match="every gradient is 0"):
        check_trainable(ExpertRouter.from_pretrained(twins))


def test_batches_hold_every_prompt_once_before_any_twice() -> None:
    tokens = [[n] * (n + 2) for n in range(1, 40)] + [[7], []]
    drawn, seen = batches(tokens, 100, 0), []
    while len(seen) < 39:
        ids, lengths = next(drawn)
        assert ids.size <= 1024
        seen += [int(row[0]) for row in ids]
        assert [len(set(row[:size])) for row, size in zip(ids, lengths, strict=True)] == [1] * len(
            ids
        )
    assert sorted(seen[:39]) == sorted(range(1, 40))
    with pytest.raises(UsageError, match="two tokens"):
        next(batches([[1], []], 100, 0))


def test_the_whole_way(twins: Path, tmp_path: Path) -> None:
    learn = write_words(tmp_path / "learn.jsonl", 18, 1, words=16)
    test = write_words(tmp_path / "test.jsonl", 6, 2, words=16)
    options: dict[str, Any] = {"ratio": 0.5, "method": "reap", "repair_router": 4}
    said: list[str] = []
    found = compress(
        twins,
        output=tmp_path / "small",
        calibration=learn,
        evaluation=test,
        say=said.append,
        **options,
    )
    evidence = found.plan.evidence["router_repair"]
    assert evidence["text"] in said
    card = (tmp_path / "small" / "README.md").read_text()
    assert evidence["text"][1:] in card
    again = compress(twins, calibration=learn, evaluation=test, dry_run=True, **options)
    assert again.plan == found.plan
