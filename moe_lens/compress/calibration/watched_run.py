"""Running text through a model under a sink, with proof that watching it changes nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import chain
from typing import TYPE_CHECKING

import mlx.core as mx

from moe_lens.errors import CaptureError
from moe_lens.instrument import Forward, Sink
from moe_lens.streaming import Batch

if TYPE_CHECKING:
    from moe_lens.router import ExpertRouter

CHECKED_TOKENS = 64
"""Tokens on which the watched model is compared with the plain one."""


def run_watched(
    router: ExpertRouter,
    sink: Sink,
    batches: Iterable[Batch],
    *,
    check: bool = True,
    added: Callable[[int], None] | None = None,
) -> None:
    """Run batches under `sink`.

    Args:
        router: The model; one that is streamed reads its weights once for each wave of batches.
        sink: Takes what they show.
        batches: The text, in an order that does not depend on how it is run.
        check: Compare the logits with and without a watcher, bit for bit, on the first tokens.
        added: Called with the number of batches whenever all layers of some are in the sink.

    Raises:
        CaptureError: Watching the model changes what it computes.
    """
    batches = iter(batches)
    first = next(batches, None)
    if first is None:
        return
    batches = chain([first], batches)
    checked: list[mx.array] = []
    if check:
        ids = first.ids[:1, :CHECKED_TOKENS]
        asks = [Batch(ids, sinks=()), Batch(ids, sinks=(_Discard(sink.values),))]
        if not router.streamed:
            checked += router.forwards([asks.pop(0)])
        # A streamed model would read its weights for them alone: they join the text.
        batches = chain(asks, batches)
    with router.recording(sink):
        for wave in router.waves(batches):
            found = router.forwards(wave)
            text = [batch.sinks is None for batch in wave].count(True)
            if text < len(wave):
                checked += found[: len(wave) - text]
                mx.eval(checked)
                _check_untouched(router, *checked)
            if added is not None:
                added(text)


def _check_untouched(router: ExpertRouter, plain: mx.array, watched: mx.array) -> None:
    if not bool(mx.array_equal(plain, watched, equal_nan=True)):
        raise CaptureError(
            "the model gives other logits while it is watched, so a calibration would describe "
            "another model; please report the model type "
            f"({router.info.model_type}) and the version of mlx-lm"
        )


class _Discard:
    """Takes the values of a calibration and keeps none."""

    by_layer = True

    def __init__(self, values: frozenset[str]) -> None:
        self.values = values

    def record(self, forward: Forward) -> None:
        """Ask for every value, so that all are computed."""
        mx.eval([forward.value(name, layer) for layer in forward.layers for name in self.values])
