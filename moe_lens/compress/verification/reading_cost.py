"""What reading text costs two models: seconds, and memory beside the weights.

Apart from the comparison of what they answer, which may run on other copies of the same weights.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from .losses import batches
from .writing import Speed

Forward = Callable[[Any, Sequence[int]], mx.array]
"""(token ids [B, L], lengths [B]) -> logits [B, L, vocab]."""

READ_TOKENS = 2048
"""Tokens that each model reads at least, if the text has as many."""


@dataclass(frozen=True)
class ReadingCost:
    """Tokens a second, and bytes.

    `working_...` is the most that MLX had in use during a forward beyond what was in use before it
    (``mx.get_peak_memory``), over all batches.
    """

    speed: Speed
    working_before: int
    working_after: int


def cost_sample(tokens: Sequence[Sequence[int]]) -> list[Sequence[int]]:
    """The longest prompts, as many as it takes to reach `READ_TOKENS`: what memory depends on."""
    chosen: list[Sequence[int]] = []
    for prompt in sorted(tokens, key=len, reverse=True):
        if sum(map(len, chosen)) >= READ_TOKENS or len(prompt) < 2:
            break
        chosen.append(prompt)
    return chosen


def reading_cost(
    before: Forward,
    after: Forward,
    tokens: Sequence[Sequence[int]],
    vocabulary: int,
    advance: Callable[[int], None],
) -> ReadingCost:
    """Read `tokens` with both models.

    The order of the two changes from batch to batch, so that a machine that speeds up or slows
    down does not favour one. One prompt warms both up before the clock starts. MLX's record of its
    peak memory is reset on the way.

    Args:
        before: The parent.
        after: The smaller model.
        tokens: What `cost_sample` gives.
        vocabulary: The number of logits.
        advance: Called with the number of tokens that both have read.
    """
    models = (before, after)
    seconds, working, timed = [0.0, 0.0], [0, 0], 0
    for number, batch in enumerate(batches(tokens, vocabulary)):
        ids, lengths = batch.ids, batch.lengths or ()
        if number == 0:
            mx.eval([model(ids[:1], lengths[:1]) for model in models])
        for which in (0, 1) if number % 2 == 0 else (1, 0):
            mx.reset_peak_memory()
            in_use = mx.get_active_memory()
            start = time.perf_counter()
            mx.eval(models[which](ids, lengths))
            seconds[which] += time.perf_counter() - start
            working[which] = max(working[which], mx.get_peak_memory() - in_use)
        timed += sum(lengths)
        advance(sum(lengths))
    speed = Speed(*(timed / max(each, 1e-9) for each in seconds))
    return ReadingCost(speed, *working)
