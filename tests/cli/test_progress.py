"""How far a command is: events for a program, lines in a log, bars on a terminal."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moe_lens.cli import screen
from moe_lens.cli.events import Events
from moe_lens.cli.progress import Lines
from moe_lens.cli.quantities import amount, duration
from moe_lens.telling import Stage, StageProgress, begin
from moe_lens.timing import Stopwatch

READING, WRITING = Stage("reading", "tokens"), Stage("writing", "bytes")
Event = dict[str, Any]


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def run_stages(show: StageProgress, clock: Clock, seconds: int = 100, steps: int = 64) -> None:
    """Reading of `seconds` seconds in so many steps each, and writing of ten."""
    clock.now += 1
    read = begin(show, READING)
    assert read is not None
    for step in range(1, seconds * steps + 1):
        clock.now += 1 / steps
        read(step * 10, seconds * steps * 10)
    written = begin(show, WRITING)
    assert written is not None
    clock.now += 10
    written(4_000_000_000, 8_000_000_000)


def parsed(text: str) -> list[Event]:
    return [json.loads(line) for line in text.splitlines()]


def of(events: list[Event], kind: str, **content: object) -> list[Event]:
    wanted = {"event": kind, **content}.items()
    return [each for each in events if wanted <= each.items()]


# With a clock of our own --------------------------------------------------------------------


def test_events_come_twice_a_second(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    show = Events(Stopwatch(clock=clock))
    run_stages(show, clock)
    show.end(0, None)
    events = parsed(capsys.readouterr().err)
    steps = of(events, "progress", stage="reading")
    assert 195 <= len(steps) <= 202
    assert [each["done"] for each in steps] == sorted({each["done"] for each in steps})
    middle = steps[100]
    assert (middle["total"], middle["unit"], middle["per_second"]) == (64_000, "tokens", 640)
    assert middle["seconds_left"] == pytest.approx((64_000 - middle["done"]) / 640, abs=1e-3)
    assert middle["peak_memory_bytes"] > 10_000_000
    assert steps[-1]["done"] == 64_000
    assert steps[-1]["seconds_left"] == 0
    order = [(e["event"], e.get("state"), e.get("stage")) for e in events if e not in steps]
    assert order == [
        ("stage", "begin", "reading"),
        ("stage", "end", "reading"),
        ("stage", "begin", "writing"),
        ("progress", None, "writing"),
        ("stage", "end", "writing"),
        ("done", None, None),
    ]
    assert of(events, "stage", state="end", stage="reading")[0]["seconds"] == pytest.approx(100)
    assert events[-1]["seconds"] == pytest.approx(111)
    assert events[-1]["exit_code"] == 0


def test_the_last_step_of_a_stage_that_ends_early_is_told(
    clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    show = Events(Stopwatch(clock=clock))
    for done in (1, 2, 3):
        clock.now += 0.1
        show(READING, done, 100)
    show(WRITING, 0, None)
    events = parsed(capsys.readouterr().err)
    assert [each["done"] for each in of(events, "progress")] == [1, 3]
    assert of(events, "stage", state="end")[0]["done"] == 3


def test_what_is_complete_is_told_at_once(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    show = Events(Stopwatch(clock=clock))
    for done in (1, 2, 3):
        clock.now += 0.1
        show(READING, done, 3)
    assert [each["done"] for each in of(parsed(capsys.readouterr().err), "progress")] == [1, 3]
    show(WRITING, 0, None)
    assert of(parsed(capsys.readouterr().err), "progress") == []


def test_a_log_gets_a_line_each_half_minute(
    clock: Clock, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    screen.reset()
    run_stages(Lines(Stopwatch(clock=clock)), clock)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 5
    assert lines[0] == "note: reading"
    assert lines[1].startswith(
        "note: reading: 19,200 of 64,000 tokens, 640 tokens/s, 1 min 10 s left, peak memory "
    )
    assert lines[3].startswith("note: reading: 57,600 of")
    assert lines[4] == "note: writing"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.04, "0.0 s"),
        (9.94, "9.9 s"),
        (9.96, "10 s"),
        (59.6, "1 min 00 s"),
        (125, "2 min 05 s"),
        (3599.7, "1 h 00 min"),
        (11_520, "3 h 12 min"),
        (7_199, "2 h 00 min"),
    ],
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_amounts() -> None:
    assert amount(4_120_000, "bytes") == "4.12 MB"
    assert amount(12_345, "tokens") == "12,345 tokens"
    assert amount(1, "layers") == "1 layer"
    assert amount(0.25, "steps") == "0.25 steps"
    assert amount(123.4, "tokens") == "123 tokens"


# The installed command ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def words(files: Any) -> list[object]:
    texts = ["--data", files.text, "--eval-data", files.other_text, "--sample-size", "12"]
    return ["compress", files.moe, "--ratio", "0.25", *texts]


def check(events: list[Event]) -> list[str]:
    """What holds for the events of every command; returns the stages."""
    assert {each["event"] for each in events} <= {"stage", "progress", "note", "warning", "done"}
    assert [each["event"] for each in events].index("done") == len(events) - 1
    running = None
    stages = []
    for each in events:
        if each["event"] == "stage" and each["state"] == "begin":
            assert running is None
            running = each["stage"], each["of"], each["unit"]
            stages.append(each["stage"])
        elif each["event"] in ("stage", "progress"):
            assert (each["stage"], each["of"], each["unit"]) == running
            assert each["total"] is None or 0 <= each["done"] <= each["total"]
            if each["event"] == "stage":
                running = None
    assert running is None
    peaks = [each["peak_memory_bytes"] for each in events if "peak_memory_bytes" in each]
    assert peaks == sorted(peaks)
    return stages


def test_compress_with_json(installed: Any, words: list[object], tmp_path: Path) -> None:
    small = tmp_path / "small"
    found = installed(*words, "--method", "reap", "--output", small, "--json")
    assert found.code == 0, found.err
    events = parsed(found.err)
    stages = check(events)
    assert stages == ["loading", "calibrating", "planning", "writing", "verifying", "reporting"]
    written = of(events, "progress", stage="writing")
    size = found.json["verification"]["bytes"]["after"]
    assert written[-1]["done"] == written[-1]["total"] == size
    assert of(events, "progress", stage="calibrating")[-1]["done"] == 60
    assert of(events, "stage", stage="loading", state="end")[0]["done"] > size
    told = {each["message"] for each in of(events, "note")}
    assert set(found.json["notes"]) <= told
    said = [each["message"] for each in of(events, "warning")]
    assert said == found.json["warnings"]
    timing = found.json["timing"]
    assert [each["stage"] for each in timing["stages"]] == stages
    assert 0 < sum(each["seconds"] for each in timing["stages"]) <= timing["seconds"] + 0.01
    assert timing["seconds"] <= events[-1]["seconds"] + 0.01
    assert timing["peak_memory_bytes"] <= events[-1]["peak_memory_bytes"]
    if timing["bytes_written"] is not None:
        assert timing["bytes_written"] > size
        assert timing["bytes_read"] > size
    kept = json.loads((small / "report.json").read_text())["timing"]
    assert [each["stage"] for each in kept["stages"]] == stages
    assert "timing" not in (small / "README.md").read_text()


def test_auto_and_what_it_tries(run: Any, words: list[object]) -> None:
    found = run(*words, "--dry-run", "--json")
    assert found.code == 0, found.err
    events = parsed(found.err)
    stages = check(events)
    assert {"sampling layers", "calibrating channels"} <= set(stages)
    tried = [each["of"] for each in of(events, "stage", stage="trying", state="end")]
    assert {"reap", "greedy", "channels"} <= set(tried)
    by_layer = of(events, "progress", stage="planning", unit="layers")
    assert {each["total"] for each in by_layer} == {2}
    names = [each["stage"] for each in found.json["timing"]["stages"]]
    assert len(names) == len(set(names))
    tokens = next(each for each in found.json["timing"]["stages"] if each["stage"] == "trying")
    ends = of(events, "stage", stage="trying", state="end")
    assert tokens["done"] == sum(each["done"] for each in ends)


def test_a_refusal_is_the_last_event(run: Any, words: list[object], tmp_path: Path) -> None:
    choice = ["--method", "reap", "--max-kl", "1e-9", "--json"]
    found = run(*words, *choice, "--output", tmp_path / "small")
    assert found.code == 1
    last = parsed(found.err)[-1]
    assert (last["event"], last["exit_code"]) == ("error", 1)
    assert last["message"] == found.json["error"]
    assert of(parsed(found.err), "stage", stage="verifying", state="end")


def test_before_the_work_begins_there_are_no_events(run: Any, words: list[object]) -> None:
    found = run(*words, "--no-such-option", "--json")
    assert (found.code, found.err) == (2, "")
    assert found.json["exit_code"] == 2


def test_the_other_commands(run: Any, files: Any, tmp_path: Path) -> None:
    texts = ["--sample-size", "12", "--json"]
    recorded = run("trace", files.moe, "--data", files.text, "-o", tmp_path / "run", *texts)
    assert check(parsed(recorded.err)) == ["loading", "recording"]
    assert of(parsed(recorded.err), "progress", stage="recording")[-1]["done"] == 60
    lost = run("verify", files.moe, files.moe, "--eval-data", files.other_text, *texts)
    assert lost.code == 0, lost.err
    assert check(parsed(lost.err)) == ["loading", "verifying"]
    sizes = ["--ratio", "0.25", "--ratio", "0.5", "--method", "reap"]
    curve = run("frontier", files.moe, "--data", files.text, *sizes, *texts)
    assert curve.code == 0, curve.err
    events = parsed(curve.err)
    assert "calibrating" in check(events)
    tried = [each["of"] for each in of(events, "stage", stage="trying", state="end")]
    assert len(tried) == len(set(tried)) == 2
    assert all(each.startswith("reap, ") and each.endswith(" MB") for each in tried)


def test_notes_of_a_short_command_are_events_as_well(run: Any, tmp_path: Path) -> None:
    import mlx.core as mx

    from tiny_models import save_checkpoint

    half = save_checkpoint("qwen3_moe", tmp_path / "half", dtype=mx.bfloat16)
    found = run("info", half, "--json")
    notes = of(parsed(found.err), "note")
    assert [each["message"] for each in notes] == found.json["notes"]
    assert len(notes) == len(parsed(found.err)) == 1


def test_the_summary(run: Any, words: list[object], tmp_path: Path) -> None:
    found = run(*words, "--method", "reap", "--output", tmp_path / "small")
    assert found.code == 0, found.err
    assert all(line.startswith(("note: ", "warning: ")) for line in found.err.splitlines())
    lines = found.out.splitlines()
    rows = {line.split()[0]: line for line in lines[lines.index("Time") :] if line}
    assert rows["calibrating"].split()[1:3] == ["60", "tokens"]
    assert rows["writing"].rstrip().endswith("B/s")
    assert rows["all"].rstrip().endswith(" s")
    assert "memory" in rows["Peak"]


def test_what_ends_the_process_is_an_event(words: list[object], files: Any, tmp_path: Path) -> None:
    command = Path(sys.executable).with_name("moe-lens")
    line = [*words, "--output", tmp_path / "small", "--json"]
    with subprocess.Popen(
        [command, *map(str, line)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stderr is not None
        first = json.loads(process.stderr.readline())
        assert first["event"] in ("stage", "note")
        _wait_for(process.stderr.readline, "calibrating")
        process.send_signal(signal.SIGTERM)
        last = json.loads(process.stderr.read().splitlines()[-1])
    assert process.returncode == 143
    assert (last["event"], last["exit_code"]) == ("error", 143)


def _wait_for(readline: Callable[[], str], stage: str) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if json.loads(readline()).get("stage") == stage:
            return
    raise AssertionError(f"no {stage}")


def test_on_a_terminal_there_are_bars_in_place_of_events(files: Any, tmp_path: Path) -> None:
    pty = pytest.importorskip("pty")
    command = Path(sys.executable).with_name("moe-lens")
    texts = ["--data", str(files.text), "--output", str(tmp_path / "run"), "--json"]
    ours, theirs = pty.openpty()
    environment = {name: value for name, value in os.environ.items() if name != "COLUMNS"}
    with subprocess.Popen(
        [command, "trace", str(files.moe), *texts],
        stdout=subprocess.PIPE,
        stderr=theirs,
        env=environment | {"TERM": "xterm-256color"},
    ) as process:
        os.close(theirs)
        shown = b""
        try:
            while part := os.read(ours, 65536):
                shown += part
        except OSError:  # how a terminal ends
            pass
        assert process.stdout is not None
        result = json.loads(process.stdout.read())
    os.close(ours)
    assert result["tokens"] == 120
    assert b"recording" in shown
    assert b"peak memory" in shown
    assert b'"event"' not in shown
