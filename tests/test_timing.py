"""Stages are timed: how long each took, how fast the one that runs goes, and what it used."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from moe_lens import ExpertRouter
from moe_lens.compress import calibrate, calibrate_channels
from moe_lens.compress.checkpoint.checkpoint import write_checkpoint
from moe_lens.compress.resuming.whole_shards import WholeShards
from moe_lens.compress.tensors.parent import open_parent
from moe_lens.corpus import read_corpus
from moe_lens.machine.process import usage
from moe_lens.telling import Stage, begin
from moe_lens.timing import WINDOW, Stopwatch
from tiny_models import save_checkpoint
from twins import kept_per_layer, prune_plan, write_words

READING, WRITING = Stage("reading", "tokens"), Stage("writing", "bytes")


class Clock:
    """Seconds that pass when they are told to."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def watch(clock: Clock) -> Stopwatch:
    return Stopwatch(clock=clock)


def test_nothing_is_known_before_the_first_stage(watch: Stopwatch) -> None:
    assert watch.pace is None
    assert watch.timing().stages == ()


def test_speed_and_time_left(watch: Stopwatch, clock: Clock) -> None:
    progress = begin(watch, READING)
    assert progress is not None
    assert watch.pace is not None
    assert (watch.pace.total, watch.pace.per_second, watch.pace.seconds_left) == (None, None, None)
    clock.now += 4
    progress(200, 1000)
    assert (watch.pace.done, watch.pace.total, watch.pace.seconds) == (200, 1000, 4)
    assert watch.pace.per_second == 50
    assert watch.pace.seconds_left == 16
    clock.now += 3  # what is done meanwhile is not known; that time passes is
    assert watch.pace.seconds_left == 13
    clock.now += 60
    assert watch.pace.seconds_left == 0
    assert not watch.pace.finished
    progress(1000, 1000)
    assert watch.pace.finished


def test_the_speed_is_that_of_the_last_seconds(watch: Stopwatch, clock: Clock) -> None:
    progress = begin(watch, READING)
    assert progress is not None
    for second in range(1, 101):
        clock.now += 1
        progress(second * 100, 100_000)
    for second in range(1, int(WINDOW) + 1):
        clock.now += 1
        progress(10_000 + second * 7, 100_000)
    assert watch.pace is not None
    assert watch.pace.per_second == 7


def test_one_long_step_is_not_forgotten(watch: Stopwatch, clock: Clock) -> None:
    progress = begin(watch, READING)
    assert progress is not None
    for step in range(1, 4):
        clock.now += 5 * WINDOW
        progress(step * 600, 6000)
    assert watch.pace is not None
    assert watch.pace.per_second == pytest.approx(6.0)


def test_many_reports_hold_no_memory(watch: Stopwatch, clock: Clock) -> None:
    progress = begin(watch, WRITING)
    assert progress is not None
    for step in range(1, 100_001):
        clock.now += 1e-3
        progress(step, 200_000)
    assert watch.pace is not None
    assert watch.pace.per_second == pytest.approx(1000, rel=0.01)
    assert watch._running is not None
    assert len(watch._running._points) < 1000


def test_what_an_earlier_run_did_is_not_this_ones_speed(watch: Stopwatch, clock: Clock) -> None:
    progress = begin(watch, WRITING)
    assert progress is not None
    clock.now += 1
    progress(900, None)
    progress(900, 1000)
    clock.now += 5
    progress(950, 1000)
    assert watch.pace is not None
    assert (watch.pace.done, watch.pace.per_second, watch.pace.seconds_left) == (950, 10, 5)
    assert watch.timing().stages[0].done == 50
    progress(980, None)  # and there was some more
    clock.now += 2
    progress(990, 1000)
    assert (watch.pace.per_second, watch.pace.seconds_left) == (5, 2)
    assert watch.timing().stages[0].done == 60


def test_a_stage_lasts_until_the_next(watch: Stopwatch, clock: Clock) -> None:
    clock.now += 1
    progress = begin(watch, READING)
    clock.now += 2
    assert progress is not None
    progress(10, 10)
    clock.now += 5
    begin(watch, Stage("trying", "tokens", of="reap"))
    clock.now += 1
    watch(Stage("trying", "tokens", of="reap"), 100, 100)
    begin(watch, Stage("trying", "tokens", of="greedy"))
    clock.now += 3
    watch(Stage("trying", "tokens", of="greedy"), 100, 100)
    begin(watch, READING)
    clock.now += 4
    watch(READING, 6, 10)
    found = watch.timing()
    assert found.seconds == 16
    assert [(each.name, each.done, each.seconds) for each in found.stages] == [
        ("reading", 16, 11),
        ("trying", 200, 4),
    ]
    assert found.stages[1].per_second == 50
    assert sum(each.seconds for each in found.stages) == found.seconds - 1
    content = json.loads(json.dumps(found.to_dict()))
    assert content["stages"][1] == {
        "stage": "trying",
        "unit": "tokens",
        "done": 200,
        "seconds": 4,
        "per_second": 50,
    }


def test_what_is_told_is_handed_on() -> None:
    told: list[tuple[Stage, int, int | None]] = []
    progress = begin(Stopwatch(lambda *each: told.append(each)), READING)
    assert progress is not None
    progress(3, 7)
    assert told == [(READING, 0, None), (READING, 3, 7)]
    assert begin(None, READING) is None


def test_names_of_stages() -> None:
    assert str(READING) == "reading"
    assert str(Stage("trying", "tokens", of="reap")) == "trying reap"


# A run that goes on with another ------------------------------------------------------------


@pytest.mark.parametrize("read", [calibrate, calibrate_channels])
def test_tokens_of_an_earlier_run_are_not_counted(
    read: Any, clock: Clock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("moe_lens.compress.calibration.under_way.SECONDS", 0.0)
    monkeypatch.setattr("moe_lens.compress.calibration.under_way._SHARE", 0.0)
    for module in ("calibration", "channel_calibration"):
        monkeypatch.setattr(f"moe_lens.compress.calibration.{module}._BATCH_BYTES", 1)
    router = ExpertRouter.from_pretrained(save_checkpoint("qwen3_moe", tmp_path / "model"))
    corpus = read_corpus(write_words(tmp_path / "words.jsonl", 6, 1, words=8))

    def stop(done: int, total: int | None) -> None:
        if done == 4 * 8:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        read(router, corpus, under_way=tmp_path / "sums", progress=stop)
    watch = Stopwatch(clock=clock)
    progress = begin(watch, READING)
    assert progress is not None
    told: list[int] = []

    def count(done: int, total: int | None) -> None:
        clock.now += 1
        told.append(done)
        progress(done, total)

    read(router, corpus, under_way=tmp_path / "sums", progress=count)
    assert (told[0], told[-1]) == (3 * 8, 6 * 8)
    assert watch.timing().stages[0].done == 3 * 8
    assert watch.pace is not None
    assert watch.pace.per_second == pytest.approx(3 * 8 / (len(told) - 1))


def test_weight_files_of_an_earlier_run_are_not_counted(tmp_path: Path) -> None:
    source = save_checkpoint("qwen3_moe", tmp_path / "source")
    router = ExpertRouter.from_pretrained(source)
    plan = prune_plan(router, kept_per_layer(router, 4))
    (tmp_path / "made").mkdir()
    whole = WholeShards(tmp_path / "made", {}, save=lambda entries: None)
    times = []
    for _ in range(2):
        watch = Stopwatch()
        write_checkpoint(
            open_parent(source),
            plan,
            tmp_path / "made",
            shard_bytes=200_000,
            whole=whole,
            progress=begin(watch, WRITING),
        )
        assert watch.pace is not None
        assert watch.pace.finished
        times.append(watch.timing().stages[0].done)
        for name in sorted(whole.names)[1:]:
            (tmp_path / "made" / name).unlink()
        (tmp_path / "made" / "model.safetensors.index.json").unlink()
    assert len(whole.names) > 2
    first = sum(
        each.nbytes
        for each in mx.load(str(tmp_path / "made" / min(whole.names))).values()  # type: ignore[union-attr]
    )
    assert times[1] == times[0] - first


# What the process used ----------------------------------------------------------------------


def test_peak_memory_is_that_of_the_system() -> None:
    found = usage()
    assert found.peak_memory is not None
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    most *= 1 if sys.platform == "darwin" else 1024
    assert found.peak_memory == pytest.approx(most, rel=0.05)
    assert found.peak_gpu_memory is None or found.peak_gpu_memory > 0


PROGRAM = """
import json
from moe_lens.machine.process import usage
first = usage().peak_memory
held = bytearray(300_000_000)
held[::4096] = b"x" * len(held[::4096])
del held
print(json.dumps([first, usage().peak_memory]))
"""


def test_memory_that_was_let_go_of_counts_and_that_of_the_parent_does_not() -> None:
    held = bytearray(200_000_000)  # what a child's getrusage begins with
    held[::4096] = b"x" * len(held[::4096])
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, check=True)
    first, last = json.loads(done.stdout)
    assert last - first > 290_000_000
    if Path("/proc/self/status").exists():
        assert first < 150_000_000
    del held


@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="no /proc/self/io on this system")
def test_bytes_read_and_written(tmp_path: Path) -> None:
    watch = Stopwatch()
    (tmp_path / "file").write_bytes(bytes(5_000_000))
    for _ in range(3):
        (tmp_path / "file").read_bytes()
    found = watch.timing()
    assert found.read is not None
    assert found.written is not None
    assert found.read == pytest.approx(15_000_000, rel=0.01)
    assert found.written == pytest.approx(5_000_000, rel=0.01)
