"""One pass over a trace: every fold sees each shard once, and only one shard is in memory."""

from __future__ import annotations

from typing import Protocol

import numpy as np

from moe_lens.errors import CaptureError
from moe_lens.telling import Progress
from moe_lens.trace import Routes, Trace

__all__ = ["Fold", "fold", "successors"]


class Fold(Protocol):
    """Adds up what it needs of the routes it is given, whole prompts in order.

    What it keeps does not grow with the number of tokens.
    """

    def add(self, routes: Routes) -> None:
        """Take some more prompts."""
        ...


def fold(trace: Trace, *folds: Fold, progress: Progress | None = None) -> None:
    """Read `trace` once and give every shard to each of `folds`.

    Raises:
        MoeLensError: A shard is damaged.
        CaptureError: The trace has no tokens.
    """
    done, total = 0, trace.num_tokens
    if total == 0:
        raise CaptureError(f"the trace {trace.path} has no tokens; record it again")
    if progress is not None:
        progress(done, total)
    for routes in trace.shards():
        for each in folds:
            each.add(routes)
        done += len(routes)
        if progress is not None:
            progress(done, total)


def successors(routes: Routes) -> np.ndarray:
    """Rows whose next row is the next token of the same prompt; [pairs] int64."""
    together = (routes.prompt[1:] == routes.prompt[:-1]) & (
        routes.position[1:] == routes.position[:-1] + 1
    )
    return np.flatnonzero(together)
