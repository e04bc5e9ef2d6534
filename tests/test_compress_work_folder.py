"""A model's folder appears whole or not at all, and what was done until then is kept beside it."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from moe_lens.compress import write
from moe_lens.compress.resuming.ledger import Ledger, WholeFile, read_ledger
from moe_lens.compress.resuming.output_place import check_output, check_space
from moe_lens.compress.resuming.request import Request
from moe_lens.compress.resuming.work_folder import WorkFolder, place_of
from moe_lens.compress.resuming.working import working_at
from moe_lens.errors import DiskError, MoeLensError, UsageError
from twins import prepared

SHARD = 40_000
"""Bytes of a weight file, so that the tiny model has several."""

ASKED = Request({"--ratio": 0.5, "--method": "reap", "the weights of the model": "0" * 64})


def listing(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def content(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def stop_after(share: float, error: BaseException) -> Callable[[int, int], None]:
    def progress(done: int, total: int) -> None:
        if done > share * total:
            raise error

    return progress


@pytest.mark.parametrize("failure", [KeyboardInterrupt(), MemoryError(), SystemExit(143)])
def test_what_is_written_is_kept_and_gone_on_with(failure: BaseException, tmp_path: Path) -> None:
    source, plan = prepared(tmp_path)
    whole = write(plan, source, tmp_path / "whole", shard_bytes=SHARD)
    assert len(list(whole.glob("*.safetensors"))) > 3
    said: list[str] = []
    output = tmp_path / "smaller"
    with pytest.raises(type(failure)):
        write(
            plan,
            source,
            output,
            shard_bytes=SHARD,
            progress=stop_after(0.6, failure),
            say=said.append,
        )
    assert not output.exists()
    assert [note for note in said if "--resume goes on" in note] == said
    model = place_of(output) / "model"
    kept = {path: path.stat().st_mtime_ns for path in model.glob("*.safetensors")}
    ledger = read_ledger(place_of(output) / "ledger.json")
    assert 1 < len(ledger.shards) <= len(kept)
    first = next(path for path in kept if path.name in ledger.shards)
    steps: list[int] = []
    write(
        plan,
        source,
        output,
        shard_bytes=SHARD,
        resume=True,
        progress=lambda done, total: steps.append(done),
        say=said.append,
    )
    assert (output / first.name).stat().st_mtime_ns == kept[first]
    assert steps[-1] == sum(path.stat().st_size for path in whole.glob("*.safetensors")) - sum(
        8 + int.from_bytes(path.read_bytes()[:8], "little") for path in whole.glob("*.safetensors")
    )
    assert f"weight files: {len(kept)}" in said[-1]
    mine, other = content(output), content(whole)
    for name in ("README.md", "report.json"):  # they name the folder
        del mine[name], other[name]
    assert mine == other
    assert listing(tmp_path) == ["smaller", "source", "whole"]


def test_nothing_whole_is_nothing_to_keep(tmp_path: Path) -> None:
    source, plan = prepared(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        write(plan, source, tmp_path / "smaller", progress=stop_after(0.5, KeyboardInterrupt()))
    assert listing(tmp_path) == ["source"]
    with pytest.raises(DiskError, match=r"No space left on device.*nothing is left"):
        write(
            plan,
            source,
            tmp_path / "a" / "b" / "smaller",
            progress=stop_after(0.5, OSError(28, "No space left on device")),
        )
    assert listing(tmp_path) == ["source"]


def test_weight_files_that_changed_are_written_again(tmp_path: Path) -> None:
    source, plan = prepared(tmp_path)
    output = tmp_path / "smaller"
    whole = write(plan, source, tmp_path / "whole", shard_bytes=SHARD)
    with pytest.raises(KeyboardInterrupt):
        write(
            plan,
            source,
            output,
            shard_bytes=SHARD,
            progress=stop_after(0.9, KeyboardInterrupt()),
        )
    model = place_of(output) / "model"
    first, second, *_ = sorted(read_ledger(place_of(output) / "ledger.json").shards)
    (model / first).write_bytes((model / first).read_bytes()[:-8])
    data = bytearray((model / second).read_bytes())
    data[-4] ^= 1
    (model / second).write_bytes(data)
    (model / "stray").touch()
    write(plan, source, output, shard_bytes=SHARD, resume=True)
    for path in whole.glob("*.safetensors*"):
        assert (output / path.name).read_bytes() == path.read_bytes()
    assert listing(output) == listing(whole)


def test_a_full_disk_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, plan = prepared(tmp_path)
    with pytest.raises(DiskError, match=r"No space left on device.*--resume goes on"):
        write(
            plan,
            source,
            tmp_path / "smaller",
            shard_bytes=SHARD,
            progress=stop_after(0.5, OSError(28, "No space left on device")),
        )
    assert listing(tmp_path) == [".smaller.work", "source"]
    monkeypatch.setattr(shutil, "disk_usage", lambda place: SimpleNamespace(free=10_000))
    with pytest.raises(DiskError, match="make room"):
        check_space(tmp_path / "a" / "b", 10_000)
    with pytest.raises(DiskError, match="make room"):
        write(plan, source, tmp_path / "smaller")
    assert listing(tmp_path) == ["source"]


def test_a_place_that_cannot_be_written_is_refused_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(UsageError, match=r"file is a file, so .* cannot be made"):
        check_output(tmp_path / "file" / "smaller", tmp_path / "source", force=False)
    check_output(tmp_path / "new" / "smaller", tmp_path / "source", force=False)
    monkeypatch.setattr(os, "access", lambda place, mode: place != tmp_path)
    with pytest.raises(UsageError, match="you may not write"):
        check_output(tmp_path / "new" / "smaller", tmp_path / "source", force=False)


def test_an_existing_folder_is_replaced_by_force_only(tmp_path: Path) -> None:
    source, plan = prepared(tmp_path)
    output = write(plan, source, tmp_path / "smaller")
    (output / "mark").touch()
    for resume in (False, True):
        with pytest.raises(UsageError, match="exists"):
            write(plan, source, output, shard_bytes=SHARD, resume=resume)
    assert listing(tmp_path) == ["smaller", "source"]
    with pytest.raises(KeyboardInterrupt):
        write(plan, source, output, force=True, progress=stop_after(0.5, KeyboardInterrupt()))
    assert (output / "mark").exists()
    write(plan, source, output, force=True)
    assert not (output / "mark").exists()
    assert listing(tmp_path) == ["smaller", "source"]


def test_a_model_that_is_made_is_not_made_again(tmp_path: Path) -> None:
    source, plan = prepared(tmp_path)
    output = write(plan, source, tmp_path / "smaller")
    (output / "mark").touch()
    steps: list[int] = []
    for force in (False, True):
        again = write(
            plan,
            source,
            output,
            force=force,
            resume=True,
            progress=lambda done, total: steps.append(done),
        )
        assert (again / "mark").exists()
    assert not steps
    assert listing(tmp_path) == ["smaller", "source"]


def test_force_does_not_replace_what_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.txt").touch()
    (tmp_path / "file").touch()
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    with pytest.raises(UsageError, match="no model"):
        check_output(tmp_path / "home", tmp_path / "source", force=True)
    for name in ("file", "link"):
        with pytest.raises(UsageError, match="no plain folder"):
            check_output(tmp_path / name, tmp_path / "source", force=True)
    check_output(tmp_path / "empty", tmp_path / "source", force=True)


@pytest.mark.parametrize("output", ["source", "source/smaller", ".", "source/../source"])
def test_the_source_is_never_touched(output: str, tmp_path: Path) -> None:
    source, plan = prepared(tmp_path)
    before = content(source)
    with pytest.raises(UsageError, match="the model that is read"):
        write(plan, source, tmp_path / output, force=True)
    assert content(source) == before


def attempt(
    output: Path,
    asked: Request = ASKED,
    use: Callable[[WorkFolder], object] = bool,
    error: BaseException | None = None,
    **options: Any,
) -> None:
    """One run, which uses its work folder and then ends well, or by an error."""
    with working_at(output, asked, **options) as work:
        use(work)
        if error is not None:
            raise error


def one_weight_file(work: WorkFolder) -> None:
    (work.model / "model.safetensors").write_bytes(bytes(64))
    work.shards.add("model.safetensors")


def stopped(output: Path) -> Path:
    """What a run leaves that is stopped after one weight file."""
    with pytest.raises(KeyboardInterrupt):
        attempt(output, use=one_weight_file, error=KeyboardInterrupt())
    return place_of(output)


def test_another_request_is_refused_and_costs_nothing(tmp_path: Path) -> None:
    output = tmp_path / "smaller"
    place = stopped(output)
    before = content(place)
    other = Request({"--ratio": 0.25, "--method": "reap", "the weights of the model": "1" * 64})
    message = r"--ratio was 0.5, now 0.25, the weights of the model changed\); give the same"
    with pytest.raises(UsageError, match=message):
        attempt(output, other, resume=True)
    assert content(place) == before
    said: list[str] = []
    attempt(output, other, say=said.append)
    assert "weight files: 1" in said[0]
    assert "--resume would have gone on" in said[0]
    assert listing(tmp_path) == ["smaller"]
    assert listing(output) == []


def test_nothing_to_go_on_with_is_said(tmp_path: Path) -> None:
    said: list[str] = []
    attempt(tmp_path / "smaller", resume=True, say=said.append)
    assert "begins at the beginning" in said[0]


@pytest.mark.parametrize(
    ("error", "kept"),
    [
        (UsageError("no"), False),
        (MoeLensError("no"), True),
        (KeyError("no"), True),
        (DiskError("full"), True),
    ],
)
def test_what_would_be_refused_again_leaves_nothing(
    error: Exception, kept: bool, tmp_path: Path
) -> None:
    output = tmp_path / "smaller"
    stopped(output)
    with pytest.raises(type(error)):
        attempt(output, error=error, resume=True)
    assert listing(tmp_path) == [".smaller.work"] * kept
    stopped(output)
    with pytest.raises(type(error)):
        attempt(output, error=error, resume=True, refusals=(type(error),))
    assert listing(tmp_path) == []


def test_two_runs_to_one_place(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path\n"
        "from moe_lens.compress.resuming.request import Request\n"
        "from moe_lens.compress.resuming.working import working_at\n"
        "with working_at(Path(sys.argv[1]), Request({})) as work:\n"
        "    print(flush=True); sys.stdin.read()\n"
    )
    output = tmp_path / "new" / "smaller"
    with subprocess.Popen(
        [sys.executable, "-c", code, str(output)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        assert other.stdin is not None
        assert other.stdout is not None
        other.stdout.readline()
        before = content(place_of(output))
        for resume in (False, True):
            with pytest.raises(MoeLensError, match=f"process {other.pid} is making .*right now"):
                attempt(output, resume=resume, force=True)
        assert content(place_of(output)) == before
        other.kill()

    def again(work: WorkFolder) -> None:
        with pytest.raises(MoeLensError, match="right now"):
            attempt(output)

    attempt(output, use=again)  # the lock of a killed process is void
    assert listing(output.parent) == ["smaller"]


def test_where_files_cannot_be_locked_the_process_decides(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unknown(file: int, operation: int) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", unknown)
    output = tmp_path / "smaller"
    place_of(output).mkdir()
    (place_of(output) / "lock").write_text(f"{os.getppid()}\n")
    with pytest.raises(MoeLensError, match=f"process {os.getppid()} is"):
        attempt(output)
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    for text in (f"{child.pid}\n", "", "x"):
        shutil.rmtree(output, ignore_errors=True)
        place_of(output).mkdir(exist_ok=True)
        (place_of(output) / "lock").write_text(text)
        attempt(output)
        assert listing(tmp_path) == ["smaller"]


def test_a_folder_of_others_is_left_alone(tmp_path: Path) -> None:
    output = tmp_path / "smaller"
    place = place_of(output)
    place.mkdir()
    (place / "thesis.txt").touch()
    with pytest.raises(UsageError, match="no work folder of moe-lens"):
        attempt(output)
    assert listing(place) == ["thesis.txt"]
    shutil.rmtree(place)
    (tmp_path / "elsewhere").mkdir()
    place.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UsageError, match="no work folder"):
        attempt(output)
    assert listing(tmp_path / "elsewhere") == []
    place.unlink()
    place.write_text("x")
    with pytest.raises(UsageError, match="no work folder"):
        attempt(output)
    assert place.read_text() == "x"


@pytest.mark.parametrize("resume", [False, True])
def test_a_model_that_lost_its_name_to_a_kill_gets_it_back(tmp_path: Path, resume: bool) -> None:
    output = tmp_path / "smaller"
    place = stopped(output)
    (place / "replaced").mkdir()
    (place / "replaced" / "mark").touch()
    said: list[str] = []
    with pytest.raises(UsageError, match="exists"):
        attempt(output, resume=resume, say=said.append)
    assert (output / "mark").exists()
    assert "is back there" in said[0]
    attempt(output, resume=resume, force=True)
    assert listing(tmp_path) == ["smaller"]
    assert listing(output) == ["model.safetensors"] * resume


def test_the_plan_and_what_was_said_are_kept_together(tmp_path: Path) -> None:
    output = tmp_path / "smaller"
    found: list[Any] = []

    def run(use: Callable[[WorkFolder], object]) -> None:
        with pytest.raises(KeyboardInterrupt):
            attempt(output, use=use, error=KeyboardInterrupt(), resume=True)

    run(lambda work: work.keep_plan("{}", ["said"]))
    run(lambda work: found.extend([work.plan, work.notes]))
    assert found == [place_of(output) / "plan.json", ("said",)]
    (place_of(output) / "plan.json").write_text("[]")
    run(lambda work: found.append(work.plan))
    assert found[-1] is None


def test_what_appears_at_the_output_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    output = tmp_path / "smaller"

    def appear(work: WorkFolder) -> None:
        one_weight_file(work)
        output.mkdir()
        (output / "thesis.txt").touch()

    with pytest.raises(MoeLensError, match="has appeared meanwhile"):
        attempt(output, use=appear)
    assert listing(output) == ["thesis.txt"]
    output.rename(tmp_path / "elsewhere")
    attempt(output, resume=True)
    assert listing(output) == ["model.safetensors"]
    assert listing(tmp_path) == ["elsewhere", "smaller"]


def test_numbers_that_were_rounded_in_another_way_are_not_mixed(tmp_path: Path) -> None:
    output = tmp_path / "smaller"
    stopped(output)
    with pytest.raises(KeyboardInterrupt):
        attempt(
            output,
            use=lambda work: work.calibrates_with(7),
            error=KeyboardInterrupt(),
            resume=True,
        )
    before = content(place_of(output))
    with pytest.raises(MoeLensError, match="had 7 modules of packed weights, and this one has 3"):
        attempt(output, use=lambda work: work.calibrates_with(3), resume=True)
    assert content(place_of(output)) == before
    attempt(output, use=lambda work: work.calibrates_with(7), resume=True)


DAMAGED: list[tuple[Any, str]] = [
    (b"{", "Expecting"),
    (b"\xff", "decode"),
    (b"[" * 100_000, "recursion"),
    ([], "format"),
    ({"format": "moe-lens trace"}, "format"),
    ({"version": 2}, "version 2, this moe-lens reads 1"),
    ({"request": None}, "request"),
    ({"request": {"--ratio": [0.5]}}, "request"),
    ({"notes": "said"}, "notes"),
    ({"notes": ["\ud800"]}, "surrogates"),
    ({"plan": "../x"}, "plan"),
    ({"packed": 0.5}, "packed"),
    ({"shards": []}, "shards"),
    ({"shards": {"../../model.safetensors": {"bytes": 1, "sha256": "0" * 64}}}, "no name"),
    ({"shards": {"/etc/passwd": {"bytes": 1, "sha256": "0" * 64}}}, "no name"),
    ({"shards": {".safetensors": {"bytes": 1, "sha256": "0" * 64}}}, "no name"),
    ({"shards": {"model.safetensors": {"bytes": -1, "sha256": "0" * 64}}}, "needs"),
    ({"shards": {"model.safetensors": {"bytes": True, "sha256": "0" * 64}}}, "needs"),
    ({"shards": {"model.safetensors": {"bytes": 1, "sha256": "0"}}}, "needs"),
    ({"shards": {"model.safetensors": 1}}, "needs"),
]


@pytest.mark.parametrize(("change", "message"), DAMAGED)
def test_a_damaged_ledger_is_refused(change: Any, message: str, tmp_path: Path) -> None:
    place = stopped(tmp_path / "smaller")
    ledger = place / "ledger.json"
    whole = json.loads(ledger.read_text())
    if isinstance(change, bytes):
        ledger.write_bytes(change)
    else:
        ledger.write_text(json.dumps({**whole, **change} if isinstance(change, dict) else change))
    before = content(place)
    with pytest.raises(MoeLensError) as caught:
        attempt(tmp_path / "smaller", resume=True)
    assert message in str(caught.value)
    assert "leave --resume out to begin anew" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert content(place) == before
    attempt(tmp_path / "smaller")
    assert listing(tmp_path) == ["smaller"]


def test_a_ledger_reads_as_it_was_written(tmp_path: Path) -> None:
    facts: dict[str, Any] = {"--ratio": 0.1, "--experts": None, "--merge": True, "a": "é\n"}
    ledger = Ledger(
        Request(facts), ("one", "zwei ü"), 3, "a" * 64, {"m.safetensors": WholeFile(3, "b" * 64)}
    )
    ledger.write(tmp_path / "ledger.json")
    assert read_ledger(tmp_path / "ledger.json") == ledger
    assert not ledger.request.difference(Request(dict(facts)))
