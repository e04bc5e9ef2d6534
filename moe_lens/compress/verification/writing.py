"""What a model writes by itself: greedy continuations of many beginnings at once, and how fast."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import mlx.core as mx
import numpy as np
from mlx_lm.models.cache import make_prompt_cache
from numpy.typing import NDArray

if TYPE_CHECKING:
    from moe_lens.routed_model import RoutedModel

Advance = Callable[[int], None]
"""Called with the number of tokens written since the last call."""


@dataclass(frozen=True)
class Speed:
    """Tokens per second before and after."""

    before: float
    after: float

    @property
    def ratio(self) -> float:
        """After / before: above 1 the smaller model is faster."""
        return self.after / self.before

    def to_dict(self) -> dict[str, float]:
        """Plain values for JSON."""
        return {"before": self.before, "after": self.after, "ratio": self.ratio}


def continue_greedily(
    router: RoutedModel,
    starts: Sequence[Sequence[int]],
    new_tokens: int,
    advance: Advance | None = None,
) -> list[list[int]]:
    """The likeliest next token, again and again, for every beginning.

    Beginnings of one length run as one batch, so that nothing is padded and any model that takes
    a batch can do it; of 16 at once each costs a small part of what it costs alone.

    Args:
        router: The model.
        starts: Token ids, at least one in each.
        new_tokens: Most tokens of a continuation.
        advance: Called after every step of a batch.

    Returns:
        For each beginning what follows it, up to and without an end token of the tokenizer.
    """
    ends = sorted(router.tokenizer.eos_token_ids)
    found: list[list[int]] = [[] for _ in starts]
    for length in sorted({len(start) for start in starts}):
        rows = [number for number, start in enumerate(starts) if len(start) == length]
        batch = np.asarray([starts[row] for row in rows], np.int32)
        left = new_tokens * len(rows)
        written: list[NDArray[np.int32]] = []
        for column in _columns(router, batch, new_tokens):
            written.append(column)
            left -= len(rows)
            if advance is not None:
                advance(len(rows))
            if np.isin(np.stack(written), ends).any(axis=0).all():
                break
        if advance is not None:
            advance(left)
        for row, tokens in zip(rows, np.stack(written, axis=1), strict=True):
            ended = np.isin(tokens, ends)
            found[row] = tokens[: ended.argmax() if ended.any() else None].tolist()
    return found


def _columns(
    router: RoutedModel, batch: NDArray[np.int32], new_tokens: int
) -> Iterable[NDArray[np.int32]]:
    """The next token [rows] of every row of `batch`, step by step."""
    cache = make_prompt_cache(router.model)
    tokens = mx.array(batch)
    if batch.shape[1] > 1:
        # As mlx-lm does it: the logits of a beginning, large and of no use, are never computed.
        router.model(tokens[:, :-1], cache=cache)
        mx.eval([each.state for each in cache])
    tokens = tokens[:, -1:]
    for _ in range(new_tokens):
        tokens = mx.argmax(router.model(tokens, cache=cache)[:, -1:], axis=-1)
        yield np.array(tokens)[:, 0].astype(np.int32)


def writing_speed(
    before: RoutedModel,
    after: RoutedModel,
    starts: Sequence[Sequence[int]],
    new_tokens: int,
    advance: Advance | None = None,
) -> Speed:
    """Tokens per second of ``mlx_lm.stream_generate`` with one text at a time.

    Both models take turns, and the first of a turn is the second of the next, so that a machine
    that slows down does not favour one.

    Args:
        before: The parent.
        after: The child.
        starts: Token ids of the beginnings that both continue.
        new_tokens: Tokens of each continuation, unless an end token comes sooner.
        advance: Called after every continuation.
    """
    models = before, after
    lengths, seconds = [0, 0], [0.0, 0.0]
    for turn, start in enumerate(starts):
        for place in range(2):
            which = (place + turn) % 2
            written = models[which].generate(start, max_tokens=new_tokens)
            lengths[which] += len(written.token_ids)
            seconds[which] += len(written.token_ids) / max(written.generation_tps, 1e-9)
            if advance is not None:
                advance(new_tokens)
    return Speed(*(length / max(took, 1e-9) for length, took in zip(lengths, seconds, strict=True)))
