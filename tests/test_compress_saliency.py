"""Every saliency against a float64 calculation from captured outputs, and the plans of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from moe_lens.compress import Calibration, calibrate, plan_every_prune, plan_prune
from moe_lens.compress.pruning.weight_shape import aimer
from moe_lens.compress.statistics.blending import Blend
from moe_lens.compress.statistics.saliency import FORMULAS, METHODS, saliency
from moe_lens.compress.statistics.super_experts import super_experts
from moe_lens.corpus import Corpus, read_corpus
from moe_lens.errors import UsageError
from moe_lens.experts.layer_sample import sample_layers
from moe_lens.override import Override
from moe_lens.router import ExpertRouter
from tiny_models import save_checkpoint
from twins import write_words

FAMILIES = ["qwen3_moe", "deepseek_v3", "longcat_flash", "dbrx", "llama4", "gpt_oss"]

Sums = Callable[[np.ndarray, np.ndarray, int], float]

ORACLE: dict[str, Sums] = {
    # g: weights and n: norms of the tokens routed to the expert, of `tokens` in all
    "reap": lambda g, n, tokens: float((g * n).mean()),
    "gated-sum": lambda g, n, tokens: float((g * n).sum()),
    "ean-mean": lambda g, n, tokens: float(n.mean()),
    "ean-sum": lambda g, n, tokens: float(n.sum()),
    "msan": lambda g, n, tokens: float((n * n).mean()),
    "gate-sum": lambda g, n, tokens: float(g.sum()),
    "frequency": lambda g, n, tokens: len(g) / tokens,
}


def open_tiny(name: str, folder: Path, **options: Any) -> ExpertRouter:
    return ExpertRouter.from_pretrained(save_checkpoint(name, folder / "model", **options))


def words(folder: Path, prompts: int = 12) -> Corpus:
    return read_corpus(write_words(folder / "words.jsonl", prompts, 1, words=30))


def captured(router: ExpertRouter, corpus: Corpus) -> dict[int, list[tuple[str, np.ndarray, ...]]]:
    """By layer, for every prompt: its label, ids, weights and outputs, run alone, in float64."""
    found: dict[int, list[Any]] = {layer.index: [] for layer in router.layers}
    for prompt, tokens in zip(corpus.prompts, corpus.tokenize(router.tokenizer, 512), strict=True):
        with router.capture("expert_ids", "expert_weights", "expert_outputs") as seen:
            mx.eval(router.forward([tokens]))
        for layer in router.layers:
            values = seen[layer.index]
            arrays = (values.expert_ids, values.expert_weights, values.expert_outputs)
            found[layer.index].append(
                (prompt.label, *(np.asarray(each).astype(np.float64) for each in arrays))
            )
    return found


def routed(parts: list[Any], expert: int, on_input: bool) -> tuple[np.ndarray, np.ndarray]:
    ids, weights, outputs = (np.concatenate([part[n] for part in parts]) for n in (1, 2, 3))
    chosen = ids == expert
    norms = np.sqrt((outputs[chosen] ** 2).sum(axis=-1))
    gates = weights[chosen]
    return gates, norms / gates if on_input else norms


@pytest.mark.parametrize("name", FAMILIES)
def test_saliencies_equal_a_float64_calculation(name: str, tmp_path: Path) -> None:
    router = open_tiny(name, tmp_path)
    corpus = words(tmp_path)
    found = calibrate(router, corpus, similarity=False)
    seen = captured(router, corpus)
    on_input = name == "llama4"
    for layer in found.layers:
        parts = seen[layer.layer]
        tokens = sum(len(part[1]) for part in parts)
        for method in FORMULAS:
            values = saliency(layer, method)
            for expert in range(layer.num_experts):
                gates, norms = routed(parts, expert, on_input)
                if on_input and method in ("ean-mean", "ean-sum", "msan"):
                    norms = norms * gates  # the output cannot be had without its weight
                if len(gates):
                    expected = ORACLE[method](gates, norms, tokens)
                    np.testing.assert_allclose(values[expert], expected, rtol=1e-5)
                else:
                    assert np.isnan(values[expert]) or values[expert] == 0.0


def test_labels_are_summed_apart_and_blended_afterwards(tmp_path: Path) -> None:
    router = open_tiny("qwen3_moe", tmp_path)
    corpus = words(tmp_path)
    found = calibrate(router, corpus, similarity=False, mean_outputs=True)
    seen = captured(router, corpus)
    assert found.labels == ("a", "b")
    blend = Blend.parse("a=3,b=1")
    for layer in found.layers:
        blended = saliency(layer, "gate-sum", blend=blend)
        per_token = saliency(layer, "reap", blend=blend)
        for expert in range(layer.num_experts):
            sums = top = below = 0.0
            for label, weight in (("a", 3.0), ("b", 1.0)):
                parts = [part for part in seen[layer.layer] if part[0] == label]
                tokens = sum(len(part[1]) for part in parts)
                gates, norms = routed(parts, expert, on_input=False)
                there = layer.labels[label]
                assert there.counts[expert] == len(gates)
                outputs = sum(part[3][part[1] == expert].sum(axis=0) for part in parts)
                assert there.output_sums is not None
                np.testing.assert_allclose(there.output_sums[expert], outputs, atol=1e-5)
                sums += weight * gates.sum() / tokens
                top += weight * (gates * norms).sum() / tokens
                below += weight * len(gates) / tokens
            np.testing.assert_allclose(blended[expert], sums, rtol=1e-5)
            np.testing.assert_allclose(per_token[expert], top / below, rtol=1e-5)
        one = saliency(layer, "ean-sum", blend=Blend.parse("b=2"))
        alone = layer.labels["b"].norm_sums * 2 / layer.labels["b"].tokens
        np.testing.assert_allclose(one, alone, rtol=1e-12)


def test_max_min_keeps_what_the_worst_off_label_needs(tmp_path: Path) -> None:
    router = open_tiny("qwen3_moe", tmp_path)
    layer = calibrate(router, words(tmp_path), similarity=False).layers[0]

    def of(values: list[float]) -> Any:
        zero = np.zeros(8)
        return replace(layer.labels["a"], weight_sums=np.array(values), counts=zero + 1)

    # Expert 0 is all that label b uses; in the sum over both labels it would go first.
    labels = {"a": of([0, 10, 20, 30, 40, 50, 60, 70]), "b": of([1, 0, 0, 0, 0, 0, 0, 0])}
    found = replace(layer, labels=labels)
    plain = saliency(found, "gate-sum")
    blended = saliency(found, "gate-sum", blend=Blend.parse("max-min"))
    assert np.argmin(plain) == 0
    assert np.argmax(blended) == 0
    assert blended.tolist() == [8, 1, 2, 3, 4, 5, 6, 7]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("code", "no blend of labels"),
        ("a=x", "no blend of labels"),
        ("a=-1", "no blend of labels"),
        ("a=0,b=0", "all weights"),
        ("c=1", "no label 'c'; it has a, b"),
    ],
)
def test_blends_that_cannot_be(text: str, message: str, tmp_path: Path) -> None:
    found = calibrate(open_tiny("qwen3_moe", tmp_path), words(tmp_path), similarity=False)
    with pytest.raises(UsageError, match=message):
        plan_prune(found, 0.5, "reap", blend=Blend.parse(text))


def test_aimer_reads_the_shape_of_the_weights(tmp_path: Path) -> None:
    plain = open_tiny("qwen3_moe", tmp_path)
    for layer in plain.layers:
        found = aimer([layer])[layer.index]
        for expert in range(layer.num_experts):
            weights = np.concatenate(
                [
                    np.array(getattr(layer.experts, name).weight[expert]).ravel()
                    for name in ("gate_proj", "up_proj", "down_proj")
                ]
            ).astype(np.float64)
            expected = 1 - np.abs(weights).mean() / np.sqrt((weights**2).mean())
            np.testing.assert_allclose(found[expert], expected, rtol=1e-5)


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> tuple[ExpertRouter, Corpus, Calibration]:
    folder = tmp_path_factory.mktemp("saliency")
    router, corpus = open_tiny("qwen3_moe", folder), words(folder)
    return router, corpus, calibrate(router, corpus, similarity=False)


Opened = tuple[ExpertRouter, Corpus, Calibration]


def test_every_method_plans_from_one_calibration(opened: Opened) -> None:
    router, corpus, found = opened
    samples = sample_layers(router, corpus.tokenize(router.tokenizer, 512))
    plans = plan_every_prune(found, experts=5, router=router, samples=samples, seed=3)
    assert tuple(plans) == METHODS
    for method, plan in plans.items():
        assert (plan.num_experts, plan.settings["method"]) == (5, method)
        for layer in plan.layers:
            assert len(layer.removed) == 3
            assert layer.saliency is not None
            least = sorted(range(8), key=lambda e: layer.saliency[e])[:3]
            assert method == "greedy" or set(layer.removed) == set(least)
    assert len({plan.layers for plan in plans.values()}) > 4
    assert plan_prune(found, 3 / 8, "reap").layers == plans["reap"].layers
    assert "greedy" not in plan_every_prune(found, 0.5, router=router)
    blended = plan_every_prune(
        found, 0.5, router=router, samples=samples, blend=Blend.parse("a=1"), seed=3
    )
    assert set(blended) == set(METHODS) - {"greedy"}


def test_random_differs_by_seed_and_layer_only(opened: Opened) -> None:
    _, _, found = opened
    first, again, other = (plan_prune(found, 0.5, "random", seed=s) for s in (1, 1, 2))
    assert first == again
    assert first.layers != other.layers
    assert first.layers[0].saliency != first.layers[1].saliency


@pytest.mark.parametrize("name", ["qwen3_moe", "deepseek_v3", "llama4", "dbrx", "longcat_flash"])
def test_greedy_losses_are_those_of_the_masked_model(name: str, tmp_path: Path) -> None:
    """The first removal of the first MoE layer, whose input no other removal changes."""
    router, corpus = open_tiny(name, tmp_path, experts=16), words(tmp_path, 3)
    tokens = corpus.tokenize(router.tokenizer, 512)
    found = calibrate(router, corpus, similarity=False)
    plan = plan_prune(
        found,
        experts=found.model.num_experts - found.model.group_count,
        method="greedy",
        samples=sample_layers(router, tokens),
    )
    layer = plan.layers[0]
    assert layer.saliency is not None
    first = min(layer.removed, key=lambda expert: layer.saliency[expert])

    def outputs(masked: int | None) -> np.ndarray:
        changes = {} if masked is None else {layer.layer: Override(mask=[masked])}
        parts = []
        for ids in tokens:
            with router.override(changes), router.capture("routed_output") as seen:
                mx.eval(router.forward([ids]))
            parts.append(np.asarray(seen[layer.layer].routed_output).astype(np.float64))
        return np.concatenate(parts)

    parent = outputs(None)
    losses = {
        expert: float(((outputs(expert) - parent) ** 2).sum() / (parent**2).sum())
        for expert in range(found.model.num_experts)
    }
    np.testing.assert_allclose(layer.saliency[first], losses[first], rtol=1e-4)
    assert losses[first] == pytest.approx(min(losses.values()), rel=1e-4)


def test_super_experts_stay(opened: Opened) -> None:
    _, _, found = opened
    victim = plan_prune(found, 0.25).layers[0].removed[0]
    peaks = found.layers[0].labels["a"].max_activations.copy()
    peaks[victim] = 1e4
    sums = replace(found.layers[0].labels["a"], max_activations=peaks)
    layer = replace(found.layers[0], labels={**found.layers[0].labels, "a": sums})
    changed = replace(found, layers=(layer, *found.layers[1:]))
    assert super_experts(changed.layers) == {layer.layer: (victim,)}
    plan = plan_prune(changed, 0.25, protect=True)
    assert victim not in plan.layers[0].removed
    assert victim in plan_prune(changed, 0.25).layers[0].removed
    assert plan.evidence["protected"] == {str(layer.layer): [victim]}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "magic"}, "no method 'magic'; choose one of reap"),
        ({"method": "aimer"}, "give the router"),
        ({"method": "greedy"}, "sample_layers"),
        ({"method": "random", "blend": Blend({"a": 1.0})}, "reads no text"),
        ({"experts": 8}, "8 experts of 8 cannot be kept"),
        ({"experts": 0}, "0 experts of 8 cannot be kept"),
        ({"ratio": 0.5, "experts": 4}, "either a ratio"),
        ({"ratio": None}, "either a ratio"),
    ],
)
def test_prunes_that_cannot_be(options: dict[str, Any], message: str, opened: Opened) -> None:
    size = {} if "experts" in options or "ratio" in options else {"ratio": 0.5}
    with pytest.raises(UsageError, match=message):
        plan_prune(opened[2], **size, **options)
