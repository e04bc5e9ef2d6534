"""Next-token losses of a model and smaller versions of it, in bounded memory.

A position counts when the token after it is known: a prompt of n tokens gives n - 1 losses.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from moe_lens.corpus.batches import pad, plan_batches
from moe_lens.streaming import Batch, Passed, plan_waves
from moe_lens.telling import Progress

if TYPE_CHECKING:
    from moe_lens.routed_model import RoutedModel

Forwards = Callable[[Sequence[Batch], Passed | None], Sequence[mx.array]]
"""Batches -> the logits [B, L, vocab] of each; see `RoutedModel.forwards`."""


AfterBatch = Callable[[Sequence[int], Sequence[int]], None]
"""Called when all models have run a batch: prompt number and length of each row."""

_ROWS_BYTES = 64 << 20
_LOGITS_BYTES = 256 << 20
_MOST_TOKENS = 2048


@dataclass(frozen=True)
class Comparison:
    """Both models' losses, position by position.

    All arrays have one entry for each counted position; `prompt` says which prompt it is of.
    """

    prompt: NDArray[np.int64]
    nll_before: NDArray[np.float64]
    nll_after: NDArray[np.float64]
    kl: NDArray[np.float64]
    same_top1: NDArray[np.bool_]

    def where(self, chosen: NDArray[np.bool_]) -> Comparison:
        """The chosen positions alone."""
        return Comparison(*(column[chosen] for column in vars(self).values()))


def compare(
    before: Forwards,
    afters: Sequence[Forwards],
    tokens: Sequence[Sequence[int]],
    vocabulary: int,
    progress: Progress | None = None,
    after_batch: AfterBatch | None = None,
    *,
    wave_tokens: int = 0,
) -> list[Comparison]:
    """Run all models on the same batches; compare each of `afters` with `before`.

    Args:
        before: The parent.
        afters: Smaller models, or the parent under changes.
        tokens: The prompts.
        vocabulary: The number of logits.
        progress: Called with tokens done and in all.
        after_batch: Called when all models have run a batch.
        wave_tokens: Tokens that a model should get in one call; `RoutedModel.wave_tokens` of the
            one that takes most, so that a streamed one reads its weights once for them.
    """
    models = [before, *afters]
    parts: list[list[tuple[NDArray, ...]]] = [[] for _ in afters]
    done, told, total = 0, 0, sum(map(len, tokens))

    def tell(start: float, size: float = 0.0, share: float = 0.0) -> None:
        nonlocal told
        count = int(start + size * share)
        if progress is not None and count > told:
            told = count
            progress(count, total)

    for wave in plan_waves(batches(tokens, vocabulary), wave_tokens):
        size = sum(sum(batch.lengths or ()) for batch in wave)
        answers = []
        for number, model in enumerate(models):
            start, share = done + size * number / len(models), size / len(models)
            answers.append(list(model(wave, partial(tell, start, share))))
        for batch in wave:
            logits = []
            for each in answers:
                logits.append(each.pop(0))  # a wave's logits never are in memory together
                mx.eval(logits[-1])
            for which, part in enumerate(parts, start=1):
                part += _compare_batch(logits[0], logits[which], batch)
            if after_batch is not None:
                after_batch(batch.about, batch.lengths or ())
            done += sum(len(tokens[prompt]) for prompt in batch.about)
            tell(done)
    return [_joined(part) for part in parts]


def with_k(router: RoutedModel, k: int) -> Forwards:
    """Forwards with `k` experts per token: bit for bit those of a config that says `k`."""
    if k == router.info.experts_per_token:
        return router.forwards

    def forwards(batches: Sequence[Batch], passed: Passed | None) -> Sequence[mx.array]:
        with router.override(k=k):
            return router.forwards(batches, passed)

    return forwards


def _joined(parts: list[tuple[NDArray, ...]]) -> Comparison:
    """All batches as one, in prompt order."""
    columns = [np.concatenate(column) for column in zip(*parts, strict=True)]
    order = np.argsort(columns[0], kind="stable")
    return Comparison(*(column[order] for column in columns))


def batches(tokens: Sequence[Sequence[int]], vocabulary: int) -> Iterator[Batch]:
    """Batches of prompts of similar length, each about the numbers of its prompts.

    The logits of a batch stay below 256 MiB, or are those of a single prompt. Prompts of fewer
    than two tokens predict nothing and are left out.
    """
    most = max(1, min(_MOST_TOKENS, _LOGITS_BYTES // (4 * vocabulary)))
    lengths = [len(ids) if len(ids) > 1 else 0 for ids in tokens]
    for batch in plan_batches(range(len(tokens)), lengths, 64, most):
        ids, real = pad([np.asarray(tokens[prompt], np.int32) for prompt in batch])
        yield Batch(ids, real, batch)


def log_softmax(logits: mx.array) -> mx.array:
    """Log-probabilities in float32."""
    logits = logits.astype(mx.float32)
    return logits - mx.logsumexp(logits, axis=-1, keepdims=True)


def _counted(
    logits: mx.array, ids: NDArray[np.int32], lengths: Sequence[int]
) -> Iterator[tuple[NDArray[np.int64], mx.array, mx.array]]:
    """Counted positions in chunks: their flat places, logits [n, vocab] and next tokens [n]."""
    batch, length, vocabulary = logits.shape
    counted = np.arange(length)[None, :] + 1 < np.asarray(lengths)[:, None]
    places = np.flatnonzero(counted)
    flat = logits.reshape(-1, vocabulary)
    following = np.concatenate([ids[:, 1:], np.zeros((batch, 1), ids.dtype)], axis=1).reshape(-1)
    step = max(1, _ROWS_BYTES // (4 * vocabulary))
    for start in range(0, len(places), step):
        chunk = places[start : start + step]
        yield chunk, flat[mx.array(chunk)], mx.array(following[chunk])


def _compare_batch(before: mx.array, after: mx.array, batch: Batch) -> list[tuple[NDArray, ...]]:
    ids, lengths = batch.ids, batch.lengths or ()
    found: list[tuple[NDArray, ...]] = []
    pairs = zip(_counted(before, ids, lengths), _counted(after, ids, lengths), strict=True)
    for (places, rows, targets), (_, other_rows, _) in pairs:
        parent, child = log_softmax(rows), log_softmax(other_rows)
        share = mx.exp(parent)
        # A token the parent rules out adds nothing, whatever the child thinks of it.
        kl = mx.where(share > 0, share * (parent - child), 0.0).sum(axis=-1)
        same = mx.argmax(rows, axis=-1) == mx.argmax(other_rows, axis=-1)
        nll = [-mx.take_along_axis(each, targets[:, None], axis=-1) for each in (parent, child)]
        prompts = np.asarray(batch.about)[places // ids.shape[1]]
        found.append(
            (
                prompts,
                np.array(nll[0][:, 0]).astype(np.float64),
                np.array(nll[1][:, 0]).astype(np.float64),
                np.array(kl).astype(np.float64),
                np.array(same),
            )
        )
    return found
