"""Opens damaged files again and again, and reports what does not end in one clear sentence.

    python tests/fuzz.py --cases 1000
    python tests/fuzz.py --cases 5000 --target plan --seed 7

Each target is one kind of file (`fuzzing.targets`). A case damages a good file in a few places and
opens it as a person would. It may succeed, or end in a `MoeLensError` of one line; any other
exception, a case without an end, a crash, or a file that appears or changes outside of the target
folder is reported with the smallest damage that does it. Exits with 1 then.
"""

from __future__ import annotations

import argparse
import logging
import resource
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from hypothesis import HealthCheck, Phase, given, seed, settings

from fuzzing.files import GoodFiles
from fuzzing.targets import TARGETS, Target

MEMORY = 24 << 30
"""Address space that a case may take; a damaged number must not ask for all of the memory."""


def fuzz(target: Target, cases: int, number: int, place: Path) -> Counter[str]:
    """Run cases of one target; raises what the smallest failing one raises.

    Returns:
        How often it succeeded (``ok``) and was refused.
    """
    outcomes: Counter[str] = Counter()
    last = place / "last"

    @seed(number)
    @settings(
        max_examples=cases,
        deadline=None,
        database=None,
        phases=(Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck),
    )
    @given(target.strategy)
    def check(case: Any) -> None:
        last.write_text(ascii(case))
        with tempfile.TemporaryDirectory(dir=place) as empty:
            outcome = target.run(case, Path(empty))
        outcomes["ok" if outcome == "ok" else "refused"] += 1

    check()
    last.unlink(missing_ok=True)
    return outcomes


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", type=int, default=1000, help="of all targets together")
    parser.add_argument("--target", choices=TARGETS, action="append", help="default: all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--child", metavar="DIR", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> int:
    """Run every target in a process of its own, so that a crash is one finding more."""
    asked = _arguments()
    targets = asked.target or list(TARGETS)
    if asked.child:
        return _child(targets[0], asked.cases, asked.seed, Path(asked.child))
    failed = 0
    for name in targets:
        with tempfile.TemporaryDirectory(prefix="fuzz-") as place:
            command = [sys.executable, __file__, "--child", place, "--target", name]
            command += ["--cases", str(-(-asked.cases // len(targets))), "--seed", str(asked.seed)]
            code = subprocess.run(command).returncode
            if code < 0:
                last = Path(place, "last")
                case = last.read_text() if last.exists() else "none"
                say(f"{name}: the process died of signal {-code}; its last case was {case}")
            failed += code != 0
    return int(failed > 0)


def _child(name: str, cases: int, number: int, place: Path) -> int:
    logging.disable()
    good = Path(place, "good")
    good.mkdir()
    target = TARGETS[name](GoodFiles(good))
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    start = time.perf_counter()
    try:
        outcomes = fuzz(target, cases, number, place)
    except Exception:
        say(f"{name}: FAILED\n{traceback.format_exc()}")
        return 1
    counts = f"{outcomes['ok']} opened, {outcomes['refused']} refused"
    say(f"{name}: {outcomes.total()} cases, {counts}, {time.perf_counter() - start:.0f} s")
    return 0


def say(line: str) -> None:
    """Print a line at once."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
