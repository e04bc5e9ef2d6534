"""Calibration statistics against independent calculations from captured values."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from moe_lens.compress import Calibration, calibrate, similarity
from moe_lens.compress.calibration.calibration import collect
from moe_lens.compress.calibration.sink import CalibrationSink, Tokens
from moe_lens.compress.statistics.statistics import LayerStatistics
from moe_lens.corpus import read_corpus
from moe_lens.errors import CaptureError, MoeLensError, UsageError
from moe_lens.families.seams import ExpertOutputs
from moe_lens.router import ExpertRouter
from moe_lens.streaming import Batch
from tiny_models import save_checkpoint
from twins import write_words

TOKENS = [[(7 * i + 3 * j) % 126 for i in range(30 + 7 * j)] for j in range(5)]


FAMILIES = [
    "qwen3_moe",  # softmax, renormalised
    "deepseek_v3",  # sigmoid with a selection bias, groups
    "longcat_flash",  # identity experts
    "gemma4",
    "gpt_oss",
    "dbrx",  # experts in a list
    "nemotron_h",
    "llama4",  # weights on the input
]


def open_tiny(name: str, folder: Path, experts: int = 8) -> ExpertRouter:
    return ExpertRouter.from_pretrained(save_checkpoint(name, folder / "model", experts=experts))


def statistics_of(
    router: ExpertRouter, tokens: Any, sampled: int = 10**6, **options: Any
) -> CalibrationSink:
    sink = CalibrationSink(router.layers, **options)
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
    FAMILIES,
)
def test_sums_equal_a_float64_calculation_from_captured_values(name: str, tmp_path: Path) -> None:
    router = open_tiny(name, tmp_path)
    sink = statistics_of(router, TOKENS, mean_outputs=True)
    seen = captured(router, "expert_ids", "expert_weights", "expert_outputs")
    assert sink.tokens == sum(map(len, TOKENS))
    for found in sink.statistics:
        ids, weights, outputs = seen[found.layer].values()
        routed = found.routed
        assert routed.tokens == len(ids)
        for expert in range(found.num_experts):
            chosen = ids == expert
            norms = np.sqrt((outputs[chosen] ** 2).sum(axis=-1))
            gates = np.ones_like(norms) if name == "llama4" else weights[chosen]
            assert found.counts[expert] == routed.counts[expert] == chosen.sum()
            expected = {
                "weight_sums": weights[chosen].sum(),
                "norm_sums": norms.sum(),
                "square_sums": (norms**2).sum(),
                "weighted_norm_sums": (gates * norms).sum(),
                "weighted_square_sums": (gates**2 * norms**2).sum(),
                "max_activations": np.abs(outputs[chosen]).max(initial=0.0),
                "output_sums": outputs[chosen].sum(axis=0),
            }
            for sums, value in expected.items():
                scale = np.abs(outputs[chosen]).sum(axis=0).max() if sums == "output_sums" else 0
                np.testing.assert_allclose(
                    getattr(routed, sums)[expert], value, rtol=1e-5, atol=1e-6 * scale
                )
            for other in range(found.num_experts):
                both = chosen.any(axis=1) & (ids == other).any(axis=1)
                assert found.together[expert, other] == both.sum()


def test_llama_4_outputs_carry_their_weight_once(tmp_path: Path) -> None:
    sink = statistics_of(open_tiny("llama4", tmp_path), TOKENS)
    for found in sink.statistics:
        np.testing.assert_array_equal(found.routed.weighted_norm_sums, found.routed.norm_sums)


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


@pytest.mark.parametrize("name", ["qwen3_moe", "deepseek_v3", "longcat_flash", "gpt_oss"])
def test_router_logits_and_all_outputs_are_summed(name: str, tmp_path: Path) -> None:
    router = open_tiny(name, tmp_path)
    sink = statistics_of(router, TOKENS, mean_outputs=True)
    seen = captured(router, "router_logits", "expert_inputs")
    for layer, found in zip(router.layers, sink.statistics, strict=True):
        logits, inputs = seen[layer.index].values()
        assert found.logit_gram is not None
        expected = logits.T @ logits
        np.testing.assert_allclose(
            found.logit_gram, expected, rtol=1e-5, atol=1e-6 * np.abs(expected).max()
        )
        if name == "qwen3_moe":
            means = answers(router, layer, inputs).mean(axis=0)
            np.testing.assert_allclose(
                found.mean_sampled_outputs(), means, rtol=1e-4, atol=1e-5 * np.abs(means).max()
            )
        routed = found.routed.mean_outputs()
        assert routed.shape == found.mean_sampled_outputs().shape
    plain = statistics_of(router, TOKENS[:1], similarity=False).statistics[0]
    assert plain.logit_gram is None
    with pytest.raises(UsageError, match="mean_outputs=True"):
        plain.mean_sampled_outputs()
    with pytest.raises(UsageError, match="mean_outputs=True"):
        plain.routed.mean_outputs()


def test_calibration_does_not_change_what_the_model_computes(tmp_path: Path) -> None:
    router = open_tiny("qwen3_moe", tmp_path)
    plain = router.forward([TOKENS[0]])
    mx.eval(plain)
    sink = CalibrationSink(router.layers)
    ids = np.array([TOKENS[0]], np.int32)
    tokens = replace(Tokens.plain(ids.size), sampled=np.ones(ids.size, bool))
    with router.recording(sink):
        (watched,) = router.forwards([Batch(ids, about=tokens)])
        mx.eval(watched)
    assert len(sink.statistics[0].sampled_ids) == ids.size
    after = router.forward([TOKENS[0]])
    assert sink.tokens == len(TOKENS[0])
    assert bool(mx.array_equal(plain, watched))
    assert bool(mx.array_equal(plain, after))


def test_a_model_that_changes_while_it_is_watched_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    router = open_tiny("qwen3_moe", tmp_path)
    corpus = read_corpus(write_words(tmp_path / "words.jsonl", 2, 0))
    multiply = ExpertOutputs.__mul__  # stands in the way only while somebody watches
    monkeypatch.setattr(ExpertOutputs, "__mul__", lambda *both: multiply(*both) * (1.0 + 1e-6))
    with pytest.raises(CaptureError, match="other logits while it is watched"):
        calibrate(router, corpus, similarity=False)


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
        np.testing.assert_allclose(
            found.routed.weighted_norm_sums, total.routed.weighted_norm_sums, rtol=1e-6
        )
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
    for one, other, total in zip(first.layers, second.layers, both.layers, strict=True):
        assert one.logit_gram is not None
        np.testing.assert_array_equal(total.logit_gram, one.logit_gram + other.logit_gram)
        np.testing.assert_array_equal(
            total.labels["a"].weighted_norm_sums,
            one.labels["a"].weighted_norm_sums + other.labels["a"].weighted_norm_sums,
        )
        np.testing.assert_array_equal(
            total.routed.max_activations,
            np.maximum(one.routed.max_activations, other.routed.max_activations),
        )
        assert total.halves is not None
        assert sum(half.tokens for half in total.halves) == both.tokens
    assert both.layer(1) is both.layers[0]
    with pytest.raises(UsageError, match="layer 0 has no routed experts"):
        both.layer(0)


def test_calibrations_that_collected_different_things_do_not_add_up(tmp_path: Path) -> None:
    router = open_tiny("qwen3_moe", tmp_path)
    corpus = read_corpus(write_words(tmp_path / "words.jsonl", 2, 0))
    one, other = (calibrate(router, corpus, similarity=asked) for asked in (True, False))
    with pytest.raises(UsageError, match="collected different things"):
        _ = one + other


def test_calibrations_of_two_models_do_not_add_up(tmp_path: Path) -> None:
    first = calibrated(open_tiny("qwen3_moe", tmp_path / "a"), tmp_path, 1)
    second = calibrated(open_tiny("qwen3_moe", tmp_path / "b", experts=16), tmp_path, 1)
    with pytest.raises(UsageError, match="two models"):
        _ = first + second


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
    from moe_lens.compress.statistics.similarity import compare_outputs

    outputs = np.zeros((1, 4, 3), np.float32)
    outputs[0, 2] = outputs[0, 3] = [1.0, 2.0, 3.0]
    ids = np.array([[0, 2]], np.uint16)
    sums, counts = compare_outputs(lambda x: mx.array(outputs), mx.zeros((1, 3)), ids, 4)
    assert sums[0, 1] == pytest.approx(1.0)
    assert sums[0, 2] == pytest.approx(0.0)
    assert sums[2, 3] == pytest.approx(1.0)
    assert counts[1, 3] == 0
