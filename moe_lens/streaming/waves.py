"""Several forwards that go through the layers side by side, so that weights are read once for all.

The model's own code runs one batch through all layers. Here every batch has a forward of its own,
as a coroutine of the same thread (a greenlet), which waits whenever its model comes to the next
layer. When all have come there, each runs that layer in turn, in the order of the batches; then
its weights can go. What a forward computes does not depend on the others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import numpy as np
from greenlet import greenlet
from numpy.typing import NDArray

if TYPE_CHECKING:
    from moe_lens.instrument import Sink

HIDDEN_BYTES = 512 << 20
"""What the waiting forwards of a wave may hold: hidden states in float32, twice (some architectures
keep a second stream of them)."""


@dataclass(frozen=True)
class Batch:
    """Token ids of one forward, and what is to become of what it shows."""

    ids: NDArray[np.int32]
    """[B, L], padded on the right."""
    lengths: Sequence[int] | None = None
    """[B] the real length of each row; None: no pads."""
    about: Any = None
    """Handed on to the sinks with the forward."""
    sinks: tuple[Sink, ...] | None = None
    """Who sees this forward; None: those that record at the moment."""


def wave_tokens(hidden_size: int) -> int:
    """Tokens of a wave, so that what is held between two layers stays bounded."""
    return max(1, HIDDEN_BYTES // (2 * 4 * hidden_size))


def plan_waves(batches: Iterable[Batch], tokens: int) -> Iterator[list[Batch]]:
    """Group batches, in order, so that a wave has at most so many tokens, or one batch."""
    wave: list[Batch] = []
    held = 0
    for batch in batches:
        if wave and held + batch.ids.size > tokens:
            yield wave
            wave, held = [], 0
        wave.append(batch)
        held += batch.ids.size
    if wave:
        yield wave


class Wave:
    """The forwards that are under way.

    Args:
        forward: Runs one batch; calls `wait` whenever it comes to a layer.
        passed: Called with a layer when all forwards have run it.
    """

    def __init__(self, forward: Callable[[Batch], mx.array], passed: Callable[[int], None]) -> None:
        self._forward, self._passed = forward, passed
        self._leader: greenlet | None = None

    def run(self, batches: Sequence[Batch]) -> list[mx.array]:
        """What `forward` gives for each batch."""
        self._leader = greenlet.getcurrent()
        runs = [greenlet(self._forward) for _ in batches]
        # `switch` returns the layer that the forward waits for, or its result once it is over.
        states: list[Any] = []
        try:
            states += [run.switch(batch) for run, batch in zip(runs, batches, strict=True)]
            while waiting := [place for place, run in enumerate(runs) if not run.dead]:
                number = states[waiting[0]]
                for place in waiting:
                    if states[place] == number:
                        states[place] = runs[place].switch()
                self._passed(number)
        finally:
            for run in runs:
                if run and not run.dead:  # another one failed
                    run.throw()
            self._leader = None
        return states

    def wait(self, number: int) -> None:
        """Called by a forward that has come to layer `number`: return when it is its turn."""
        assert self._leader is not None
        self._leader.switch(number)

    @property
    def running(self) -> bool:
        """Whether it is a forward of this wave that runs now."""
        return self._leader is not None and greenlet.getcurrent() is not self._leader
