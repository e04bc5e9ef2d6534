"""How groups are found and become experts: methods, alignment, router rows, and the plan's JSON."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import permutations
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.utils import load, load_model, save_model

from moe_lens.compress import calibrate, compress, plan_merge, read_plan, write
from moe_lens.compress.merging.alignment import orders
from moe_lens.compress.merging.cluster_methods import (
    Cluster,
    hc_smoe,
    m_smoe,
    ream,
    ream_similarity,
)
from moe_lens.compress.merging.merging import ALIGNMENTS, GROUPINGS, ROUTER_ROWS, WEIGHTS, Merging
from moe_lens.compress.merging.planning import plan_merge_to
from moe_lens.compress.merging.router_rows import ridge
from moe_lens.compress.merging.similarity_sources import (
    SOURCES,
    Answers,
    parse_mixture,
)
from moe_lens.compress.plan.router_row import RouterRow
from moe_lens.compress.statistics.statistics import Calibration
from moe_lens.corpus import read_corpus
from moe_lens.errors import UsageError
from moe_lens.experts.answers import all_outputs
from moe_lens.experts.channels import channels, match, weight_rows
from moe_lens.experts.cosines import weight_gram
from moe_lens.experts.layer_sample import LayerSample, sample_layers
from moe_lens.families import find_moe_layers
from moe_lens.router import ExpertRouter
from tiny_models import save_checkpoint
from twins import save_twins, write_words

TWINS = [[e, e + 8] for e in range(8)]
PAIRS = range(0, 16, 2)


class Model:
    """A checkpoint with what its calibration and its sample say."""

    def __init__(self, source: Path, words: Path) -> None:
        self.source = source
        self.router = ExpertRouter.from_pretrained(source)
        corpus = read_corpus(words)
        self.calibration: Calibration = calibrate(self.router, corpus)
        self.tokens = corpus.tokenize(self.router.tokenizer, 64)
        self.samples = sample_layers(self.router, self.tokens, router_inputs=True)

    def plan(self, count: int, **choices: Any) -> Any:
        return plan_merge_to(
            self.calibration, count, merging=Merging(**choices), samples=self.samples
        )


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_words(tmp_path_factory.mktemp("words") / "learn.jsonl", 16, 1)


@pytest.fixture(scope="module")
def twins(tmp_path_factory: pytest.TempPathFactory, words: Path) -> Model:
    return Model(save_twins(tmp_path_factory.mktemp("twins") / "twins"), words)


def shuffled_twins(folder: Path, name: str, quantise: int | None = None) -> tuple[Path, Any]:
    """Expert 2 e + 1 is expert 2 e with its channels in another order, which no output shows.

    Returns:
        the checkpoint, and [8, width] which channel of 2 e stands where in 2 e + 1.
    """
    save_checkpoint(name, folder, experts=16, quantise=quantise)
    model, _ = load_model(folder)
    parameters = dict(tree_flatten(model.parameters()))
    changed: dict[str, mx.array] = {}
    source = np.random.default_rng(5)
    order = np.stack([source.permutation(64) for _ in range(8)])
    rows = mx.array(order)
    for layer in find_moe_layers(model):
        for key in layer.router_parameters():
            changed[key] = mx.repeat(parameters[key][:8], 2, axis=0)
        for key in layer.expert_parameters():
            half = parameters[key][:8]
            down = any(f".{each}." in key for each in ("down_proj", "fc2"))
            copy = half
            if not down:
                copy = mx.take_along_axis(half, rows.reshape(8, 64, *[1] * (half.ndim - 2)), axis=1)
            elif key.endswith(".weight"):
                copy = mx.take_along_axis(half, rows[:, None, :], axis=2)
            changed[key] = mx.flatten(mx.stack([half, copy], axis=1), 0, 1)
    model.update(tree_unflatten(list(changed.items())))
    mx.eval(model.parameters())
    save_model(folder, model, donate_model=True)
    return folder, order


@pytest.mark.parametrize("name", ["qwen3_moe/nonorm", "nemotron_h", "gpt_oss"])
@pytest.mark.parametrize("how", ["activations", "weights", "both"])
def test_alignment_undoes_any_order_of_channels(
    name: str, how: str, tmp_path: Path, words: Path
) -> None:
    """Merged with its shuffled copy, an expert is the same to the last bit: the mean of equals."""
    source, order = shuffled_twins(tmp_path / "source", name)
    router = ExpertRouter.from_pretrained(source)
    tokens = read_corpus(words).tokenize(router.tokenizer, 64)
    sample = sample_layers(router, tokens)[0]
    first, found = orders(sample, Cluster((4, 5)), 4, how)
    assert first is None
    np.testing.assert_array_equal(np.array(found), np.argsort(order[2]))

    calibration = calibrate(router, read_corpus(words))
    plan = plan_merge(
        calibration,
        0.8,
        experts_per_token=2,
        merging=Merging(align=how, router_rows="dominant", weights="equal"),
        samples=sample_layers(router, tokens),
    )
    assert [group.experts for group in plan.layers[0].groups] == [(e, e + 1) for e in PAIRS]
    smaller = ExpertRouter.from_pretrained(write(plan, source, tmp_path / "smaller"))
    for before, after in zip(router.layers, smaller.layers, strict=True):
        old = dict(tree_flatten(before.experts.parameters()))
        for key, value in tree_flatten(after.experts.parameters()):
            assert bool(mx.array_equal(value, old[key][::2])), key
        assert bool(mx.array_equal(after.router.weight, before.router.weight[::2]))


def test_a_member_with_other_channels_first_answers_the_same(tmp_path: Path) -> None:
    """The order alone changes nothing: numbers that add up exactly show it to the last bit."""
    source = save_checkpoint("qwen3_moe", tmp_path / "source", experts=16)
    model, _ = load_model(source)
    draw = np.random.default_rng(3)
    whole = [
        (key, mx.array(draw.integers(-2, 3, value.shape).astype(np.float32)))
        for layer in find_moe_layers(model)
        for key in layer.expert_parameters()
        for value in [dict(tree_flatten(model.parameters()))[key]]
    ]
    model.update(tree_unflatten(whole))
    save_model(source, model, donate_model=True)
    router = ExpertRouter.from_pretrained(source)
    calibration = calibrate(router, words_of(tmp_path))
    plan = plan_merge_to(calibration, 15, merging=Merging(router_rows="mean"))
    turned = tuple(reversed(range(64)))

    def only_the_second(group: Any, order: Any) -> Any:
        return (
            group if not group.merged else replace(group, weights=(0.0, 1.0), orders=(None, order))
        )

    inputs = mx.array(draw.integers(-2, 3, (5, 64)).astype(np.float32))
    answers = []
    for number, order in enumerate((None, turned)):
        layers = tuple(
            replace(layer, groups=tuple(only_the_second(group, order) for group in layer.groups))
            for layer in plan.layers
        )
        folder = write(replace(plan, layers=layers), source, tmp_path / f"smaller{number}")
        experts = ExpertRouter.from_pretrained(folder).layers[0].experts
        ids = mx.broadcast_to(mx.arange(15), (5, 15))
        # SwiGLU is no whole number, so the two projections before it and the one after it.
        hidden = mx.expand_dims(inputs, (-2, -3))
        up = np.array(experts.up_proj(hidden, ids))
        down = np.array(experts.down_proj(experts.up_proj(hidden, ids), ids))
        answers.append((up, down))
    merged = next(n for n, group in enumerate(plan.layers[0].groups) if group.merged)
    np.testing.assert_array_equal(answers[0][0][:, merged, :, ::-1], answers[1][0][:, merged])
    np.testing.assert_array_equal(answers[0][1], answers[1][1])


def words_of(folder: Path) -> Any:
    return read_corpus(write_words(folder / "words.jsonl", 8, 1))


def test_a_matching_is_the_cheapest_of_all_permutations() -> None:
    draw = np.random.default_rng(0)
    ours, theirs = (draw.normal(size=(5, 7)).astype(np.float32) for _ in range(2))
    ours /= np.linalg.norm(ours, axis=1, keepdims=True)
    theirs /= np.linalg.norm(theirs, axis=1, keepdims=True)
    cost = np.linalg.norm(ours[:, None] - theirs[None], axis=2)
    best = min(permutations(range(5)), key=lambda p: sum(cost[i, p[i]] for i in range(5)))
    assert match([mx.array(ours)], [mx.array(theirs)]) == best


def test_channels_and_weight_rows_are_those_of_numpy(twins: Model) -> None:
    sample = twins.samples[0]
    experts, inputs = sample.layer.experts, np.array(sample.inputs, np.float64)
    gate, up, down = (
        np.array(experts[name].weight[3], np.float64)
        for name in ("gate_proj", "up_proj", "down_proj")
    )
    before = inputs @ gate.T
    expected = before / (1 + np.exp(-before)) * (inputs @ up.T)
    np.testing.assert_allclose(
        np.array(channels(sample.layer, 3, sample.inputs)),
        expected,
        atol=1e-5 * abs(expected).max(),
    )
    rows = np.array(weight_rows(sample.layer, 3))
    np.testing.assert_allclose(np.sort(rows), np.sort(np.concatenate([down.T, gate, up], axis=1)))


@pytest.mark.parametrize("grouping", GROUPINGS)
def test_every_grouping_finds_the_twins(twins: Model, grouping: str) -> None:
    plan = twins.plan(8, grouping=grouping)
    for layer in plan.layers:
        # REAM's first group takes all it may; the others find the copies.
        if grouping != "ream" and grouping != "m-smoe":
            assert [list(group.experts) for group in layer.groups] == TWINS
    assert plan.settings["grouping"] == grouping
    assert GROUPINGS[grouping] in plan.definition
    assert read_plan(json.loads(plan.to_json())) == plan


def test_hc_smoe_is_average_linkage_of_mean_outputs(twins: Model) -> None:
    sample = twins.samples[0]
    outputs = np.array(all_outputs(sample), np.float64)
    answers = Answers(twins.calibration.layers[0], sample)
    np.testing.assert_allclose(answers.mean_outputs, outputs.mean(axis=0), atol=1e-6)
    # A naive agglomeration in numpy.
    means = outputs.mean(axis=0)
    distance = np.linalg.norm(means[:, None] - means[None], axis=2)
    groups = [[e] for e in range(16)]
    while len(groups) > 5:
        pairs = [(i, j) for i in range(len(groups)) for j in range(i)]
        i, j = min(pairs, key=lambda p: distance[np.ix_(groups[p[0]], groups[p[1]])].mean())
        groups[j] += groups.pop(i)
    found = hc_smoe(means, tuple(range(16)), 5)
    assert sorted(each.experts for each in found) == sorted(tuple(sorted(g)) for g in groups)


def test_hc_smoe_makes_as_many_groups_as_asked_even_of_equals() -> None:
    found = hc_smoe(np.zeros((6, 3)), tuple(range(6)), 4)
    assert len(found) == 4
    assert sorted(e for each in found for e in each.experts) == list(range(6))


def test_m_smoe_joins_the_dominant_with_the_most_similar_logits(twins: Model) -> None:
    # The text is shorter than a sample, so the sample is all of it.
    logits = np.array(twins.samples[0].logits, np.float64)
    statistics = twins.calibration.layers[0]
    counts, gram = statistics.counts, Answers(statistics, twins.samples[0]).logit_gram
    found = m_smoe(gram, counts.astype(float), tuple(range(16)), 6)
    dominant = sorted(range(16), key=lambda e: (-counts[e], e))[:6]
    assert [each.centre for each in found] == dominant
    unit = logits / np.linalg.norm(logits, axis=0)
    for each in found:
        for expert in set(each.experts) - {each.centre}:
            cosines = [unit[:, expert] @ unit[:, d] for d in dominant]
            assert dominant[int(np.argmax(cosines))] == each.centre


def test_ream_lets_the_most_salient_take_its_likes_first() -> None:
    similarity = np.zeros((6, 6))
    similarity[0, [2, 3, 4]] = 0.9, 0.8, 0.1
    similarity[1, [2, 3, 4]] = 1.0, 1.0, 0.5
    saliency = np.array([5.0, 4.0, 1.0, 1.0, np.nan, 0.5])
    found = ream(similarity, saliency, tuple(range(6)), 2, capacity=3)
    assert [(each.centre, each.experts) for each in found] == [(0, (0, 2, 3)), (1, (1, 4, 5))]
    assert len(ream(similarity, saliency, tuple(range(6)), 2, capacity=1)) == 2


def test_reams_similarity_by_its_own_formula(twins: Model) -> None:
    sample = twins.samples[0]
    logits = np.array(sample.logits, np.float64)
    scores = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    gated = np.einsum("te,teh->eh", scores, np.array(all_outputs(sample))) / len(logits)
    unit = logits / np.linalg.norm(logits, axis=0)
    distance = np.linalg.norm(unit[:, :, None] - unit[:, None, :], axis=0)
    flat = gated / np.linalg.norm(gated, axis=1, keepdims=True)
    expected = ((flat @ flat.T + 1) / 2 + 1 - distance / distance.max()) / 2
    answers = Answers(twins.calibration.layers[0], sample)
    # The distance of near copies is the root of a small difference of float32 sums.
    np.testing.assert_allclose(
        ream_similarity(answers.gated_outputs, answers.logit_gram), expected, atol=2e-4
    )


def test_every_similarity_sees_the_twins(twins: Model) -> None:
    for name in SOURCES:
        plan = twins.plan(8, similarity={name: 1.0})
        groups = [list(group.experts) for group in plan.layers[0].groups]
        assert groups == TWINS, name
    assert parse_mixture("outputs=0.25, weights=0.75") == {"outputs": 0.25, "weights": 0.75}
    layer = twins.samples[0].layer
    flat = np.concatenate(
        [np.array(value).reshape(16, -1) for _, value in tree_flatten(layer.experts.parameters())],
        axis=1,
    ).astype(np.float64)
    np.testing.assert_allclose(weight_gram(layer), flat @ flat.T, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("magic", "no similarity 'magic'"),
        ("outputs=0.5", "add up to 1, not 0.5"),
        ("outputs=-1,weights=2", "0 or more"),
        ("outputs=much", "no share of a similarity"),
    ],
)
def test_mixtures_that_cannot_be(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        parse_mixture(text)


def test_shares_follow_what_was_asked(twins: Model) -> None:
    statistics = twins.calibration.layers[0]
    group = {
        weights: twins.plan(8, weights=weights, router_rows="mean").layers[0].groups[2]
        for weights in WEIGHTS
    }
    counts = statistics.counts[[2, 10]]
    assert group["frequency"].weights == pytest.approx(counts / counts.sum())
    reap = (statistics.routed.weighted_norm_sums / statistics.counts)[[2, 10]]
    assert group["saliency"].weights == pytest.approx(reap / reap.sum())
    assert group["equal"].weights == (0.5, 0.5)


@pytest.mark.parametrize("name", ["qwen3_moe/nonorm", "gpt_oss", "deepseek_v3", "gemma4"])
def test_fitted_rows_answer_as_the_group_did(name: str, tmp_path: Path, words: Path) -> None:
    """The written router against ridge regression in numpy, with the strength found by leaving
    each token out in turn."""
    model = Model(save_checkpoint(name, tmp_path / "source", experts=16), words)
    plan = model.plan(12)
    smaller = ExpertRouter.from_pretrained(write(plan, model.source, tmp_path / "smaller"))
    for sample, after, layer in zip(model.samples, smaller.layers, plan.layers, strict=True):
        inputs = np.array(sample.router_inputs, np.float64)
        logits = np.array(sample.logits, np.float64)
        router = sample.layer.router
        rows = np.array(router.weight, np.float64)
        bias = "bias" in router
        merged = [n for n, group in enumerate(layer.groups) if group.merged]
        left = []
        for number in merged:
            group = layer.groups[number]
            members = logits[:, list(group.experts)]
            left.append(np.log(np.exp(members).sum(axis=1)) - members @ np.array(group.weights))
        change, shift = ridge_by_hand(inputs, np.stack(left, axis=1), bias)
        for place, number in enumerate(merged):
            group = layer.groups[number]
            expected = np.array(group.weights) @ rows[list(group.experts)] + change[:, place]
            np.testing.assert_allclose(
                np.array(after.router.weight[number]), expected, atol=2e-5 * abs(expected).max()
            )
            if bias:
                start = np.array(group.weights) @ np.array(router.bias)[list(group.experts)]
                assert float(after.router.bias[number]) == pytest.approx(
                    start + shift[place], abs=1e-5
                )
        for number, group in enumerate(layer.groups):
            if not group.merged:
                assert bool(
                    mx.array_equal(after.router.weight[number], router.weight[group.experts[0]])
                )


def ridge_by_hand(
    inputs: np.ndarray, targets: np.ndarray, intercept: bool
) -> tuple[np.ndarray, np.ndarray]:
    centre = inputs.mean(axis=0) if intercept else np.zeros(inputs.shape[1])
    level = targets.mean(axis=0) if intercept else np.zeros(targets.shape[1])
    x, y = inputs - centre, targets - level
    scale = (x**2).sum() / len(x)
    found = []
    for power in range(-6, 3):
        gram = x.T @ x + 10.0**power * scale * np.eye(x.shape[1])
        hat = x @ np.linalg.solve(gram, x.T)
        error = (((y - hat @ y) / (1 - np.diag(hat))[:, None]) ** 2).sum()
        found.append((error, np.linalg.solve(gram, x.T @ y)))
    change = min(found, key=lambda each: each[0])[1]
    return change, level - centre @ change


def test_ridge_with_more_inputs_than_tokens() -> None:
    draw = np.random.default_rng(1)
    inputs, targets = draw.normal(size=(20, 50)), draw.normal(size=(20, 3))
    expected, _ = ridge_by_hand(inputs, targets, intercept=False)
    np.testing.assert_allclose(ridge(inputs, targets), expected, rtol=1e-6, atol=1e-9)


def test_a_correction_bias_keeps_the_group_as_likely_as_its_best_member(
    tmp_path: Path, words: Path
) -> None:
    model = Model(save_checkpoint("deepseek_v3", tmp_path / "source", experts=16), words)
    plan = model.plan(12)
    smaller = ExpertRouter.from_pretrained(write(plan, model.source, tmp_path / "smaller"))
    for sample, after, layer in zip(model.samples, smaller.layers, plan.layers, strict=True):
        inputs = np.array(sample.router_inputs, np.float64)
        gate, new = sample.layer.block.gate, after.block.gate
        before = 1 / (1 + np.exp(-inputs @ np.array(gate.weight, np.float64).T))
        before += np.array(gate.e_score_correction_bias)
        scores = 1 / (1 + np.exp(-inputs @ np.array(new.weight, np.float64).T))
        scores += np.array(new.e_score_correction_bias)
        for number, group in enumerate(layer.groups):
            best = before[:, list(group.experts)].max(axis=1)
            assert scores[:, number].mean() == pytest.approx(best.mean(), abs=1e-5)


def test_a_per_expert_scale_is_the_mean_whatever_the_row_is(tmp_path: Path, words: Path) -> None:
    model = Model(save_checkpoint("gemma4", tmp_path / "source", experts=16), words)
    for rows in ROUTER_ROWS:
        plan = model.plan(12, router_rows=rows)
        smaller = ExpertRouter.from_pretrained(write(plan, model.source, tmp_path / rows))
        for before, after, layer in zip(
            model.router.layers, smaller.layers, plan.layers, strict=True
        ):
            old = np.array(before.block.router.per_expert_scale, np.float64)
            new = np.array(after.block.router.per_expert_scale)
            expected = [np.dot(g.weights, old[list(g.experts)]) for g in layer.groups]
            np.testing.assert_allclose(new, expected, rtol=1e-6)


FAMILIES = ("qwen3_moe", "gpt_oss", "deepseek_v3", "dbrx", "longcat_flash", "llama4", "phimoe")


@pytest.mark.parametrize("align", ["activations", "both"])
@pytest.mark.parametrize("name", FAMILIES)
def test_families_merge_aligned_and_fitted(
    name: str, align: str, tmp_path: Path, words: Path
) -> None:
    """Aligned rows are the mean of permuted members, and stock mlx-lm runs the result."""
    model = Model(save_checkpoint(name, tmp_path / "source", experts=16), words)
    grouping = "complete" if align == "both" else "m-smoe"
    plan = model.plan(12, grouping=grouping, align=align, weights="saliency")
    output = write(plan, model.source, tmp_path / "smaller")
    smaller = ExpertRouter.from_pretrained(output)
    assert bool(mx.isfinite(smaller.forward([[1, 5, 9, 3, 7]])).all())
    load(str(output))
    again = write(read_plan(output / "plan.json"), model.source, tmp_path / "again")
    for file in ("model.safetensors", "config.json", "plan.json"):
        assert (again / file).read_bytes() == (output / file).read_bytes()
    before, after, layer = model.router.layers[0], smaller.layers[0], plan.layers[0]
    number, group = next((n, g) for n, g in enumerate(layer.groups) if g.merged)
    assert group.orders is not None
    down = {"down_proj", "fc2", "w2"}
    for key in matrices(before):
        parts = []
        for expert, order in zip(group.experts, group.orders, strict=True):
            matrix = weight(before, key, expert)
            if order is not None:
                matrix = matrix[:, list(order)] if key in down else matrix[list(order)]
            parts.append(matrix)
        expected = sum(w * part for w, part in zip(group.weights, parts, strict=True))
        np.testing.assert_allclose(weight(after, key, number), expected, atol=1e-6)


def matrices(layer: Any) -> list[str]:
    if layer.list_experts:
        return ["w1", "v1", "w2"]
    return [name for name, each in layer.experts.items() if hasattr(each, "num_experts")]


def weight(layer: Any, name: str, expert: int) -> np.ndarray:
    if layer.list_experts:
        return np.array(layer.experts[expert][name].weight, np.float64)
    return np.array(layer.experts[name].weight[expert], np.float64)


@pytest.mark.parametrize("quantise", [4, 8])
def test_quantised_members_are_permuted_and_packed_again(
    quantise: int, tmp_path: Path, words: Path
) -> None:
    model = Model(save_checkpoint("qwen3_moe", tmp_path / "source", quantise, 16), words)
    plan = model.plan(12, align="both")
    smaller = ExpertRouter.from_pretrained(write(plan, model.source, tmp_path / "smaller"))
    before, after = model.router.layers[1].experts, smaller.layers[1].experts
    number, group = next((n, g) for n, g in enumerate(plan.layers[1].groups) if g.merged)
    for name in ("gate_proj", "up_proj", "down_proj"):
        parts = []
        for expert, order in zip(group.experts, group.orders, strict=True):
            part = unpacked(before[name], expert)
            if order is not None:
                part = part[:, list(order)] if name == "down_proj" else part[list(order)]
            parts.append(part)
        expected = sum(w * part for w, part in zip(group.weights, parts, strict=True))
        steps = np.array(after[name].scales[number], np.float64).repeat(after[name].group_size, -1)
        assert (
            abs(unpacked(after[name], number) - expected) <= 0.51 * abs(steps) + 1e-6
        ).mean() > 0.98


def unpacked(module: Any, expert: int) -> np.ndarray:
    parts = (module.weight[expert], module.scales[expert], module.biases[expert])
    return np.array(mx.dequantize(*parts, module.group_size, module.bits), np.float64)


def test_groups_of_the_router_stay_apart_and_equal(tmp_path: Path, words: Path) -> None:
    model = Model(save_checkpoint("deepseek_v3", tmp_path / "source", experts=16), words)
    groups = model.router.layers[0].groups
    assert groups is not None and groups.count > 1
    size = 16 // groups.count
    for grouping in GROUPINGS:
        for layer in model.plan(16 - groups.count, grouping=grouping).layers:
            owners = [group.experts[0] // size for group in layer.groups]
            assert owners == sorted(owners)
            assert all(len({e // size for e in group.experts}) == 1 for group in layer.groups)
    with pytest.raises(UsageError, match=f"give a multiple of {groups.count}"):
        model.plan(15)


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ({"grouping": "magic"}, "no grouping 'magic'; choose one of complete"),
        ({"weights": "magic"}, "no weights 'magic'"),
        ({"align": "magic"}, "no align 'magic'"),
        ({"router_rows": "magic"}, "no router rows 'magic'"),
        ({"grouping": "ream", "similarity": {"weights": 1.0}}, "similarity of its own"),
    ],
)
def test_choices_that_cannot_be(choices: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Merging(**choices)


def test_what_a_merge_needs_is_asked_for(twins: Model) -> None:
    with pytest.raises(UsageError, match="needs a sample of layer"):
        plan_merge_to(twins.calibration, 8, merging=Merging(align="weights"))
    with pytest.raises(UsageError, match=r"complete linkage .* alone can promise"):
        plan_merge(twins.calibration, 0.8, merging=Merging(grouping="hc-smoe"))
    with pytest.raises(UsageError, match="16 experts of 16 cannot be kept"):
        twins.plan(16)
    without = [replace(each, router_inputs=None) for each in twins.samples]
    with pytest.raises(UsageError, match="sample with router_inputs"):
        plan_merge_to(twins.calibration, 8, merging=Merging(), samples=without)


def edited(plan: Any, change: Any) -> dict[str, Any]:
    content = json.loads(plan.to_json())
    group = next(g for g in content["layers"][0]["groups"] if "weights" in g)
    change(group)
    return content


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda g: g["orders"].pop(), '"orders" must be a list with a text'),
        (lambda g: g.update(orders=["0-63", "x"]), "no number and no range"),
        (lambda g: g.update(orders=[None, "0-62"]), "each of the channels 0 to 63 once"),
        (lambda g: g.update(orders=[None, "0-62 0"]), "each of the channels 0 to 63 once"),
        (lambda g: g.update(router_row=15), "one of the experts of the group"),
        (lambda g: g.update(router_row={"bias": 1.0}), 'no "weight"'),
        (lambda g: g["router_row"].update(weight="!"), "no base64 of float32"),
        (lambda g: g["router_row"].update(bias="high"), '"bias" is no number'),
        (
            lambda g: g.update(router_row=RouterRow.of(np.array([np.nan])).to_dict()),
            "NaN or infinity",
        ),
    ],
)
def test_a_slip_of_the_pen_is_found(twins: Model, change: Any, message: str) -> None:
    plan = twins.plan(8, align="weights")
    with pytest.raises(UsageError, match=message):
        read_plan(edited(plan, change))


def test_only_merged_experts_have_orders(twins: Model) -> None:
    content = json.loads(twins.plan(12, align="weights").to_json())
    single = next(g for g in content["layers"][0]["groups"] if len(g["experts"]) == 1)
    single["orders"] = ["0-63"]
    with pytest.raises(UsageError, match="each expert of a merged group"):
        read_plan(content)


def test_a_row_of_another_length_is_refused(twins: Model, tmp_path: Path) -> None:
    plan = twins.plan(8)
    content = edited(plan, lambda g: g.update(router_row=RouterRow.of(np.zeros(10)).to_dict()))
    with pytest.raises(UsageError, match=r"has 10 numbers, but .* reads 64"):
        write(read_plan(content), twins.source, tmp_path / "smaller")


def test_a_plan_can_be_edited_to_another_row(twins: Model, tmp_path: Path) -> None:
    plan = twins.plan(8, align="both")
    content = edited(plan, lambda g: (g.pop("orders"), g.update(router_row=g["experts"][1])))
    again = read_plan(content)
    assert again.layers[0].groups[0].orders is None
    smaller = ExpertRouter.from_pretrained(write(again, twins.source, tmp_path / "smaller"))
    rows = smaller.layers[0].router.weight, twins.router.layers[0].router.weight
    assert bool(mx.array_equal(rows[0][0], rows[1][8]))


@pytest.mark.parametrize("align", ALIGNMENTS)
def test_the_whole_way_to_a_number_of_experts(
    align: str, twins: Model, words: Path, tmp_path: Path
) -> None:
    test = write_words(tmp_path / "test.jsonl", 4, 2)
    found = compress(
        twins.source,
        ratio=0.5,
        merge=True,
        merging=Merging(align=align),
        output=tmp_path / "smaller",
        calibration=words,
        evaluation=test,
    )
    assert found.plan.kind == "merge"
    assert found.plan.num_experts == 8
    assert found.verification is not None
    assert found.verification.loss.kl.value < 2e-3
    assert read_plan(tmp_path / "smaller" / "plan.json") == found.plan


def test_samples_hold_what_the_router_reads(twins: Model) -> None:
    sample: LayerSample = twins.samples[0]
    rows = np.array(sample.layer.router.weight, np.float64)
    expected = np.array(sample.router_inputs, np.float64) @ rows.T
    np.testing.assert_allclose(np.array(sample.logits), expected, atol=1e-4)


def test_a_fitted_row_is_stored_in_the_format_of_the_router(tmp_path: Path, words: Path) -> None:
    model = Model(save_checkpoint("qwen3_moe", tmp_path / "source", 8, 16), words)
    router = model.router.layers[0].router
    assert "scales" in router
    plan = model.plan(12)
    smaller = ExpertRouter.from_pretrained(write(plan, model.source, tmp_path / "smaller"))
    after = smaller.layers[0].router
    assert (after.bits, after.group_size) == (router.bits, router.group_size)
    for number, group in enumerate(plan.layers[0].groups):
        stored = [after[name][number : number + 1] for name in ("weight", "scales", "biases")]
        if not group.merged:
            old = router.weight[group.experts[0]]
            assert bool(mx.array_equal(stored[0][0], old))
            continue
        row = group.router_row.values()[None]
        expected = mx.quantize(mx.array(row), router.group_size, router.bits)
        assert all(bool(mx.array_equal(a, b)) for a, b in zip(stored, expected, strict=True))
