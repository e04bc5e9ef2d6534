"""In a terminal: colours, widths and progress that leave nothing behind."""

from __future__ import annotations

import os
import re
import struct
import sys
from pathlib import Path
from typing import Any

import pytest

pty = pytest.importorskip("pty")
ESCAPE = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


def in_terminal(columns: int, *words: object, **environment: str) -> str:
    """What the installed command writes to a terminal of this width."""
    import fcntl
    import termios

    command = Path(sys.executable).with_name("moe-lens")
    child, terminal = pty.fork()
    if child == 0:
        kept = {name: value for name, value in os.environ.items() if name != "COLUMNS"}
        given = kept | {"TERM": "xterm-256color"} | environment
        os.execve(command, ["moe-lens", *map(str, words)], given)
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
    written = b""
    while True:
        try:
            part = os.read(terminal, 65536)
        except OSError:
            break
        if not part:
            break
        written += part
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    return written.decode()


def test_colour(files: Any) -> None:
    words = ("heatmap", files.run)
    coloured = in_terminal(80, *words)
    assert "\x1b[38;" in coloured
    plain = in_terminal(80, *words, NO_COLOR="1")
    assert "\x1b[38;" not in plain
    assert ESCAPE.sub("", coloured) == ESCAPE.sub("", plain)


@pytest.mark.parametrize("columns", [80, 200])
def test_width(files: Any, columns: int) -> None:
    lines = ESCAPE.sub("", in_terminal(columns, "heatmap", files.run)).splitlines()
    assert max(map(len, lines)) <= columns


def test_nothing_is_coloured_in_a_pipe(installed: Any, files: Any) -> None:
    for words in (["heatmap", files.run], ["info", files.moe], ["families"]):
        found = installed(*words)
        assert found.code == 0
        assert "\x1b" not in found.out + found.err


def test_progress_is_gone_at_the_end(files: Any, tmp_path: Path) -> None:
    written = in_terminal(
        80, "trace", files.moe, "--data", files.text, "--output", tmp_path / "run"
    )
    assert "recording" in written
    last = written.rpartition("\x1b[2K")[2]
    assert "recording" not in last
    assert "120 tokens of 24 prompts" in ESCAPE.sub("", last)
