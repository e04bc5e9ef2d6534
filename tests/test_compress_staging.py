"""A model's folder appears whole or not at all, whatever happens, and replaces nothing unasked."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from moe_lens.compress import write
from moe_lens.compress.checkpoint.staging import check_output, check_space, staged
from moe_lens.errors import MoeLensError, UsageError
from twins import prepared


def listing(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("failure", [KeyboardInterrupt, MemoryError, SystemExit])
def test_a_failure_leaves_nothing(
    failure: type[BaseException], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, plan = prepared(tmp_path)

    def fail(done: int, total: int) -> None:
        if done > total / 2:
            raise failure

    with pytest.raises(failure):
        write(plan, source, tmp_path / "smaller", progress=fail)
    assert listing(tmp_path) == ["source"]


def test_a_full_disk_is_one_sentence_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, plan = prepared(tmp_path)

    def fail(done: int, total: int) -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(MoeLensError, match=r"No space left on device.*nothing is left"):
        write(plan, source, tmp_path / "smaller", progress=fail)
    assert listing(tmp_path) == ["source"]
    monkeypatch.setattr(shutil, "disk_usage", lambda place: SimpleNamespace(free=10_000))
    with pytest.raises(MoeLensError, match="make room"):
        check_space(tmp_path / "a" / "b", 10_000)
    with pytest.raises(MoeLensError, match="make room"):
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
    with pytest.raises(UsageError, match="exists"):
        write(plan, source, output)
    assert (output / "mark").exists()

    def fail(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write(plan, source, output, force=True, progress=fail)
    assert (output / "mark").exists()
    write(plan, source, output, force=True)
    assert not (output / "mark").exists()
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
    before = {file.name: file.read_bytes() for file in source.iterdir()}
    with pytest.raises(UsageError, match="the model that is read"):
        write(plan, source, tmp_path / output, force=True)
    assert {file.name: file.read_bytes() for file in source.iterdir()} == before


def dead_process() -> int:
    """The id of a process that has ended."""
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    return child.pid


def test_what_a_killed_run_left_is_cleared_up(tmp_path: Path) -> None:
    stale = tmp_path / f".smaller.partial-{dead_process()}"
    alive = tmp_path / f".smaller.partial-{os.getppid()}"
    other = tmp_path / f".smaller2.partial-{dead_process()}"
    for folder in (stale, alive, other):
        folder.mkdir()
    said: list[str] = []
    with staged(tmp_path / "smaller", say=said.append) as partial:
        assert partial.name == f".smaller.partial-{os.getpid()}"
        (partial / "x").touch()
    assert listing(tmp_path) == sorted([alive.name, other.name, "smaller"])
    assert said == [f"removed {stale.name}, left by a run that was killed"]


def test_a_model_that_lost_its_name_to_a_kill_gets_it_back(tmp_path: Path) -> None:
    old = tmp_path / f".smaller.old-{dead_process()}"
    old.mkdir()
    (old / "mark").touch()
    with pytest.raises(MoeLensError, match="back in its place"), staged(tmp_path / "smaller"):
        pass
    assert (tmp_path / "smaller" / "mark").exists()
    old.mkdir()
    with staged(tmp_path / "smaller", force=True):
        pass
    assert listing(tmp_path) == ["smaller"]
    assert listing(tmp_path / "smaller") == []


def test_a_killed_process_leaves_no_folder_of_that_name(tmp_path: Path) -> None:
    code = (
        "import os, signal, sys; from pathlib import Path\n"
        "from moe_lens.compress.checkpoint.staging import staged\n"
        "with staged(Path(sys.argv[1])) as partial:\n"
        "    (partial / 'half').touch()\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "smaller")], check=False)
    assert not (tmp_path / "smaller").exists()
    assert len(listing(tmp_path)) == 1
    with staged(tmp_path / "smaller"):
        pass
    assert listing(tmp_path) == ["smaller"]
