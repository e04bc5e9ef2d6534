"""Channels inside the experts: what is seen of them, their importance, and plans without some."""

from __future__ import annotations

import contextlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from family_cases import Raw
from moe_lens.compress import (
    ChannelCalibration,
    Plan,
    calibrate_channels,
    plan_channels,
    read_plan,
)
from moe_lens.compress.plan.ranges import read_ranges, write_ranges
from moe_lens.compress.pruning.channels import FEWEST_TOKENS, channel_importance, most_important
from moe_lens.corpus import read_corpus
from moe_lens.errors import MoeLensError, UsageError
from moe_lens.router import ExpertRouter
from tiny_models import build, save_checkpoint
from twins import merge_plan, write_words

TOKENS = [[(7 * i + 3 * j) % 126 for i in range(30 + 7 * j)] for j in range(5)]


def open_tiny(name: str, folder: Path, quantise: int | None = None) -> ExpertRouter:
    return ExpertRouter.from_pretrained(save_checkpoint(name, folder / "source", quantise))


def text(folder: Path, prompts: int = 12, words: int = 40) -> Any:
    return read_corpus(write_words(folder / "words.jsonl", prompts, 0, words=words))


def raw(router: ExpertRouter, tokens: list[int], *values: str) -> dict[tuple[str, int], np.ndarray]:
    """Values of one forward in the block's own slots, as float64."""
    sink = Raw(*values)
    with router.recording(sink):
        mx.eval(router.forward([tokens]))
    return {
        key: np.array(value).astype(np.float64 if value.dtype == mx.float32 else np.int64)
        for key, value in sink.forwards[0].items()
    }


# What is seen ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    ["qwen3_moe", "gpt_oss", "dbrx", "llama4", "longcat_flash", "muse_spark", "bailing_moe"],
)
@pytest.mark.parametrize("length", [5, 90], ids=["as it comes", "sorted by expert"])
def test_the_down_projection_of_the_channels_seen_is_the_experts_output(
    name: str, length: int
) -> None:
    model, config = build(name)
    router = ExpertRouter(model, None, config)
    values = ("expert_ids", "expert_outputs", "expert_channels")
    seen = raw(router, [(7 * i) % 126 for i in range(length)], *values)
    for layer in router.layers:
        ids, outputs, channels = (seen[value, layer.index] for value in values)
        for token, slot in np.argwhere(ids < layer.num_experts):
            expert = ids[token, slot]
            listed = layer.list_experts
            down = layer.down_projections[expert if listed else 0]
            weight = np.array(down.weight if listed else down.weight[expert]).astype(np.float64)
            expected = weight @ channels[token, slot]
            if "bias" in down:
                expected += np.array(down.bias[expert])
            np.testing.assert_allclose(outputs[token, slot], expected, rtol=1e-4, atol=1e-5)


def test_down_projections_are_left_alone_unless_channels_are_wanted(tmp_path: Path) -> None:
    router = open_tiny("qwen3_moe", tmp_path)
    down = router.layers[0].down_projections[0]
    plain = type(down)
    masks = {router.layers[0].index: mx.ones((8, 64))}
    with router.recording(Raw("expert_ids")):
        assert type(down) is plain
        with router.recording(Raw("expert_channels")):
            assert type(down) is not plain
            with router.channel_masks(masks):
                assert type(down) is not plain
            assert type(down) is not plain
        assert type(down) is plain
    with contextlib.suppress(RuntimeError), router.channel_masks(masks):
        assert type(down) is not plain
        raise RuntimeError
    assert type(down) is plain


def test_masks_of_another_shape_are_refused(tmp_path: Path) -> None:
    router = open_tiny("qwen3_moe", tmp_path)
    with pytest.raises(UsageError, match=r"experts, width"), router.channel_masks({1: mx.ones(8)}):
        pass


# Importance --------------------------------------------------------------------------------


def silu(values: np.ndarray) -> np.ndarray:
    return values / (1 + np.exp(-values))


def test_sums_equal_a_float64_calculation_from_captured_values(tmp_path: Path) -> None:
    router = open_tiny("qwen3_moe", tmp_path)
    corpus = text(tmp_path)
    found = calibrate_channels(router, corpus)
    tokens = corpus.tokenize(router.tokenizer, 512, False)
    assert found.corpus.tokens == sum(map(len, tokens))
    for layer, statistics in zip(router.layers, found.layers, strict=True):
        gate, up, down = (
            np.array(getattr(layer.experts, name).weight).astype(np.float64)
            for name in ("gate_proj", "up_proj", "down_proj")
        )
        squares, weighted, counts = np.zeros((8, 64)), np.zeros((8, 64)), np.zeros(8, int)
        for ids in tokens:
            with router.capture("expert_ids", "expert_weights", "expert_inputs") as seen:
                mx.eval(router.forward([ids]))
            here = seen[layer.index]
            inputs = np.asarray(here.expert_inputs).astype(np.float64)
            for experts, weights, x in zip(
                here.expert_ids, here.expert_weights, inputs, strict=True
            ):
                for expert, weight in zip(experts, weights.astype(np.float64), strict=True):
                    h = silu(gate[expert] @ x) * (up[expert] @ x)
                    squares[expert] += h**2
                    weighted[expert] += (weight * h) ** 2
                    counts[expert] += 1
        np.testing.assert_array_equal(statistics.counts, counts)
        np.testing.assert_allclose(statistics.squares, squares, rtol=1e-5)
        np.testing.assert_allclose(statistics.weighted_squares, weighted, rtol=1e-5)
        columns = (down**2).sum(axis=1)
        rows = (gate**2).sum(axis=2) * (up**2).sum(axis=2)
        np.testing.assert_allclose(statistics.column_squares, columns, rtol=1e-5)
        np.testing.assert_allclose(statistics.row_squares, rows, rtol=1e-5)
        measured = counts >= FEWEST_TOKENS
        assert measured.any()
        expected = np.where(measured[:, None], weighted * columns, rows * columns)
        np.testing.assert_allclose(channel_importance(statistics), expected, rtol=1e-5)


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss", "dbrx", "deepseek_v3", "llama4"])
def test_importance_is_the_squared_change_of_the_layers_output(name: str, tmp_path: Path) -> None:
    router = open_tiny(name, tmp_path)
    corpus = text(tmp_path)
    layer = router.layers[0]  # what it reads does not change when its channels do
    statistics = calibrate_channels(router, corpus).layer(layer.index)
    expert = int(np.argmax(statistics.counts))
    importance = channel_importance(statistics)[expert]
    for channel in (0, 17, 63):
        mask = np.ones((8, 64), np.float32)
        mask[expert, channel] = 0
        change = 0.0
        for ids in corpus.tokenize(router.tokenizer, 512, False):
            before = raw(router, ids, "routed_output")["routed_output", layer.index]
            with router.channel_masks({layer.index: mx.array(mask)}):
                after = raw(router, ids, "routed_output")["routed_output", layer.index]
            change += ((before - after) ** 2).sum()
        assert importance[channel] == pytest.approx(change, rel=1e-3)


def test_packed_weights_are_measured_unpacked(tmp_path: Path) -> None:
    router = open_tiny("qwen3_moe", tmp_path, 4)
    statistics = calibrate_channels(router, text(tmp_path, 2)).layers[0]
    down: Any = router.layers[0].experts.down_proj
    weight = mx.dequantize(
        down.weight, down.scales, down.biases, down.group_size, down.bits, dtype=mx.float32
    )
    expected = (np.array(weight).astype(np.float64) ** 2).sum(axis=1)
    np.testing.assert_allclose(statistics.column_squares, expected, rtol=1e-5)


def test_statistics_of_two_texts_add_up(tmp_path: Path) -> None:
    router = open_tiny("qwen3_moe", tmp_path)
    first = calibrate_channels(router, read_corpus(write_words(tmp_path / "a.jsonl", 5, 1)))
    second = calibrate_channels(router, read_corpus(write_words(tmp_path / "b.jsonl", 4, 2)))
    (tmp_path / "both.jsonl").write_text(
        (tmp_path / "a.jsonl").read_text() + (tmp_path / "b.jsonl").read_text()
    )
    both = calibrate_channels(router, read_corpus(tmp_path / "both.jsonl"))
    added = first + second
    assert added.corpus.tokens == both.corpus.tokens
    for one, other in zip(added.layers, both.layers, strict=True):
        np.testing.assert_array_equal(one.counts, other.counts)
        np.testing.assert_allclose(one.weighted_squares, other.weighted_squares, rtol=1e-5)
        np.testing.assert_array_equal(one.column_squares, other.column_squares)


def test_calibration_inside_an_override_is_refused(tmp_path: Path) -> None:
    router = open_tiny("qwen3_moe", tmp_path)
    with router.override(k=1), pytest.raises(UsageError, match="outside of `override`"):
        calibrate_channels(router, text(tmp_path, 2))


def test_broken_weights_are_named(tmp_path: Path) -> None:
    router = open_tiny("qwen3_moe", tmp_path)
    layer = router.layers[0]
    weight = np.array(layer.experts.up_proj.weight)
    weight[:, 3] = np.inf
    layer.experts.up_proj.weight = mx.array(weight)
    with pytest.raises(MoeLensError, match=f"layer {layer.index} is NaN or infinite"):
        calibrate_channels(router, text(tmp_path, 4))


# Plans -------------------------------------------------------------------------------------


def test_ties_go_to_the_lower_channel() -> None:
    assert most_important(np.array([1.0, 5.0, 1.0, 7.0, 1.0]), 3) == (0, 1, 3)


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory: pytest.TempPathFactory) -> tuple[ExpertRouter, ChannelCalibration]:
    folder = tmp_path_factory.mktemp("channels")
    router = open_tiny("qwen3_moe", folder)
    return router, calibrate_channels(router, text(folder))


def test_the_most_important_channels_of_each_expert_stay(calibrated: Any) -> None:
    _, calibration = calibrated
    plan = plan_channels(calibration, 24)
    assert (plan.kind, plan.expert_width, plan.num_experts) == ("channels", 24, 8)
    for layer in plan.layers:
        importance = channel_importance(calibration.layer(layer.layer))
        kept_sum = 0.0
        for expert, kept in enumerate(layer.channels or ()):
            assert len(kept) == 24
            rest = sorted(set(range(64)) - set(kept))
            assert importance[expert, list(kept)].min() >= importance[expert, rest].max()
            kept_sum += importance[expert, list(kept)].sum()
        share = plan.evidence["kept_importance"][str(layer.layer)]
        assert share == pytest.approx(kept_sum / importance.sum(), abs=1e-6)
    assert "64 -> 24 channels in each expert of 2 layers (62% removed)" in plan.summary()


def test_experts_with_few_tokens_are_judged_by_their_weights_and_named(tmp_path: Path) -> None:
    router = open_tiny("qwen3_moe", tmp_path)
    calibration = calibrate_channels(router, text(tmp_path, 1, words=8))
    plan = plan_channels(calibration, 32)
    for layer in plan.layers:
        statistics = calibration.layer(layer.layer)
        few = [e for e in range(8) if statistics.counts[e] < FEWEST_TOKENS]
        assert few
        assert plan.evidence["channels_by_weights_only"][str(layer.layer)] == write_ranges(few)
        by_weights = statistics.row_squares * statistics.column_squares
        for expert in few:
            assert layer.channels is not None
            assert layer.channels[expert] == most_important(by_weights[expert], 32)


def test_a_plan_of_another_model_or_a_merge_is_refused(calibrated: Any) -> None:
    router, calibration = calibrated
    pairs = [(0, 1), (2,), (3,), (4,), (5,), (6,), (7,)]
    merged = merge_plan(router, dict.fromkeys(router.info.moe_layers, pairs))
    with pytest.raises(UsageError, match="only experts that stay as they are"):
        plan_channels(calibration, 32, merged)
    other = replace(merged, model=replace(merged.model, fingerprint="another"))
    with pytest.raises(UsageError, match="different models"):
        plan_channels(calibration, 32, other)
    with pytest.raises(UsageError, match="above 0 and below the 64 channels"):
        plan_channels(calibration, 64)


def test_ranges_are_read_as_they_are_written() -> None:
    numbers = (0, 1, 2, 3, 7, 9, 10, 12)
    assert write_ranges(numbers) == "0-3 7 9-10 12"
    assert read_ranges("0-3 7 9-10 12") == numbers
    for wrong in ("3-1", "a", "1-", "-1", "0-9999999"):
        with pytest.raises(ValueError, match="range"):
            read_ranges(wrong)


def changed(plan: Plan, **fields: Any) -> dict[str, Any]:
    """The plan's JSON with some keys of its first layer changed."""
    content = json.loads(plan.to_json())
    content["layers"][0] |= fields
    return content


def test_a_plan_survives_its_json(calibrated: Any) -> None:
    plan = plan_channels(calibrated[1], 24)
    assert read_plan(json.loads(plan.to_json())) == plan


@pytest.mark.parametrize(
    ("channels", "message"),
    [
        ("0-23", "must be a list"),
        (["0-23"] * 7, '"channels" for 7 of 8 groups'),
        (["0-22"] + ["0-23"] * 7, "keeps 23 channels"),
        (["0-22 64"] + ["0-23"] * 7, "outside 0 to 63"),
        (["1 0 2-23"] + ["0-23"] * 7, "must ascend"),
        (["0-22 22"] + ["0-23"] * 7, "must ascend"),
        (["none"] + ["0-23"] * 7, "no number and no range"),
    ],
)
def test_a_slip_in_the_channels_of_a_plan_is_found(
    channels: Any, message: str, calibrated: Any
) -> None:
    plan = plan_channels(calibrated[1], 24)
    with pytest.raises(UsageError, match=message):
        read_plan(changed(plan, channels=channels))


def test_channels_and_width_of_a_plan_go_together(calibrated: Any) -> None:
    content = json.loads(plan_channels(calibrated[1], 24).to_json())
    del content["expert_width"]
    with pytest.raises(UsageError, match="go together"):
        read_plan(content)
