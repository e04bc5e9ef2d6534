"""Compressions that kill themselves, each in a process of its own: the other half of
test_compress_killed.py.

``python killed_runs.py JOBS``, with one JSON object a line in JOBS: the arguments of `compress`,
the moment to die at and a file to say it in. A moment is the n-th thing that happens in a phase: a
step of the progress, or an operation on a file below the folder of the output.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moe_lens.compress import compress
from moe_lens.compress.calibration import calibration, channel_calibration, under_way
from moe_lens.compress.checkpoint.checkpoint import write_checkpoint
from moe_lens.compress.verification import use
from moe_lens.compress.verification.repetition import measure_repetition
from moe_lens.figures import choice, merge_tree, picture_file, plan, saliency
from moe_lens.telling import Stage

IMPORTED = (choice, merge_tree, picture_file, plan, saliency)
"""What `compress` imports when it needs it; here once for all processes."""

OPERATIONS = frozenset(
    ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate", "shutil.rmtree")
)


@dataclass
class Moments:
    """Counts what happens, and ends the process at one moment."""

    folder: str
    die_at: tuple[str, int] | None
    phase: str = "beginning"
    counts: Counter[str] = field(default_factory=Counter)

    def happens(self) -> None:
        self.counts[self.phase] += 1
        if (self.phase, self.counts[self.phase]) == self.die_at:
            os.kill(os.getpid(), signal.SIGKILL)

    def step(self, stage: Stage, done: int, total: int | None) -> None:
        self.phase = str(stage)
        self.happens()

    def operation(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event not in OPERATIONS:
            return
        paths = [each for each in arguments if isinstance(each, str)]
        if any(path.startswith(self.folder) for path in paths):
            self.happens()


def run(job: dict[str, Any]) -> None:
    """One compression, in small pieces, so that there is much to be stopped in."""
    arguments = job["arguments"]
    die_at = None if job["die_at"] is None else tuple(job["die_at"])
    moments = Moments(str(Path(arguments["output"]).parent), die_at)
    use.NEW_TOKENS = measure_repetition.__kwdefaults__["new_tokens"] = 4
    under_way.SECONDS = under_way._SHARE = 0.0
    calibration._BATCH_BYTES = channel_calibration._BATCH_BYTES = 1 << 18
    write_checkpoint.__kwdefaults__["shard_bytes"] = job["shard_bytes"]
    sys.addaudithook(moments.operation)
    compress(**arguments, progress=moments.step)
    Path(job["log"]).write_text(json.dumps(moments.counts))


def in_a_process(work: Callable[[], None]) -> int:
    """The exit code of `work` in a process made by fork: nothing has run on MLX's threads yet."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            work()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


if __name__ == "__main__":
    for line in sys.stdin:
        job = json.loads(line)
        print(in_a_process(lambda job=job: run(job)), flush=True)  # noqa: T201
