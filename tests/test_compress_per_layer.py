"""Layers that keep different numbers of experts: the plan, the budget, the file, the way back."""

from __future__ import annotations

import ast
import itertools
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
from mlx_lm.utils import load_model

from moe_lens.compress import (
    Plan,
    compress,
    in_memory,
    read_plan,
    simulated,
    verify,
    write,
)
from moe_lens.compress.checkpoint import unequal_layers
from moe_lens.compress.choice.layer_allocation import allocate, curve
from moe_lens.compress.choice.layer_budget import measured_counts
from moe_lens.compress.tensors.parent import open_parent
from moe_lens.compress.tensors.size_table import SizeTable
from moe_lens.corpus import read_corpus
from moe_lens.errors import UnsupportedModelError, UsageError
from moe_lens.families import find_moe_layers
from moe_lens.router import ExpertRouter
from test_compress_families import (
    NO_TOKENIZER,
    NOT_IN_4_BIT,
    ROUNDS_ITS_OUTPUT,
    open_router,
    write_smaller,
)
from tiny_models import CONFIGS, save_checkpoint
from twins import kept_per_layer, prune_plan, save_twins, write_words

TOKENS = mx.array([[1, 5, 9, 3, 7, 2, 8, 4, 6, 11] * 4, [3] * 20 + [9, 1] * 10])

FAMILIES = ("qwen3_moe", "deepseek_v3", "dbrx", "gemma4", "longcat_flash", "gpt_oss", "nemotron_h")
"""Softmax and sigmoid, groups, a list of experts, a router beside its experts, identity experts."""


def unequal_plan(router: ExpertRouter) -> Plan:
    """8 and 12 of 16 experts in turn, other ones in every layer."""
    few, many = kept_per_layer(router, 8), kept_per_layer(router, 12)
    kept = {layer: (few if n % 2 else many)[layer] for n, layer in enumerate(few)}
    return replace(prune_plan(router, kept), num_experts=12, per_layer=True)


def stock_load(name: str, folder: Path) -> Any:
    if name in NO_TOKENIZER:
        return load_model(folder, trust_remote_code=True)[0]
    return mlx_lm.load(str(folder), trust_remote_code=True)[0]


def check_family(name: str, folder: Path, quantise: int | None) -> None:
    source = save_checkpoint(name, folder / "source", quantise, experts=16)
    router = open_router(name, source)
    plan = unequal_plan(router)
    with simulated(router, plan):
        masked = np.array(router.forward(TOKENS))
    smaller = write_smaller(name, plan, source, folder / "smaller")
    model = stock_load(name, smaller)
    assert {each.index: each.num_experts for each in find_moe_layers(model)} == plan.counts
    assert sorted(set(plan.counts.values())) == [8, 12]
    assert not type(model).__module__.startswith("moe_lens")  # mlx-lm's own class
    tolerance = 2**-8 if name in ROUNDS_ITS_OUTPUT else 1e-5
    np.testing.assert_allclose(
        np.array(model(TOKENS)), masked, atol=tolerance * np.abs(masked).max(), rtol=0
    )


@pytest.mark.parametrize("quantise", [None, 4])
@pytest.mark.parametrize("name", FAMILIES)
def test_the_reloaded_model_equals_the_masked_parent(
    name: str, quantise: int | None, tmp_path: Path
) -> None:
    check_family(name, tmp_path, quantise)


@pytest.mark.slow
@pytest.mark.parametrize("quantise", [None, 4])
@pytest.mark.parametrize("name", [name for name in CONFIGS if name not in FAMILIES])
def test_every_family_reloads(name: str, quantise: int | None, tmp_path: Path) -> None:
    if quantise is not None and name in NOT_IN_4_BIT:
        pytest.skip("the CPU cannot multiply its half-precision experts")
    check_family(name, tmp_path, quantise)


@pytest.fixture(scope="module")
def twins(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("per_layer")
    save_twins(folder / "twins")
    write_words(folder / "learn.jsonl", 24, 1, words=12)
    write_words(folder / "test.jsonl", 8, 2, words=12)
    return folder


@pytest.fixture(scope="module")
def router(twins: Path) -> ExpertRouter:
    return ExpertRouter.from_pretrained(twins / "twins")


@pytest.fixture(scope="module")
def written(twins: Path, router: ExpertRouter) -> Path:
    return write(unequal_plan(router), twins / "twins", twins / "unequal")


def test_the_folder_says_what_it_is(written: Path) -> None:
    config = json.loads((written / "config.json").read_text())
    assert config["model_file"] == "unequal_layers.py"
    assert config["num_experts"] == 12
    said = config["unequal_experts"]
    assert sorted(said["blocks"].values()) == [8, 12]
    assert said["keys"] == [["num_experts"]]
    assert "trust_remote_code=True" in (written / "README.md").read_text()
    plan = read_plan(written / "plan.json")
    assert plan.per_layer
    assert "8 to 12 experts" in plan.summary()


def test_the_model_file_is_fixed_text_that_reads_the_config_only(written: Path) -> None:
    text = (written / "unequal_layers.py").read_bytes()
    assert text == Path(unequal_layers.__file__).read_bytes()
    tree = ast.parse(text)
    imports = {
        name
        for node in ast.walk(tree)
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in ([node.module] if isinstance(node, ast.ImportFrom) else [node.names[0].name])
    }
    assert imports == {"__future__", "copy", "typing", "mlx_lm.utils"}
    names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    assert not names & {"eval", "exec", "open", "compile", "__import__"}


def test_nobody_loads_it_without_trust(written: Path) -> None:
    with pytest.raises(ValueError, match="trust_remote_code"):
        mlx_lm.load(str(written))
    with pytest.raises(UnsupportedModelError, match="--trust-remote-code"):
        ExpertRouter.from_pretrained(written)
    child = ExpertRouter.from_pretrained(written, trust_remote_code=True)
    assert [layer.num_experts for layer in child.layers] == [12, 8]
    with child.capture("expert_ids") as seen:
        child.forward(TOKENS)
    for layer in child.layers:
        assert int(seen[layer.index].expert_ids.max()) < layer.num_experts


def test_in_memory_it_is_the_written_one(router: ExpertRouter, written: Path) -> None:
    expected = ExpertRouter.from_pretrained(written, trust_remote_code=True).forward(TOKENS)
    made = in_memory(router, unequal_plan(router))
    assert mx.array_equal(made.forward(TOKENS), expected)


def test_verify_follows_the_experts(router: ExpertRouter, written: Path, twins: Path) -> None:
    text = read_corpus(twins / "test.jsonl")
    found = verify(router, written, text, trust_remote_code=True)
    assert found.stock_load is not None
    assert found.drift.to_dict()["layers"]
    assert found.size_after.bytes < found.size_before.bytes


def test_the_size_table_counts_unequal_layers(written: Path, twins: Path) -> None:
    table = SizeTable.of(open_parent(twins / "twins"))
    named = json.loads((written / "model.safetensors.index.json").read_text())
    plan = read_plan(written / "plan.json")
    head = table.of_counts(plan.counts) - named["metadata"]["total_size"]
    equal = dict.fromkeys(plan.counts, 16)
    whole = open_parent(twins / "twins").size.bytes
    assert head == table.of_counts(equal) - whole
    assert 0 < head < 20_000


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"per_layer": None}, r"layer 2 of the plan keeps 8 experts.*per_layer"),
        ({"per_layer": "yes"}, "must be true or false"),
        ({"num_experts": 16}, "layer 1 of the plan keeps 12 experts, the most"),
        ({"experts_per_token": 9}, "layer 2 would keep 8 of its experts"),
    ],
)
def test_a_plan_that_does_not_add_up_is_refused(
    written: Path, change: Mapping[str, Any], message: str
) -> None:
    content = json.loads((written / "plan.json").read_text())
    content.update(change)
    content = {key: value for key, value in content.items() if value is not None}
    with pytest.raises(UsageError, match=message):
        read_plan(content)


def test_equal_layers_need_no_file(router: ExpertRouter) -> None:
    plan = replace(prune_plan(router, kept_per_layer(router, 8)), per_layer=True)
    with pytest.raises(UsageError, match='take "per_layer" out'):
        read_plan(plan.to_dict())


def test_a_layer_with_too_few_experts_is_named(tmp_path: Path) -> None:
    router = ExpertRouter.from_pretrained(save_checkpoint("jamba", tmp_path, experts=16))
    kept = {layer.index: [0, 1, 2] if n else [0] for n, layer in enumerate(router.layers)}
    first = router.layers[0].index
    plan = replace(prune_plan(router, kept), num_experts=3, per_layer=True, experts_per_token=1)
    with pytest.raises(UsageError, match=f"layer {first} of the plan keeps 1 experts.*at least 2"):
        read_plan(plan.to_dict())


def test_the_allocation_is_the_best_of_all() -> None:
    draw = np.random.default_rng(0)
    counts = [2, 3, 4, 5, 6]
    for _ in range(40):
        losses = {n: np.sort(draw.random(5))[::-1] for n in range(3)}
        size = {n: int(draw.integers(1, 4)) for n in range(3)}
        budget = int(draw.integers(2 * sum(size.values()), 6 * sum(size.values()) + 1))
        found = allocate(losses, counts, size, budget)

        def total(choice: tuple[int, ...], losses: Any = losses) -> float:
            return sum(losses[n][counts.index(c)] for n, c in enumerate(choice))

        fitting = [
            choice
            for choice in itertools.product(counts, repeat=3)
            if sum(c * size[n] for n, c in enumerate(choice)) <= budget
        ]
        own = tuple(found[n] for n in range(3))
        assert own in fitting
        assert total(own) == pytest.approx(min(map(total, fitting)))


def test_the_allocation_stays_within_a_budget_of_rounded_steps() -> None:
    draw = np.random.default_rng(1)
    counts = list(range(4, 65))
    losses = {n: np.sort(draw.random(61))[::-1] for n in range(6)}
    size = {n: int(draw.integers(900_000, 1_100_000)) for n in range(6)}
    budget = 32 * sum(size.values())
    spent = sum(count * size[n] for n, count in allocate(losses, counts, size, budget).items())
    assert budget - max(size.values()) < spent <= budget


def test_a_budget_below_the_fewest_is_refused() -> None:
    with pytest.raises(UsageError, match="fewest possible"):
        allocate({0: np.zeros(2)}, [2, 3], {0: 10}, 19)


def test_curves_never_rise_and_are_straight_between_points() -> None:
    found = curve({2: 1.0, 4: 0.5, 6: 0.7}, [2, 3, 4, 5, 6])
    np.testing.assert_allclose(found, [1.0, 0.75, 0.5, 0.5, 0.5])


@pytest.mark.parametrize(("possible", "equal"), [(range(2, 17), 12), (range(8, 513, 8), 256)])
def test_the_equal_number_and_both_ends_are_measured(possible: range, equal: int) -> None:
    found = measured_counts(list(possible), equal)
    assert {possible[0], equal, possible[-1]} <= set(found) <= set(possible)
    assert len(found) <= 15


def run(place: Path, source: Path, output: Path | None, **options: Any) -> Any:
    texts = {"calibration": place / "learn.jsonl", "evaluation": place / "test.jsonl"}
    dry = {"dry_run": True} if output is None else {}
    return compress(source, output=output, per_layer=True, **{**texts, **dry, **options})


@pytest.fixture(scope="module")
def lopsided(twins: Path) -> Path:
    """Twins whose first layer answers nothing: there any expert may go, and none of the second."""
    from mlx.utils import tree_flatten, tree_unflatten
    from mlx_lm.utils import save_model

    folder = save_twins(twins / "lopsided")
    model, _ = load_model(folder)
    path = find_moe_layers(model)[0].path
    silent = [
        (name, mx.zeros_like(value))
        for name, value in tree_flatten(model.parameters())
        if name.startswith(path) and "down_proj" in name
    ]
    assert silent
    model.update(tree_unflatten(silent))
    save_model(folder, model, donate_model=True)
    return folder


def test_the_layer_that_loses_nothing_gives_most(
    twins: Path, lopsided: Path, tmp_path: Path
) -> None:
    result = run(twins, lopsided, tmp_path / "small", ratio=0.25, method="frequency")
    plan = result.plan
    assert plan.per_layer
    assert plan.counts == {1: 8, 2: 16}
    assert plan.layers[1].removed == ()
    assert result.verification.loss.kl.value == pytest.approx(0.0, abs=1e-6)
    assert result.verification.stock_load.largest_difference < 1e-4
    assert not (tmp_path / "small" / "__pycache__").exists()
    found = plan.evidence["layer_budget"]
    assert found["equal"] == 12
    assert set(found["sensitivity"]) == {"1", "2"}
    # The same plan gives the same bytes.
    again = write(tmp_path / "small" / "plan.json", lopsided, tmp_path / "again")
    name = "model.safetensors"
    assert (again / name).read_bytes() == (tmp_path / "small" / name).read_bytes()
    stock, _ = mlx_lm.load(str(again), trust_remote_code=True)
    assert {each.index: each.num_experts for each in find_moe_layers(stock)} == plan.counts


def test_a_target_of_bytes_is_kept(twins: Path, lopsided: Path, tmp_path: Path) -> None:
    table = SizeTable.of(open_parent(lopsided))
    limit = table.of_counts({1: 11, 2: 11}) / 1e9
    run(twins, lopsided, tmp_path / "small", target_gb=limit, method="gate-sum")
    written = sum(path.stat().st_size for path in (tmp_path / "small").glob("*.safetensors"))
    assert written <= limit * 1e9


@pytest.mark.parametrize(
    "options",
    [
        {"ratio": 0.5, "merge": True},
        {"ratio": 0.5, "method": "auto"},
        {"ratio": 0.5, "method": "channels"},
        {"ratio": 0.5, "expert_width": 0.5},
        {"expert_width": 0.5},
    ],
)
def test_what_per_layer_does_not_go_with(twins: Path, options: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="--per-layer"):
        run(twins, twins / "twins", None, **options)


def test_unequal_layers_cannot_be_calibrated_again(written: Path, twins: Path) -> None:
    with pytest.raises(UnsupportedModelError, match="differ in their numbers of experts"):
        run(twins, written, None, ratio=0.25, method="reap", trust_remote_code=True)


@pytest.mark.parametrize("size", [{"ratio": 0.25, "method": "reap"}, {"threshold": 0.7}])
def test_a_model_with_a_file_of_its_own_is_refused(
    twins: Path, tmp_path: Path, size: dict[str, Any]
) -> None:
    source = save_twins(tmp_path / "source")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "model_file": "own.py"}))
    (source / "own.py").write_text("from mlx_lm.models.qwen3_moe import Model, ModelArgs\n")
    with pytest.raises(UnsupportedModelError, match=r"own\.py.*leave --per-layer out"):
        run(twins, source, None, trust_remote_code=True, **size)
    router = ExpertRouter.from_pretrained(source, trust_remote_code=True)
    with pytest.raises(UnsupportedModelError, match=r"own\.py"):
        write(unequal_plan(router), source, tmp_path / "small", trust_remote_code=True)


def test_a_threshold_merges_what_each_layer_has(twins: Path, tmp_path: Path) -> None:
    """The copies of the second layer are spoilt, so that it alone has fewer pairs."""
    from mlx.utils import tree_flatten, tree_unflatten
    from mlx_lm.utils import save_model

    source = save_twins(tmp_path / "source")
    model, _ = load_model(source)
    path = find_moe_layers(model)[1].path
    draw = np.random.default_rng(0)
    spoilt = []
    for name, value in tree_flatten(model.parameters()):
        if name.startswith(path) and "down_proj" in name:
            changed = np.array(value)
            changed[8:12] = draw.normal(0, changed.std(), changed[8:12].shape)
            spoilt.append((name, mx.array(changed)))
    model.update(tree_unflatten(spoilt))
    save_model(source, model, donate_model=True)
    result = run(twins, source, tmp_path / "small", threshold=0.7)
    assert result.plan.counts == {1: 8, 2: 12}
    assert [layer.groups_reached for layer in result.plan.layers] == [8, 12]
    assert result.verification.stock_load.largest_difference < 1e-4
    stock, _ = mlx_lm.load(str(tmp_path / "small"), trust_remote_code=True)
    assert {each.index: each.num_experts for each in find_moe_layers(stock)} == {1: 8, 2: 12}
