"""What it is to use two models: speed and memory of reading and writing, and what they write."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import mlx.core as mx
from mlx.utils import tree_flatten

from .reading_cost import cost_sample, reading_cost
from .repetition import NEW_TOKENS, Repetition, measure_repetition
from .writing import Speed, writing_speed

if TYPE_CHECKING:
    from moe_lens.router import ExpertRouter

_TIMED = 2
"""Beginnings that are continued one at a time, for the speed of writing."""


@dataclass(frozen=True)
class Memory:
    """Bytes of the weights in memory, and of what a forward needs beside them at most."""

    weights_before: int
    weights_after: int
    working_before: int
    working_after: int

    @property
    def before(self) -> int:
        """The peak of the parent alone."""
        return self.weights_before + self.working_before

    @property
    def after(self) -> int:
        """The peak of the smaller model alone."""
        return self.weights_after + self.working_after

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {"before": self.before, "after": self.after, **vars(self)}


@dataclass(frozen=True)
class Use:
    """Both models as they are, whatever copies of them were compared."""

    reading: Speed
    writing: Speed
    repetition: Repetition
    memory: Memory


class UseMeter:
    """Measures the use of two models on parts of the held-out text.

    Args:
        tokens: The text.
        starts: Beginnings of it that both models continue.
    """

    def __init__(self, tokens: Sequence[Sequence[int]], starts: Sequence[Sequence[int]]) -> None:
        self._costs, self._starts = cost_sample(tokens), starts
        self._timed = starts[:_TIMED]

    @property
    def tokens(self) -> int:
        """Tokens that will be read and written, for the progress."""
        return sum(map(len, self._costs)) + 2 * NEW_TOKENS * (len(self._starts) + len(self._timed))

    def measure(
        self,
        before: ExpertRouter,
        after: ExpertRouter,
        vocabulary: int,
        seed: int,
        advance: Callable[[int], None],
    ) -> Use:
        """Run both; `advance` is called with the tokens done since the last call."""
        mx.eval(before.model.parameters(), after.model.parameters())
        cost = reading_cost(before.forward, after.forward, self._costs, vocabulary, advance)
        repetition = measure_repetition(before, after, self._starts, seed=seed, advance=advance)
        writing = writing_speed(before, after, self._timed, NEW_TOKENS, advance)
        memory = Memory(
            weights_before=_weights(before),
            weights_after=_weights(after),
            working_before=cost.working_before,
            working_after=cost.working_after,
        )
        return Use(cost.speed, writing, repetition, memory)


def _weights(router: ExpertRouter) -> int:
    return sum(value.nbytes for _, value in tree_flatten(router.model.parameters()))
