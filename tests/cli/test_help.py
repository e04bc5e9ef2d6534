"""Help: complete, fast, and without loading anything heavy."""

from __future__ import annotations

import inspect
import re
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

COMMANDS = (
    "info",
    "families",
    "generate",
    "trace",
    "heatmap",
    "experts",
    "domains",
    "vocab",
    "coactivation",
    "pipeline",
    "balance",
    "locality",
    "similarity",
    "saturation",
    "compress",
    "plan",
    "frontier",
    "verify",
    "doctor",
)
HEAVY = ("mlx", "mlx_lm", "numpy", "scipy", "matplotlib", "transformers", "huggingface_hub")


def test_lists_every_command(run: Any) -> None:
    found = run("--help")
    assert found.code == 0
    assert all(f"  {command} " in found.out for command in COMMANDS)
    assert "..." not in found.out.partition("Commands:")[2]
    assert found.err == ""


def test_no_words_show_the_help(run: Any) -> None:
    assert run() == run("--help")


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_an_example_and_json(run: Any, command: str) -> None:
    found = run(command, "--help")
    assert found.code == 0
    assert f"  moe-lens {command}" in found.out
    assert "--json" in found.out
    assert max(map(len, found.out.splitlines())) <= 80


def test_version(run: Any) -> None:
    import moe_lens

    assert run("--version").out == f"moe-lens {moe_lens.__version__}\n"


def test_compress_states_the_scale(run: Any) -> None:
    help_text = run("compress", "--help").out
    assert all(f"\n  {point}  " in help_text for point in ("0  ", "0.5", "1  "))


def test_compress_shows_its_options_by_what_they_are_about(run: Any) -> None:
    sections: dict[str, list[str]] = {}
    for line in run("compress", "--help").out.splitlines():
        if re.fullmatch(r"[A-Z][a-z ]+:", line):
            names = sections.setdefault(line[:-1], [])
        elif option := re.match(r"  (?:-\w, )?(--[a-z-]+)", line):
            names.append(option[1])
    assert list(sections) == [
        "Arguments",
        "How small",
        "Which experts",
        "How experts are merged",
        "The text",
        "The result",
        "Options",
    ]
    for section, option in (
        ("How small", "--ratio"),
        ("Which experts", "--method"),
        ("How experts are merged", "--merge"),
        ("The text", "--data"),
        ("The result", "--output"),
        ("Options", "--json"),
    ):
        assert option in sections[section]
    shown = [option for names in sections.values() for option in names]
    from moe_lens.cli.compress import compress

    parameters = set(inspect.signature(compress).parameters) - {"model"}
    assert len(shown) == len(set(shown)) == len(parameters) + 1  # --help
    assert max(map(len, sections.values())) <= 12


@pytest.mark.parametrize("words", [["--help"], ["compress", "--help"], ["--version"], ["nonsense"]])
def test_loads_nothing_heavy(words: list[str]) -> None:
    program = (
        "import sys; from moe_lens.cli import main; main(sys.argv[1:]);"
        f"print('LOADED', sorted(set({HEAVY!r}) & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, *words], capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == "LOADED []"


@pytest.mark.parametrize("words", [["--help"], ["compress", "--help"]])
def test_answers_within_0_3_seconds(words: list[str]) -> None:
    """In processor time, the least of three: other work on the machine does not count."""
    command = Path(sys.executable).with_name("moe-lens")

    def seconds() -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([command, *words], check=True, capture_output=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    assert min(seconds() for _ in range(3)) < 0.3
