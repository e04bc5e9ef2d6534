"""The ``moe-lens`` command line: parse, call the API, print. No logic lives here.

Nothing in this package imports MLX, NumPy, Matplotlib or mlx-lm at the top of a module: a command
imports what it needs when it runs, so that ``moe-lens --help`` answers at once.
"""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Sequence
from typing import Any, NoReturn

__all__ = ["main"]

TERMINATED = 128 + signal.SIGTERM


def main(arguments: Sequence[str] | None = None) -> int:
    """Run ``moe-lens``.

    Args:
        arguments: The words after ``moe-lens``; None for those of this process.

    Returns:
        The exit code: 0 done, 1 failed, 2 asked for something that cannot be, 130 interrupted.

    Raises:
        SystemExit: With 143, when SIGTERM ends the process.
    """
    # As Ctrl-C does, the signal that ends a process lets every `finally` clear up first.
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, _terminate)
    try:
        from .running import run
    except KeyboardInterrupt:  # so early that there is nothing to say
        return 130
    return run(arguments)


def _terminate(*_: Any) -> NoReturn:
    sys.exit(TERMINATED)
