"""What a model predicts after every token of a corpus. A trace does not hold it."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import TYPE_CHECKING

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from moe_lens.corpus import Corpus
from moe_lens.instrument import Forward
from moe_lens.streaming import Batch
from moe_lens.telling import Progress

from .job import Job, Report

if TYPE_CHECKING:
    from moe_lens.routed_model import RoutedModel

__all__ = ["record_predictions"]

LOGIT_BYTES = 512 << 20
"""What the logits of a batch of several prompts may take."""


def record_predictions(
    router: RoutedModel,
    corpus: Corpus | str | os.PathLike[str],
    *,
    sample_size: int | None = None,
    sequence_length: int | None = None,
    batch_size: int = 8,
    chat_template: bool = False,
    seed: int = 0,
    progress: Progress | None = None,
) -> NDArray[np.int32]:
    """[tokens] the likeliest next token after each token, in the order of a trace.

    The logits of one batch are in memory at a time, 512 MB of them where it has several prompts;
    one prompt runs whole.

    Args:
        router: The model.
        corpus: A `Corpus` or what `read_corpus` reads.
        sample_size, sequence_length, batch_size, chat_template, seed, progress: As in
            `record_trace`; with the same ones the predictions lie beside the tokens of its trace.

    Raises:
        UsageError: A setting is out of range.
        CaptureError: No prompt has any token.
    """
    job = Job.prepare(
        router.tokenizer,
        corpus,
        sample_size=sample_size,
        sequence_length=sequence_length,
        batch_size=batch_size,
        chat_template=chat_template,
        seed=seed,
    )
    longest = max(job.lengths) * 4 * router.vocabulary
    job = replace(job, batch_size=max(1, min(batch_size, LOGIT_BYTES // longest)))
    starts = np.concatenate([[0], np.cumsum(job.lengths)])
    predicted = np.zeros(int(starts[-1]), dtype=np.int32)

    def take(batch: Batch, logits: mx.array) -> None:
        likeliest = np.array(mx.argmax(logits, axis=-1).astype(mx.int32))
        prompts, _ = batch.about
        for row, prompt in zip(likeliest, prompts, strict=True):
            predicted[starts[prompt] : starts[prompt + 1]] = row[: job.lengths[prompt]]

    counter = _Counter()
    with router.recording(counter):
        report = Report(progress, 0, sum(job.lengths))
        job.run(router, counter, range(len(job.tokens)), report, take)
    return predicted


class _Counter:
    """A sink that only counts tokens."""

    values: frozenset[str] = frozenset()

    def __init__(self) -> None:
        self.num_tokens = 0

    def record(self, forward: Forward) -> None:
        self.num_tokens += int(forward.valid.sum())
