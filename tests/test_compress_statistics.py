"""Calibration statistics against independent calculations from captured values."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from moe_lens.compress import Calibration, calibrate, similarity
from moe_lens.compress.calibration import collect
from moe_lens.compress.calibration_sink import CalibrationSink
from moe_lens.compress.saliency import saliency
from moe_lens.compress.statistics import LayerStatistics
from moe_lens.corpus import read_corpus
from moe_lens.errors import CaptureError, MoeLensError, UsageError
from moe_lens.router import ExpertRouter
from tiny_models import save_checkpoint
from twins import write_words

TOKENS = [[(7 * i + 3 * j) % 126 for i in range(30 + 7 * j)] for j in range(5)]


def open_tiny(name: str, folder: Path, experts: int = 8) -> ExpertRouter:
    return ExpertRouter.from_pretrained(save_checkpoint(name, folder / "model", experts=experts))


def statistics_of(router: ExpertRouter, tokens: Any, sampled: int = 10**6) -> CalibrationSink:
    sink = CalibrationSink(router.layers)
    collect(router, sink, tokens, sampled, seed=0)
    return sink


def captured(router: ExpertRouter, *values: str) -> dict[int, dict[str, np.ndarray]]:
    """The values of every layer for all tokens, one prompt at a time, as float64."""
    parts: dict[int, dict[str, list[np.ndarray]]] = {}
    for tokens in TOKENS:
        with router.capture(*values) as seen:
            mx.eval(router.forward([tokens]))
        for layer in router.layers:
            for value in values:
                found = np.asarray(getattr(seen[layer.index], value)).astype(np.float64)
                parts.setdefault(layer.index, {}).setdefault(value, []).append(found)
    return {
        layer: {value: np.concatenate(each) for value, each in found.items()}
        for layer, found in parts.items()
    }


@pytest.mark.parametrize(
    "name",
    ["qwen3_moe", "deepseek_v3", "longcat_flash", "gemma4", "gpt_oss", "dbrx", "nemotron_h"],
)
def test_sums_equal_a_float64_calculation_from_captured_values(name: str, tmp_path: Path) -> None:
    router = open_tiny(name, tmp_path)
    sink = statistics_of(router, TOKENS)
    seen = captured(router, "expert_ids", "expert_weights", "expert_outputs")
    assert sink.tokens == sum(map(len, TOKENS))
    for found in sink.statistics:
        ids, weights, outputs = seen[found.layer].values()
        for expert in range(found.num_experts):
            chosen = ids == expert
            norms = np.sqrt((outputs[chosen] ** 2).sum(axis=-1))
            assert found.counts[expert] == chosen.sum()
            np.testing.assert_allclose(found.weight_sums[expert], weights[chosen].sum(), rtol=1e-5)
            np.testing.assert_allclose(found.norm_sums[expert], norms.sum(), rtol=1e-5)
            np.testing.assert_allclose(
                found.weighted_norm_sums[expert], (weights[chosen] * norms).sum(), rtol=1e-5
            )
            for other in range(found.num_experts):
                both = chosen.any(axis=1) & (ids == other).any(axis=1)
                assert found.together[expert, other] == both.sum()


def test_llama_4_outputs_carry_their_weight_once(tmp_path: Path) -> None:
    sink = statistics_of(open_tiny("llama4", tmp_path), TOKENS)
    for found in sink.statistics:
        np.testing.assert_array_equal(found.weighted_norm_sums, found.norm_sums)


def answers(router: ExpertRouter, layer: Any, inputs: np.ndarray) -> np.ndarray:
    """[tokens, E, hidden] what every SwiGLU expert answers, in float64 numpy."""
    gate, up, down = (
        np.array(getattr(layer.experts, name).weight).astype(np.float64)
        for name in ("gate_proj", "up_proj", "down_proj")
    )
    found = []
    for e in range(layer.num_experts):
        opened = inputs @ gate[e].T
        found.append((opened / (1 + np.exp(-opened)) * (inputs @ up[e].T)) @ down[e].T)
    return np.stack(found, axis=1)


def test_output_similarity_equals_a_loop_over_tokens_and_pairs(tmp_path: Path) -> None:
    router = open_tiny("qwen3_moe", tmp_path)
    sink = statistics_of(router, TOKENS)
    seen = captured(router, "expert_ids", "expert_inputs")
    for layer, found in zip(router.layers, sink.statistics, strict=True):
        ids, inputs = seen[layer.index].values()
        outputs = answers(router, layer, inputs)
        result = similarity(found)
        for i in range(8):
            for j in range(8):
                cosines = []
                routed = [set(row) for row in ids.astype(int).tolist()]
                for token, chosen in enumerate(routed):
                    if {i, j} & chosen:
                        a, b = outputs[token, i], outputs[token, j]
                        cosines.append(max(0.0, a @ b / np.linalg.norm(a) / np.linalg.norm(b)))
                either = sum(bool({i, j} & chosen) for chosen in routed)
                both = sum({i, j} <= chosen for chosen in routed)
                assert found.cosine_counts[i, j] == len(cosines) == either
                if i != j:
                    np.testing.assert_allclose(result.outputs[i, j], np.mean(cosines), atol=1e-5)
                    np.testing.assert_allclose(result.overlap[i, j], both / either)
                    np.testing.assert_allclose(
                        result.total[i, j], (np.mean(cosines) + both / either) / 2, atol=1e-5
                    )


def test_calibration_does_not_change_what_the_model_computes(tmp_path: Path) -> None:
    router = open_tiny("qwen3_moe", tmp_path)
    plain = router.forward([TOKENS[0]])
    mx.eval(plain)
    sink = CalibrationSink(router.layers)
    sink.sampled = np.ones(len(TOKENS[0]), bool)
    with router.recording(sink):
        watched = router.forward([TOKENS[0]])
        mx.eval(watched)
    sink.compare_experts()
    after = router.forward([TOKENS[0]])
    assert sink.tokens == len(TOKENS[0])
    assert bool(mx.array_equal(plain, watched))
    assert bool(mx.array_equal(plain, after))


def test_pads_are_left_out(tmp_path: Path) -> None:
    router = open_tiny("qwen3_moe", tmp_path)
    together = statistics_of(router, TOKENS)
    one_by_one = [statistics_of(router, [tokens]).statistics for tokens in TOKENS]
    for place, found in enumerate(together.statistics):
        total = LayerStatistics.empty(found.layer, found.num_experts, 2)
        for each in one_by_one:
            total = total + each[place]
        np.testing.assert_array_equal(found.counts, total.counts)
        np.testing.assert_array_equal(found.together, total.together)
        np.testing.assert_array_equal(found.cosine_counts, total.cosine_counts)
        np.testing.assert_allclose(found.cosine_sums, total.cosine_sums, rtol=1e-6)
        np.testing.assert_allclose(found.weighted_norm_sums, total.weighted_norm_sums, rtol=1e-6)
        assert len(found.sampled_ids) == len(total.sampled_ids) == sum(map(len, TOKENS))


def test_every_expert_is_evaluated_on_a_bounded_sample(tmp_path: Path) -> None:
    router = open_tiny("qwen3_moe", tmp_path)
    few, again = (statistics_of(router, TOKENS, sampled=40) for _ in range(2))
    for found, other in zip(few.statistics, again.statistics, strict=True):
        assert found.sampled_ids.shape == (40, 2)
        assert found.cosine_counts.max() <= 40
        assert found.counts.sum() == 2 * sum(map(len, TOKENS))
        np.testing.assert_array_equal(found.cosine_sums, other.cosine_sums)


def calibrated(router: ExpertRouter, folder: Path, seed: int) -> Calibration:
    corpus = read_corpus(write_words(folder / f"words{seed}.jsonl", 6, seed))
    return calibrate(router, corpus)


def test_two_calibrations_add_up(tmp_path: Path) -> None:
    router = open_tiny("qwen3_moe", tmp_path)
    first, second = calibrated(router, tmp_path, 1), calibrated(router, tmp_path, 2)
    both = first + second
    assert both.tokens == first.tokens + second.tokens == 480
    assert both.corpus.fingerprint not in (first.corpus.fingerprint, second.corpus.fingerprint)
    np.testing.assert_array_equal(
        both.layers[0].counts, first.layers[0].counts + second.layers[0].counts
    )
    assert both.layer(1) is both.layers[0]
    with pytest.raises(UsageError, match="layer 0 has no routed experts"):
        both.layer(0)


def test_calibrations_of_two_models_do_not_add_up(tmp_path: Path) -> None:
    first = calibrated(open_tiny("qwen3_moe", tmp_path / "a"), tmp_path, 1)
    second = calibrated(open_tiny("qwen3_moe", tmp_path / "b", experts=16), tmp_path, 1)
    with pytest.raises(UsageError, match="two models"):
        _ = first + second


def test_saliencies(tmp_path: Path) -> None:
    found = statistics_of(open_tiny("qwen3_moe", tmp_path, experts=16), TOKENS[:1]).statistics[0]
    reap = saliency(found, "reap", 30)
    assert np.isnan(reap[found.counts == 0]).all()
    reached = found.counts > 0
    expected = found.weighted_norm_sums[reached] / found.counts[reached]
    np.testing.assert_array_equal(reap[reached], expected)
    np.testing.assert_array_equal(saliency(found, "frequency", 30), found.counts / 30)
    with pytest.raises(UsageError, match="reap, frequency"):
        saliency(found, "magic", 30)


def test_calibration_refuses_what_it_cannot_measure(tmp_path: Path) -> None:
    router = open_tiny("qwen3_moe", tmp_path)
    corpus = read_corpus(write_words(tmp_path / "words.jsonl", 2, 0))
    with router.override(k=1), pytest.raises(UsageError, match="outside of `override`"):
        calibrate(router, corpus)
    with pytest.raises(CaptureError, match="no tokens"):
        collect(router, CalibrationSink(router.layers), [[], []], 8, seed=0)


def test_an_expert_that_answers_nan_is_named(tmp_path: Path) -> None:
    router = open_tiny("qwen3_moe", tmp_path)
    projection = router.layers[1].experts.up_proj
    weight = np.array(projection.weight)
    weight[5, 0, 0] = np.nan
    projection.weight = mx.array(weight)
    corpus = read_corpus(write_words(tmp_path / "words.jsonl", 4, 0))
    with pytest.raises(MoeLensError, match="expert 5 of layer 2 answers with NaN"):
        calibrate(router, corpus, similarity=False)


def test_an_expert_that_answers_nothing_is_like_another_such_only() -> None:
    from moe_lens.compress.similarity import compare_outputs

    outputs = np.zeros((1, 4, 3), np.float32)
    outputs[0, 2] = outputs[0, 3] = [1.0, 2.0, 3.0]
    ids = np.array([[0, 2]], np.uint16)
    sums, counts = compare_outputs(lambda x: mx.array(outputs), mx.zeros((1, 3)), ids, 4)
    assert sums[0, 1] == pytest.approx(1.0)
    assert sums[0, 2] == pytest.approx(0.0)
    assert sums[2, 3] == pytest.approx(1.0)
    assert counts[1, 3] == 0
