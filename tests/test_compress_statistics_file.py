"""Statistics that are kept and used again, and whether more text would change them."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.stats import spearmanr

from moe_lens.compress import Calibration, calibrate, compress
from moe_lens.compress.calibration.notes import calibration_notes
from moe_lens.compress.calibration.statistics_reuse import calibrate_once
from moe_lens.compress.pruning.pruning import plan_prune
from moe_lens.compress.statistics.array_file import read_arrays, write_arrays
from moe_lens.compress.statistics.convergence import rank_stability
from moe_lens.compress.statistics.routed_sums import RoutedSums
from moe_lens.compress.statistics.saliency import saliency
from moe_lens.compress.statistics.statistics import LayerStatistics
from moe_lens.compress.statistics.statistics_file import KIND, load_statistics, save_statistics
from moe_lens.corpus import Corpus, read_corpus
from moe_lens.errors import MoeLensError, UsageError
from moe_lens.router import ExpertRouter
from tiny_models import save_checkpoint
from twins import write_words

Opened = tuple[ExpertRouter, Corpus, Calibration]


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Opened:
    """A tiny model, a labelled text, and everything there is to know about both."""
    folder = tmp_path_factory.mktemp("statistics")
    router = ExpertRouter.from_pretrained(save_checkpoint("qwen3_moe", folder / "model"))
    corpus = read_corpus(write_words(folder / "words.jsonl", 12, 1))
    return router, corpus, calibrate(router, corpus, mean_outputs=True)


def same_sums(first: RoutedSums, second: RoutedSums) -> None:
    for field in fields(RoutedSums):
        np.testing.assert_array_equal(getattr(first, field.name), getattr(second, field.name))


def same(first: LayerStatistics, second: LayerStatistics) -> None:
    assert list(first.labels) == list(second.labels)
    for label, sums in first.labels.items():
        same_sums(sums, second.labels[label])
    assert first.halves is not None
    assert second.halves is not None
    for one, other in zip(first.halves, second.halves, strict=True):
        same_sums(one, other)
    for name in ("together", "cosine_sums", "cosine_counts", "sampled_ids", "logit_gram"):
        one, other = getattr(first, name), getattr(second, name)
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(one, other)
    np.testing.assert_array_equal(first.sampled_output_sums, second.sampled_output_sums)


def test_a_file_gives_back_every_bit(opened: Opened, tmp_path: Path) -> None:
    _, _, found = opened
    save_statistics(found, tmp_path / "kept.safetensors")
    again = load_statistics(tmp_path / "kept.safetensors")
    assert (again.model, again.corpus, again.collected) == (
        found.model,
        found.corpus,
        found.collected,
    )
    for one, other in zip(found.layers, again.layers, strict=True):
        same(one, other)
    assert plan_prune(again, 0.5).to_json() == plan_prune(found, 0.5).to_json()
    assert [path.name for path in tmp_path.iterdir()] == ["kept.safetensors"]


def test_statistics_are_read_once(
    opened: Opened, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    router, corpus, _ = opened
    path, said = tmp_path / "kept", []
    first = calibrate_once(router, corpus, path, similarity=False, say=said.append)

    def never(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("the text was read again")

    monkeypatch.setattr("moe_lens.compress.calibration.statistics_reuse.calibrate", never)
    again = calibrate_once(router, corpus, path, similarity=False, say=said.append)
    same_sums(first.layers[0].routed, again.layers[0].routed)
    assert "are kept in" in said[0]
    assert "are used again" in said[1]


def test_statistics_that_hold_more_will_do(opened: Opened, tmp_path: Path) -> None:
    router, corpus, found = opened
    save_statistics(found, tmp_path / "kept")
    again = calibrate_once(router, corpus, tmp_path / "kept", similarity=False)
    assert again.collected.similarity
    same(again.layers[0], found.layers[0])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"similarity": True}, "lack similarities"),
        ({"mean_outputs": True}, "lack mean outputs"),
        ({"sequence_length": 9}, "--sequence-length 512, now it is 9"),
        ({"seed": 5}, "--seed 0, now it is 5"),
        ({"stop_at": 0.5}, "--stop-at None, now it is 0.5"),
    ],
)
def test_statistics_read_in_another_way_are_refused(
    changes: dict[str, Any], message: str, opened: Opened, tmp_path: Path
) -> None:
    router, corpus, _ = opened
    path = tmp_path / "kept"
    calibrate_once(router, corpus, path, similarity=False)
    before = path.read_bytes()
    with pytest.raises(UsageError, match=message):
        calibrate_once(router, corpus, path, **{"similarity": False, **changes})
    assert path.read_bytes() == before


def test_statistics_of_another_model_or_text_are_refused(opened: Opened, tmp_path: Path) -> None:
    router, corpus, _ = opened
    path = tmp_path / "kept"
    calibrate_once(router, corpus, path, similarity=False)
    other = ExpertRouter.from_pretrained(save_checkpoint("mixtral", tmp_path / "other"))
    with pytest.raises(UsageError, match="statistics of another model"):
        calibrate_once(other, corpus, path, similarity=False)
    text = read_corpus(write_words(tmp_path / "other.jsonl", 3, 9))
    with pytest.raises(UsageError, match="statistics of another text"):
        calibrate_once(router, text, path, similarity=False)


def test_files_that_hold_no_statistics_are_refused(opened: Opened, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no statistics at"):
        load_statistics(tmp_path / "nothing")
    (tmp_path / "text").write_text("hello")
    with pytest.raises(MoeLensError, match="is damaged"):
        load_statistics(tmp_path / "text")
    save_statistics(opened[2], tmp_path / "half")
    whole = (tmp_path / "half").read_bytes()
    (tmp_path / "half").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(MoeLensError, match="is damaged"):
        load_statistics(tmp_path / "half")
    model = opened[0].path
    assert model is not None
    with pytest.raises(MoeLensError, match="holds no calibration"):
        load_statistics(Path(model) / "model.safetensors")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c, a: c.update(layers=[]), "layers are missing"),
        (lambda c, a: c["layers"][0].update(labels=[]), "layers are missing or of the wrong kind"),
        (lambda c, a: c["layers"][0].update(halves=[1]), "has not two halves"),
        (lambda c, a: c["layers"].append(c["layers"][0]), "has a layer twice"),
        (lambda c, a: c["model"].update(num_experts=7), r"is int64 \[8, 8\], which cannot be"),
        (lambda c, a: c["model"].pop("name"), "it is incomplete"),
        (lambda c, a: c["collected"].update(similarity=1), '"collected" is missing or of the'),
        (lambda c, a: a.pop("layers.1.together"), "it has no layers.1.together"),
        (lambda c, a: a.update({"layers.1.cosine_sums": np.zeros(3)}), "cosine_sums is float64"),
        (lambda c, a: a.update({"layers.1.logit_gram": np.zeros((2, 2))}), "logit_gram is float64"),
        (
            lambda c, a: a.update({"layers.1.sampled_ids": np.full((2, 2), 99, np.uint16)}),
            "layer 1 counts what cannot be",
        ),
    ],
)
def test_statistics_that_contradict_themselves(
    opened: Opened, tmp_path: Path, change: Any, message: str
) -> None:
    path = tmp_path / "statistics.safetensors"
    save_statistics(opened[2], path)
    content, arrays = read_arrays(path, KIND)
    change(content, arrays)
    write_arrays(path, KIND, content, arrays)
    with pytest.raises(MoeLensError, match=message):
        load_statistics(path)


def test_compress_uses_the_file(opened: Opened, tmp_path: Path) -> None:
    model = opened[0].path
    assert model is not None
    options: dict[str, Any] = {
        "ratio": 0.5,
        "calibration": write_words(tmp_path / "learn.jsonl", 8, 3),
        "evaluation": write_words(tmp_path / "test.jsonl", 4, 4),
        "statistics_file": tmp_path / "kept",
        "dry_run": True,
    }
    first, again = (compress(model, method="reap", **options) for _ in range(2))
    assert again.plan == first.plan
    assert any("are used again" in note for note in again.notes)
    frequency = compress(model, method="frequency", **options)
    assert frequency.plan.settings["method"] == "frequency"
    with pytest.raises(UsageError, match="another text"):
        compress(model, method="reap", **{**options, "sample_size": 4})


def test_halves_are_whole_prompts_and_add_up(opened: Opened) -> None:
    _, _, found = opened
    for layer in found.layers:
        assert layer.halves is not None
        first, second = layer.halves
        np.testing.assert_array_equal(first.counts + second.counts, layer.counts)
        np.testing.assert_allclose(
            first.weight_sums + second.weight_sums, layer.routed.weight_sums, rtol=1e-12
        )
        assert {first.tokens, second.tokens} == {found.tokens // 2}


def test_rank_stability_is_the_correlation_of_both_halves(opened: Opened) -> None:
    _, _, found = opened
    stability = rank_stability(found.layers, "gate-sum")
    for layer in found.layers:
        assert layer.halves is not None
        first, second = (half.weight_sums for half in layer.halves)
        assert stability[layer.layer] == pytest.approx(spearmanr(first, second).statistic)
    alike = replace(found.layers[0], halves=(found.layers[0].routed, found.layers[0].routed))
    assert rank_stability([alike]) == {alike.layer: pytest.approx(1.0)}
    # An expert that one half did not reach ranks below all others there, as in removal.
    first, second = found.layers[0].halves or (None, None)
    assert first is not None
    counts, sums = first.counts.copy(), first.weighted_norm_sums.copy()
    counts[2] = sums[2] = 0
    missed = replace(first, counts=counts, weighted_norm_sums=sums)
    lowest = [half.weighted_norm_sums / np.maximum(half.counts, 1) for half in (missed, second)]
    expected = spearmanr(*lowest).statistic
    assert rank_stability([replace(alike, halves=(missed, second))]) == {
        alike.layer: pytest.approx(expected)
    }
    empty = LayerStatistics.empty(0, 8, 2)
    with pytest.raises(UsageError, match="halves of the text"):
        rank_stability([empty])
    with pytest.raises(UsageError, match="does not come from the sums"):
        rank_stability(found.layers, "greedy")


def test_unstable_rankings_are_said(opened: Opened) -> None:
    _, _, found = opened
    layer = found.layers[0]
    assert layer.halves is not None
    first, _ = layer.halves
    turned = replace(first, weighted_norm_sums=1 / (1 + first.weighted_norm_sums))
    changed = replace(found, layers=(replace(layer, halves=(first, turned)), *found.layers[1:]))
    plan = plan_prune(changed, 0.5)
    notes = calibration_notes(changed, plan)
    assert any(f"experts of layer {layer.layer} differently" in note for note in notes)
    assert plan.evidence["rank_stability"][str(layer.layer)] < 0.9


def test_one_prompt_has_no_halves(opened: Opened, tmp_path: Path) -> None:
    router, _, _ = opened
    found = calibrate(router, read_corpus(write_words(tmp_path / "one.jsonl", 1, 1)))
    assert set(rank_stability(found.layers).values()) == {0.0}
    notes = calibration_notes(found, plan_prune(found, 0.25))
    assert any("is one prompt" in note for note in notes)
    assert not any("differently" in note for note in notes)


def test_calibration_stops_when_the_ranking_is_stable(
    opened: Opened, monkeypatch: pytest.MonkeyPatch
) -> None:
    router, corpus, whole = opened
    monkeypatch.setattr("moe_lens.compress.calibration.calibration.STOP_TOKENS", 100)
    never = calibrate(router, corpus, similarity=False, stop_at=1.0)
    assert never.tokens == whole.tokens
    for one, other in zip(never.layers, whole.layers, strict=True):
        np.testing.assert_array_equal(one.counts, other.counts)
    monkeypatch.setattr(
        "moe_lens.compress.calibration.calibration.rank_stability", lambda layers: {1: 0.9, 2: 0.8}
    )
    early = calibrate(router, corpus, similarity=False, stop_at=0.8)
    assert 0 < early.tokens <= 100
    assert early.tokens == sum(sums.tokens for sums in early.layers[0].labels.values())
    assert early.corpus.prompts < whole.corpus.prompts
    late = calibrate(router, corpus, similarity=False, stop_at=0.81)
    assert late.tokens == whole.tokens
    with pytest.raises(UsageError, match="lies between 0 and 1"):
        calibrate(router, corpus, stop_at=1.5)


def test_few_tokens_are_named(opened: Opened) -> None:
    _, _, found = opened
    counts = found.layers[0].counts.copy()
    few = int(counts.argmin())
    least = int(counts[few])
    assert found.uncertain(least + 1)[found.layers[0].layer] == tuple(
        np.flatnonzero(counts == least).tolist()
    )
    reap = saliency(found.layers[0], "reap")
    assert not np.isnan(reap[few])
