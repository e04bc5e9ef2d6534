"""Breaks the routing kernel one line at a time and reports which mutants its tests let live.

    python tests/mutate_kernel.py [--jobs 2] [--only TEXT] [--again REPORT] [--list]

Every line of the kernel's functions and body is changed in each way of `CHANGES`, and each line
that only does something is left out. A mutant is killed when a test fails, when the kernel no
longer compiles ("invalid"), or when it does not end in time. Survivors are printed; those that
cannot be told apart by any input are explained in docs/kernels.md.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import inspect
import itertools
import json
import os
import queue
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import hypothesis

from moe_lens.kernels import body

ROOT = Path(__file__).resolve().parents[1]
TESTS = ("test_kernels_fused", "test_kernels_oracle")
SECONDS = 240

CHANGES = (
    (r"<=", "<"),
    (r"(?<![<>=-])<(?![<=])", "<="),
    (r"(?<![<>=-])>(?![>=])", ">="),
    (r"==", "!="),
    (r"!=", "=="),
    (r"&&", "||"),
    (r"\|\|", "&&"),
    (r" \+ ", " - "),
    (r" - ", " + "),
    (r" \* ", " / "),
    (r" / ", " * "),
    (r"\+=", "-="),
    (r"-=", "+="),
    (r"\+\+(?=rank)", "--"),
    (r">>", "<<"),
    (r"<<", ">>"),
    (r"(?<=[=(?:,] )-(?=\w)", ""),
    (r"~", ""),
    (r"simd_max", "simd_min"),
    (r"simd_min", "simd_max"),
    (r"\b0u\b", "1u"),
    (r"\b0\.0f\b", "1.0f"),
    (r"\b1\.0f\b", "2.0f"),
    (r"\b1u\b", "2u"),
    (r"\b32(u?)\b", r"16\1"),
    (r"\b31u\b", "15u"),
    (r"(?<=[^\w.])[0-4](?=[^\w.])", "7"),
    (r"\bROUTE_INFINITY\b", "0.0f"),
    (r"\bROUTE_NONE\b", "0u"),
    (r"\b(logits|capped|score|choice|chosen|scaled|weight|sum)_dtype\b", "0"),
    (r"ROUTE_EXP(_SOFTMAX)?\(", "("),
    (r"ROUTE_LOG\(", "("),
    (r"ROUTE_SQRT\(", "("),
    (r"ROUTE_TANH\(", "("),
    (r"\bbackwards \? ", "!backwards ? "),
)

DOES_SOMETHING = re.compile(
    r"^\s+(?=\S)(?!(const|float|uint|int|bool|return)\b)[^{}]*;$|^\s+if .*\}$"
)
"""A statement that declares nothing, so that the text still compiles without it."""


@dataclass(frozen=True)
class Mutant:
    """One line of one part of the text, and what stands there in its place."""

    part: str
    number: int
    before: str
    after: str

    def __str__(self) -> str:
        after = self.after.strip() or "(nothing)"
        return f"{self.part}:{self.number}\n    - {self.before.strip()}\n    + {after}"


def mutants() -> Iterator[Mutant]:
    for part in ("FUNCTIONS", "BODY"):
        for number, line in enumerate(getattr(body, part).split("\n")):
            code = line.split("//")[0].rstrip()
            declared = re.search(r"= (whole|real)\[\d+\];|^  const int \w+ = \d;$", code)
            if not code.strip() or code.startswith("#") or declared:
                continue
            found = {
                code[: match.start()] + match.expand(new) + code[match.end() :]
                for old, new in CHANGES
                for match in re.finditer(old, code)
            }
            if DOES_SOMETHING.match(code):
                found.add("")
            for after in sorted(found - {code}):
                yield Mutant(part, number, line, after)


def say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


class Worker:
    """A process that holds the test modules and judges one mutant after another."""

    def __init__(self) -> None:
        self.process: subprocess.Popen[str] | None = None

    def verdict(self, mutant: Mutant) -> tuple[str, str]:
        """``killed``, ``invalid``, ``endless`` or ``SURVIVED``, and the test that saw it."""
        if self.process is None:
            self.process = subprocess.Popen(
                [sys.executable, __file__, "--worker"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                start_new_session=True,
            )
        process = self.process
        assert process.stdin is not None and process.stdout is not None
        watchdog = threading.Timer(SECONDS, os.killpg, (process.pid, signal.SIGKILL))
        watchdog.start()
        process.stdin.write(json.dumps([mutant.part, mutant.number, mutant.after]) + "\n")
        process.stdin.flush()
        said = process.stdout.readline()
        watchdog.cancel()
        if not said:
            process.wait()
            self.process = None
            return "endless", ""
        kind, test = json.loads(said)
        return kind, test

    def close(self) -> None:
        if self.process is not None and self.process.stdin is not None:
            self.process.stdin.close()
            self.process.wait()


def work() -> None:
    """Judges the mutants that come in on the standard input, one JSON line each."""
    hypothesis.settings.register_profile(
        "mutants", derandomize=True, database=None, phases=[hypothesis.Phase.generate]
    )
    hypothesis.settings.load_profile("mutants")
    sys.path.insert(0, str(ROOT / "tests"))
    from moe_lens.kernels import fused
    from tiny_models import cpu_stand_ins

    calls = [call for name in TESTS for call in test_calls(importlib.import_module(name))]
    with cpu_stand_ins.muse_spark_kernels():
        for line in sys.stdin:
            part, number, after = json.loads(line)
            lines = getattr(body, part).split("\n")
            lines[number] = after
            text = {"FUNCTIONS": body.FUNCTIONS, "BODY": body.BODY, part: "\n".join(lines)}
            fused.BODY = text["BODY"]
            fused.header = functools.partial(_header, text["FUNCTIONS"])
            fused._kernel.cache_clear()
            say(json.dumps(_judge(calls)))


def _header(functions: str, language: body.Language) -> str:
    return body.header(language).replace(body.FUNCTIONS, functions)


def _judge(calls: list[tuple[str, Callable[[], None]]]) -> tuple[str, str]:
    for place, (name, call) in enumerate(calls):
        try:
            call()
        except Exception as error:
            # The next mutant is most likely of the same line: what saw this one goes first.
            calls.insert(0, calls.pop(place))
            text = f"{type(error).__name__} {error} {error.__cause__}"
            return ("invalid" if "rejects the kernel" in text else "killed"), name
    return "SURVIVED", ""


def test_calls(module: ModuleType) -> Iterator[tuple[str, Callable[[], None]]]:
    """Every test function of `module` with each of its parameters."""
    import metal_emulator

    for name, function in vars(module).items():
        if not name.startswith("test_"):
            continue
        marks = [mark for mark in getattr(function, "pytestmark", []) if mark.name == "parametrize"]
        axes = []
        for mark in marks:
            names = mark.args[0] if isinstance(mark.args[0], tuple) else (mark.args[0],)
            values = [v if isinstance(mark.args[0], tuple) else (v,) for v in mark.args[1]]
            axes.append([dict(zip(names, value, strict=True)) for value in values])
        for choice in itertools.product(*axes):
            arguments: dict[str, Any] = {}
            for part in choice:
                arguments |= part
            shown = ",".join(str(value)[:24] for value in arguments.values())
            if "kernel_factory" in inspect.signature(function).parameters:
                arguments["kernel_factory"] = metal_emulator.metal_kernel
            yield f"{name}[{shown}]", functools.partial(function, **arguments)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    parser.add_argument("--only", default="", help="only lines that hold this text")
    parser.add_argument("--again", type=Path, help="only the survivors of this earlier output")
    parser.add_argument("--list", action="store_true", help="print the mutants and run none")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        work()
        return 0
    chosen = [mutant for mutant in mutants() if options.only in mutant.before]
    if options.again:
        survived = options.again.read_text().split("SURVIVED ")[1:]
        shown = {tuple(report.split("\n")[1:3]) for report in survived}
        chosen = [mutant for mutant in chosen if tuple(str(mutant).split("\n")[1:3]) in shown]
    if options.list:
        say("\n".join(map(str, chosen)))
        say(f"{len(chosen)} mutants")
        return 0
    start, counts = time.monotonic(), Counter[str]()
    workers: queue.Queue[Worker] = queue.Queue()
    for _ in range(options.jobs):
        workers.put(Worker())

    def judged(mutant: Mutant) -> tuple[Mutant, str, str]:
        worker = workers.get()
        try:
            return mutant, *worker.verdict(mutant)
        finally:
            workers.put(worker)

    with ThreadPoolExecutor(options.jobs) as pool:
        for mutant, kind, seen_by in pool.map(judged, chosen):
            counts[kind] += 1
            say(f"{kind} {mutant}" + (f"\n    {seen_by}" if seen_by else ""))
    while not workers.empty():
        workers.get().close()
    say(f"{dict(counts)} of {len(chosen)} mutants in {time.monotonic() - start:.0f} s")
    return 1 if counts["SURVIVED"] else 0


if __name__ == "__main__":
    sys.exit(main())
