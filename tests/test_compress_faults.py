"""Faults of disks, files and people: each ends in one sentence, and the source stays as it was."""

from __future__ import annotations

import json
import os
import resource
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from moe_lens.cli import main
from moe_lens.compress import compress
from moe_lens.compress.resuming.work_folder import place_of
from moe_lens.errors import MoeLensError, UsageError
from tiny_models import save_checkpoint
from twins import write_words

PROGRAM = "import sys; from moe_lens.cli import main; sys.exit(main(sys.argv[1:]))"


def content(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder with a model and two texts."""
    save_checkpoint("qwen3_moe", tmp_path / "source", experts=16)
    write_words(tmp_path / "learn.jsonl", 12, 1)
    write_words(tmp_path / "test.jsonl", 6, 2)
    return tmp_path


def words(place: Path, output: Path, *more: str) -> list[str]:
    options = "--ratio 0.25 --method reap --data learn.jsonl --eval-data test.jsonl"
    given = [str(place / word) if word.endswith("jsonl") else word for word in options.split()]
    return ["compress", str(place / "source"), *given, "--output", str(output), *more]


def in_a_process(arguments: list[str], before: Callable[[], None] | None = None) -> tuple[int, str]:
    """Exit code and what is said on stderr."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *arguments],
        preexec_fn=before,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "COLUMNS": "1000"},
    )
    return done.returncode, done.stderr


@pytest.fixture(autouse=True)
def a_wide_pipe(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is wrapped, whatever terminal the tests run in."""
    monkeypatch.delenv("COLUMNS", raising=False)


def the_error(said: str) -> str:
    """The sentence in which a command ended, with no traceback around it."""
    assert "Traceback" not in said
    (line,) = (each for each in said.splitlines() if "error: " in each)
    return line.partition("error: ")[2]


def test_a_file_that_may_not_grow_is_gone_on_with(place: Path) -> None:
    before = content(place / "source")
    output = place / "smaller"

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, 500_000))

    code, said = in_a_process(words(place, output), limit)
    assert code == 1
    sentence = the_error(said)
    assert "could not be written (File too large)" in sentence
    assert "--resume goes on from there" in sentence
    assert not output.exists()
    assert place_of(output).is_dir()
    code, said = in_a_process(words(place, output, "--resume"))
    assert code == 0
    assert "goes on with what an earlier run has done (calibrated, planned" in said
    assert not place_of(output).exists()
    assert content(place / "source") == before


@contextmanager
def small_disk(folder: Path, options: str) -> Iterator[None]:
    """A file system in memory at `folder`; skipped where it cannot be made."""
    folder.mkdir()
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)],
        capture_output=True,
        text=True,
        check=False,
    )
    if made.returncode:
        pytest.skip(f"no file system can be mounted here: {made.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.skipif(sys.platform != "linux", reason="tmpfs is of Linux")
def test_a_full_disk_is_gone_on_with_once_there_is_room(place: Path) -> None:
    before = content(place / "source")
    with small_disk(place / "disk", "size=1m"):
        output = place / "disk" / "smaller"
        code, said = in_a_process(words(place, output))
        assert code == 1
        assert "free; make room" in the_error(said)
        assert "--resume goes on from there" in said
        again = ["mount", "-o", "remount,size=200m", str(place / "disk")]
        subprocess.run(again, check=True)
        code, said = in_a_process(words(place, output, "--resume"))
        assert code == 0, said
        assert "(calibrated, planned" in said
        assert [path.name for path in output.parent.iterdir()] == ["smaller"]
    assert content(place / "source") == before


@pytest.mark.skipif(sys.platform != "linux", reason="tmpfs is of Linux")
def test_a_disk_that_fills_up_meanwhile(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with small_disk(place / "disk", "size=600k"):
        output = place / "disk" / "smaller"
        monkeypatch.setattr("moe_lens.compress.resuming.output_place._MARGIN", -(1 << 30))
        with pytest.raises(MoeLensError, match=r"No space left on device.*--resume goes on"):
            run(place, output)
        assert not output.exists()


@pytest.mark.skipif(sys.platform != "linux", reason="tmpfs is of Linux")
def test_a_read_only_disk_is_refused_at_once(place: Path) -> None:
    with small_disk(place / "disk", "size=1m,ro"):
        code, said = in_a_process(words(place, place / "disk" / "new" / "smaller"))
        assert code == 2
        assert "you may not write in" in the_error(said)


def _change_header(change: Callable[[dict[str, Any]], None]) -> Callable[[Path], None]:
    def damage(source: Path) -> None:
        file = source / "model.safetensors"
        data = file.read_bytes()
        size = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + size])
        change(header)
        text = json.dumps(header).encode()
        file.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + size :])

    return damage


def truncated(source: Path) -> None:
    file = source / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def cut_in_the_header(source: Path) -> None:
    file = source / "model.safetensors"
    file.write_bytes(file.read_bytes()[:100])


def no_header(source: Path) -> None:
    (source / "model.safetensors").write_bytes(b"\xff" * 1000)


def overlapping(header: dict[str, Any]) -> None:
    first, second, *_ = (name for name in header if name != "__metadata__")
    header[first]["data_offsets"] = header[second]["data_offsets"]


def another_shape(header: dict[str, Any]) -> None:
    name = next(name for name in header if name != "__metadata__")
    header[name]["shape"][0] += 1


def missing_shard(source: Path) -> None:
    tensors = load_file(source / "model.safetensors")
    names = sorted(tensors)
    files = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
    parts = names[: len(names) // 2], names[len(names) // 2 :]
    weight_map = {name: file for file, part in zip(files, parts, strict=True) for name in part}
    save_file({name: tensors[name] for name in parts[0]}, source / files[0])
    index = {"metadata": {}, "weight_map": weight_map}
    (source / "model.safetensors.index.json").write_text(json.dumps(index))
    (source / "model.safetensors").unlink()


def not_a_number(source: Path) -> None:
    tensors = load_file(source / "model.safetensors")
    name = next(name for name in tensors if ".mlp." in name and "down" in name)
    tensors[name] = tensors[name].copy()
    tensors[name].reshape(-1)[7] = np.nan
    save_file(tensors, source / "model.safetensors", {"format": "mlx"})


DAMAGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "truncated": (truncated, "bytes are missing"),
    "cut in the header": (cut_in_the_header, "header"),
    "no header": (no_header, "header"),
    "overlapping offsets": (_change_header(overlapping), "model.safetensors"),
    "another shape": (_change_header(another_shape), "model.safetensors"),
    "missing shard": (missing_shard, "lacks model-00002-of-00002.safetensors"),
    "NaN": (not_a_number, "NaN"),
}


@pytest.mark.parametrize("which", DAMAGES)
def test_a_damaged_model_is_refused_and_nothing_is_left(
    which: str, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damage, sentence = DAMAGES[which]
    damage(place / "source")
    before = content(place)
    assert main(words(place, place / "smaller")) == 1
    assert sentence in the_error(capsys.readouterr().err)
    assert content(place) == before
    assert not place_of(place / "smaller").exists()


def run(place: Path, output: Path, **options: Any) -> Any:
    return compress(
        place / "source",
        output=output,
        calibration=place / "learn.jsonl",
        evaluation=place / "test.jsonl",
        **{"ratio": 0.25, "method": "reap", **options},
    )


@pytest.mark.parametrize("phase", ["calibrating", "writing", "verifying"])
def test_a_source_that_changes_meanwhile(phase: str, place: Path) -> None:
    changed: list[str] = []

    def change(stage: Any, done: int, total: int | None) -> None:
        if str(stage) == phase and not changed:
            changed.append(phase)
            tensors = mx.load(str(place / "source" / "model.safetensors"))
            tensors["lm_head.weight"] = tensors["lm_head.weight"] + 1
            mx.eval(tensors)
            mx.save_safetensors(str(place / "new.safetensors"), tensors, {"format": "mlx"})
            os.replace(place / "new.safetensors", place / "source" / "model.safetensors")

    with pytest.raises(MoeLensError, match="changed while it was read"):
        run(place, place / "smaller", progress=change)
    assert changed
    assert not (place / "smaller").exists()
    if place_of(place / "smaller").exists():
        with pytest.raises(UsageError, match=r"asked for something else \(the weights of the mod"):
            run(place, place / "smaller", resume=True)


def test_a_second_command_is_refused_while_one_runs(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = place / "smaller"
    others: list[int] = []

    def once(stage: Any, done: int, total: int | None) -> None:
        if str(stage) == "verifying" and not others:
            others.append(main(words(place, output, "--force")))
            others.append(main(words(place, output, "--resume")))

    run(place, output, progress=once)
    assert others == [1, 1]
    said = capsys.readouterr().err
    assert said.count(f"process {os.getpid()} is making") == 2
    assert (output / "config.json").is_file()


def test_what_is_asked_decides_whether_a_run_goes_on(place: Path) -> None:
    output = place / "smaller"

    def stop(stage: Any, done: int, total: int | None) -> None:
        if str(stage) == "writing":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(place, output, progress=stop)
    write_words(place / "other.jsonl", 6, 9)
    for options, said in (
        ({"ratio": 0.5}, "--ratio was 0.25, now 0.5"),
        ({"method": "frequency"}, "--method was reap, now frequency"),
        ({"seed": 1}, "--seed was 0, now 1"),
        ({"evaluation": place / "other.jsonl"}, "the text of --eval-data changed"),
        ({"sequence_length": 20}, "--sequence-length was 512, now 20"),
    ):
        arguments = {"calibration": place / "learn.jsonl", "evaluation": place / "test.jsonl"}
        with pytest.raises(UsageError, match="was asked for something else") as caught:
            compress(
                place / "source",
                output=output,
                resume=True,
                **{**arguments, "ratio": 0.25, "method": "reap", **options},
            )
        assert said in str(caught.value)
    assert run(place, output, resume=True).verification is not None
    found = run(place, output, resume=True)
    assert found.verification is None
    assert found.output == output
    assert "is already made, by a run that was asked for just this" in found.notes[0]
    with pytest.raises(UsageError, match="exists"):
        run(place, output, resume=True, seed=1)


def test_a_finished_command_is_not_run_again(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = place / "smaller"
    assert main(words(place, output)) == 0
    before = content(output)
    capsys.readouterr()
    assert main(words(place, output, "--resume", "--json")) == 0
    shown = capsys.readouterr()
    result = json.loads(shown.out)
    assert result["output"] == str(output)
    assert "is already made" in result["notes"][0]
    assert main(words(place, output, "--resume")) == 0
    assert "is already made" in capsys.readouterr().err
    assert content(output) == before
    assert main(words(place, output, "--resume", "--dry-run")) == 2
    assert "a dry run keeps nothing" in the_error(capsys.readouterr().err)


def test_the_sentence_after_ctrl_c(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.MonkeyPatch.context() as patched:

        def interrupted(*_: Any, **__: Any) -> None:
            raise KeyboardInterrupt

        patched.setattr("moe_lens.compress.making.verify", interrupted)
        command = words(place, place / "smaller")
        assert main(command) == 130
    said = capsys.readouterr().err
    assert "--resume goes on from there" in said
    assert said.rstrip().endswith("interrupted")
    assert main([*shlex.split(shlex.join(command)), "--resume"]) == 0
