"""Exit codes, errors, streams: what every command has in common."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import moe_lens
from moe_lens.cli import main, screen
from moe_lens.errors import MoeLensError


def test_an_unknown_command(run: Any) -> None:
    found = run("compres", "x")
    assert (found.code, found.out) == (2, "")
    assert "Did you mean 'compress'?" in found.err


@pytest.mark.parametrize(
    "words",
    [
        ["info"],
        ["info", "demo", "--colour"],
        ["generate", "demo", "--prompt", "x", "--max-tokens", "many"],
        ["compress", "demo", "--threshold", "high"],
        ["compress", "demo", "--ratio", "0.5", "--method", "guess"],
        ["heatmap", "demo", "--view", "everything"],
    ],
)
def test_a_line_that_does_not_parse(run: Any, words: list[str]) -> None:
    found = run(*words)
    assert found.code == 2
    if words != ["info"]:  # a command alone shows its help
        assert found.out == ""
        assert found.err.startswith("moe-lens: error: ")
        assert found.err.count("\n") == 1
        assert f"see moe-lens {words[0]} --help" in found.err


def test_errors_as_json_are_alone_on_stdout(run: Any) -> None:
    found = run("info", "no-such-folder", "--json")
    assert found.code == 2
    assert found.json["exit_code"] == 2
    assert "no-such-folder" in found.json["error"]
    assert run("info", "--json", "--colour").json["exit_code"] == 2


def test_exit_code_1_for_a_failure(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moe_lens.cli.info.load", _raiser(MoeLensError("the disk is full")))
    found = run("info", "demo")
    assert (found.code, found.err) == (1, "moe-lens: error: the disk is full\n")


def test_an_internal_error_is_one_sentence(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moe_lens.cli.info.load", _raiser(ZeroDivisionError("division by zero")))
    found = run("info", "demo")
    assert found.code == 1
    assert found.err.startswith("moe-lens: error: internal error: ZeroDivisionError: division")
    assert "--debug" in found.err
    assert found.err.count("\n") == 1


@pytest.mark.parametrize("how", ["option", "variable"])
def test_debug_shows_the_traceback(run: Any, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    monkeypatch.setattr("moe_lens.cli.info.load", _raiser(ZeroDivisionError("division by zero")))
    if how == "variable":
        monkeypatch.setenv("MOE_LENS_DEBUG", "1")
    found = run("info", "demo", *(["--debug"] if how == "option" else []))
    assert found.code == 1
    assert "Traceback (most recent call last)" in found.err
    assert found.err.endswith("internal error: ZeroDivisionError: division by zero\n")


def test_ctrl_c(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moe_lens.cli.info.load", _raiser(KeyboardInterrupt()))
    found = run("info", "demo")
    assert (found.code, found.out) == (130, "")
    assert found.err == "moe-lens: interrupted\n"


def test_sigterm_leaves_what_can_be_gone_on_with_like_ctrl_c(tmp_path: Path) -> None:
    """A compression that is ended while it verifies has no output, and says how to go on."""
    words = [
        "compress",
        "demo",
        "--ratio",
        "0.25",
        "--method",
        "reap",
        "--output",
        str(tmp_path / "small"),
    ]
    program = f"import sys; from moe_lens.cli import main; sys.exit(main({words!r}))"
    with subprocess.Popen([sys.executable, "-c", program], stderr=subprocess.PIPE) as process:
        deadline = time.monotonic() + 300
        while not list(tmp_path.glob(".small.work/model/config.json")):
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
        process.terminate()
        assert process.stderr is not None
        said = " ".join(process.stderr.read().decode().split())
    assert process.returncode == 143
    assert "is kept beside it: --resume goes on from there" in said
    assert [path.name for path in tmp_path.iterdir()] == [".small.work"]
    assert main([*words, "--resume", "--json"]) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["small"]


def test_a_model_cannot_steer_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(screen.out(), "_force_terminal", True)
    assert screen.printable("a\x1b[2Jb\x07\x9b\x7f\n\tc") == "a␛[2Jb␇\ufffd␡\n\tc"
    monkeypatch.setattr(screen.out(), "_force_terminal", False)
    assert screen.printable("a\x1b[2Jb") == "a\x1b[2Jb"


def test_a_reader_that_goes_away_is_no_error() -> None:
    """As in ``moe-lens families | head -1``."""
    program = "import sys; from moe_lens.cli import main; sys.exit(main(['families', '--json']))"
    with subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == b""


def test_notes_of_the_library_are_shown_once(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import logging

    def load(*_: object) -> None:
        for _again in range(2):
            logging.getLogger("moe_lens").warning("computing in float32")
        raise MoeLensError("enough")

    monkeypatch.setattr("moe_lens.cli.info.load", load)
    assert run("info", "demo").err == ("note: computing in float32\nmoe-lens: error: enough\n")


def test_text_that_the_terminal_cannot_write(installed: Any) -> None:
    found = installed("families", "nonsense ▸", env={"PYTHONIOENCODING": "ascii"})
    assert found.code == 1
    assert "nonsense ?" in found.err


def test_families(run: Any) -> None:
    found = run("families")
    assert found.code == 0
    lines = found.out.splitlines()
    supported = moe_lens.all_supported()
    assert {each.model_type for each in supported} <= {line.split()[0] for line in lines if line}
    assert "54 model types, and 6 other names" in found.out
    assert not any(line != line.rstrip() for line in lines)
    assert run("families", "--json").json == json.loads(
        json.dumps([each.to_dict() for each in supported])
    )


def test_one_family(run: Any) -> None:
    found = run("families", "qwen3_moe")
    assert found.code == 0
    assert "num_experts_per_tok" in found.out
    assert "cannot       shared_output: the architecture has no shared expert" in found.out
    assert run("families", "qwen3_moe", "--json").json["model_type"] == "qwen3_moe"
    assert run("families", "bert").code == 1


def test_narrow_families_fit(installed: Any) -> None:
    found = installed("families", env={"COLUMNS": "80"})
    assert found.code == 0


@pytest.mark.parametrize("columns", [80, 200])
def test_no_line_is_wider_than_the_terminal(
    run: Any, monkeypatch: pytest.MonkeyPatch, files: Any, columns: int
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    for words in (["families"], ["info", files.moe], ["heatmap", files.run], ["families", "dbrx"]):
        widest = max(map(len, run(*words).out.splitlines()))
        assert widest <= columns, words


def _raiser(error: BaseException) -> Any:
    def fail(*_: object, **__: object) -> None:
        raise error

    return fail


def test_the_command_is_installed() -> None:
    assert Path(sys.executable).with_name("moe-lens").exists()
