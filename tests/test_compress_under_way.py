"""A calibration that is stopped goes on where it was, and its sums are the same to the last bit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moe_lens.compress import calibrate, calibrate_channels
from moe_lens.compress.calibration import calibration, channel_calibration, under_way
from moe_lens.compress.statistics.channel_file import load_channels, save_channels
from moe_lens.compress.statistics.statistics_file import save_statistics
from moe_lens.corpus import Corpus, read_corpus
from moe_lens.errors import MoeLensError
from moe_lens.router import ExpertRouter
from tiny_models import save_checkpoint
from twins import write_words


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    place = tmp_path_factory.mktemp("text")
    return read_corpus(write_words(place / "learn.jsonl", 12, 1, labels="abc"))


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint("qwen3_moe", tmp_path_factory.mktemp("model"), experts=16)


@pytest.fixture(params=[False, True], ids=["whole", "streamed"])
def router(source: Path, request: pytest.FixtureRequest) -> ExpertRouter:
    return ExpertRouter.from_pretrained(source, stream=request.param)


@pytest.fixture(autouse=True)
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """One prompt a batch, some batches a wave, and the sums kept after every wave."""
    for module in (calibration, channel_calibration):
        monkeypatch.setattr(module, "_BATCH_BYTES", 1)
    monkeypatch.setattr("moe_lens.loaded_model.wave_tokens", lambda hidden: 100)
    monkeypatch.setattr(under_way, "SECONDS", 0.0)
    monkeypatch.setattr(under_way, "_SHARE", 0.0)


def often_stopped(run: Callable[..., Any], path: Path) -> tuple[Any, list[int]]:
    """What `run` gives when each try is stopped a little later, and where the tries began."""
    began: list[int] = []
    for tries in range(40):
        done: list[int] = []

        def progress(now: int, total: int | None, done: list[int] = done) -> None:
            done.append(now)
            if len(done) == 6:
                raise KeyboardInterrupt

        try:
            found = run(under_way=path, progress=progress if tries < 39 else None)
        except KeyboardInterrupt:
            began.append(done[0])
        else:
            return found, began
    raise AssertionError("it never came to its end")


@pytest.mark.parametrize("options", [{}, {"similarity": False}, {"mean_outputs": True}])
def test_sums_are_those_of_one_pass(
    options: dict[str, Any], router: ExpertRouter, text: Corpus, tmp_path: Path
) -> None:
    def run(**more: Any) -> Any:
        return calibrate(router, text, seed=3, **options, **more)

    save_statistics(run(), tmp_path / "whole")
    found, began = often_stopped(run, tmp_path / "under way")
    save_statistics(found, tmp_path / "parts")
    assert (tmp_path / "parts").read_bytes() == (tmp_path / "whole").read_bytes()
    assert len(set(began)) == len(began) > 1
    assert began == sorted(began)


def test_channels_are_those_of_one_pass(router: ExpertRouter, text: Corpus, tmp_path: Path) -> None:
    def run(**more: Any) -> Any:
        return calibrate_channels(router, text, **more)

    save_channels(run(), tmp_path / "whole")
    found, began = often_stopped(run, tmp_path / "under way")
    save_channels(found, tmp_path / "parts")
    assert (tmp_path / "parts").read_bytes() == (tmp_path / "whole").read_bytes()
    assert len(set(began)) == len(began) > 1


def test_a_pass_that_stops_early_stops_at_the_same_place(
    router: ExpertRouter, text: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calibration, "STOP_TOKENS", 100)
    asked: list[int] = []

    def stability(layers: Any) -> dict[int, float]:
        asked.append(layers[0].routed.tokens)
        return {1: 0.9 if asked[-1] > 200 else 0.1}

    monkeypatch.setattr(calibration, "rank_stability", stability)

    def run(**more: Any) -> Any:
        return calibrate(router, text, similarity=False, stop_at=0.8, **more)

    save_statistics(run(), tmp_path / "whole")
    once = list(asked)
    asked.clear()
    found, _ = often_stopped(run, tmp_path / "under way")
    save_statistics(found, tmp_path / "parts")
    assert (tmp_path / "parts").read_bytes() == (tmp_path / "whole").read_bytes()
    assert list(dict.fromkeys(asked)) == once
    assert len(once) > 1
    assert found.tokens == once[-1] < sum(map(len, text.tokenize(router.tokenizer, 512)))


def test_the_sums_of_another_pass_are_not_used(
    router: ExpertRouter, text: Corpus, tmp_path: Path
) -> None:
    path = tmp_path / "under way"
    calibrate(router, text, under_way=path)
    other = calibrate(router, text, seed=1, under_way=path)
    plain = calibrate(router, text, seed=1)
    for one, two in zip(other.layers, plain.layers, strict=True):
        np.testing.assert_array_equal(one.cosine_sums, two.cosine_sums)
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(MoeLensError, match="is damaged"):
        calibrate(router, text, under_way=path)


def test_nothing_is_kept_before_it_is_time(
    router: ExpertRouter, text: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(under_way, "SECONDS", 1e9)
    calibrate(router, text, under_way=tmp_path / "under way")
    calibrate_channels(router, text, under_way=tmp_path / "under way")
    assert list(tmp_path.iterdir()) == []


def test_channels_are_kept_as_they_are(router: ExpertRouter, text: Corpus, tmp_path: Path) -> None:
    found = calibrate_channels(router, text)
    save_channels(found, tmp_path / "channels")
    again = load_channels(tmp_path / "channels")
    assert (again.model, again.corpus) == (found.model, found.corpus)
    for one, two in zip(again.layers, found.layers, strict=True):
        for field in fields(one):
            np.testing.assert_array_equal(getattr(one, field.name), getattr(two, field.name))
    save_statistics(calibrate(router, text), tmp_path / "statistics")
    with pytest.raises(MoeLensError, match="holds no channels"):
        load_channels(tmp_path / "statistics")
