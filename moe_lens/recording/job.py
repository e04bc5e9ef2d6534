"""A tokenised corpus on its way through a model, batch by batch."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from moe_lens.corpus import Corpus, read_corpus
from moe_lens.corpus.batches import pad, plan_batches
from moe_lens.errors import CaptureError, UsageError
from moe_lens.streaming import Batch
from moe_lens.telling import Progress
from moe_lens.trace import TokenTexts

if TYPE_CHECKING:
    from moe_lens.routed_model import RoutedModel

__all__ = ["Job", "Recorder", "Report"]


class Recorder(Protocol):
    """A sink of the forwards that a job runs, which knows how much it has seen."""

    @property
    def num_tokens(self) -> int:
        """Tokens seen so far."""


@dataclass(frozen=True)
class Job:
    """Prompts as token ids, and how many run together.

    Attributes:
        corpus: The prompts, after sampling.
        tokens: int32 token ids of each prompt; empty for a prompt without tokens.
        batch_size: Most prompts in one forward.
        tokenizer: The model's tokenizer.
        notes: What became of prompts that are empty or too long, for the user to see.
    """

    corpus: Corpus
    tokens: tuple[NDArray[np.int32], ...]
    batch_size: int
    tokenizer: Any
    notes: tuple[str, ...]

    @classmethod
    def prepare(
        cls,
        tokenizer: Any,
        source: Corpus | str | os.PathLike[str],
        *,
        sample_size: int | None = None,
        sequence_length: int | None = None,
        batch_size: int = 1,
        chat_template: bool = False,
        seed: int = 0,
    ) -> Job:
        """Read, sample, tokenise and cut a corpus.

        Raises:
            UsageError: A setting is out of range.
            CaptureError: No prompt has any token.
        """
        for name, value in (("batch size", batch_size), ("sequence length", sequence_length)):
            if value is not None and value < 1:
                raise UsageError(f"the {name} is {value}; it must be at least 1")
        corpus = read_corpus(source)
        if sample_size is not None:
            corpus = corpus.sample(sample_size, seed)
        # One token more than asked for tells a prompt that is cut from one that just fits.
        limit = None if sequence_length is None else sequence_length + 1
        ids = corpus.tokenize(tokenizer, limit, chat_template)
        tokens = tuple(np.asarray(prompt[:sequence_length], dtype=np.int32) for prompt in ids)
        if not any(map(len, tokens)):
            raise CaptureError(
                f"none of the {len(tokens)} prompts of {corpus.name} has any token; give prompts "
                "with text in them"
            )
        cut = sum(len(prompt) == limit for prompt in ids)
        notes = _notes(tokens, cut, sequence_length)
        return cls(corpus, tokens, batch_size, tokenizer, notes)

    @property
    def lengths(self) -> list[int]:
        """Number of tokens of each prompt."""
        return [len(ids) for ids in self.tokens]

    @property
    def labels(self) -> list[str | None]:
        """Label of each prompt."""
        return [prompt.label for prompt in self.corpus.prompts]

    def texts(self) -> TokenTexts:
        """Texts of the token ids that occur."""
        return TokenTexts.from_tokenizer(self.tokenizer, np.unique(np.concatenate(self.tokens)))

    def run(
        self,
        router: RoutedModel,
        recorder: Recorder,
        prompts: Sequence[int],
        report: Report,
        take: Callable[[Batch, mx.array], None] | None = None,
    ) -> None:
        """Run some of the prompts; the recorder, already attached, sees every forward.

        Args:
            router: The model.
            recorder: Counts the tokens it has seen.
            prompts: Places in the corpus.
            report: Is told of the tokens done.
            take: Gets each batch with its logits [B, L, vocabulary], lazily. Without it the head
                is never computed.

        Raises:
            CaptureError: The recorder saw fewer or more tokens than ran.
        """
        for wave in router.waves(self.batches(prompts)):
            before = recorder.num_tokens
            logits = router.forwards(wave)
            if take is not None:
                for batch in wave:  # popped, so that only one batch has its logits in memory
                    take(batch, logits.pop(0))
            logits.clear()
            ran = sum(sum(batch.lengths or ()) for batch in wave)
            if recorder.num_tokens - before != ran:
                raise CaptureError(
                    f"the model ran {ran} tokens but {recorder.num_tokens - before} were recorded; "
                    "load the model again without other hooks on it"
                )
            report.add(ran)
            mx.clear_cache()

    def batches(self, prompts: Sequence[int]) -> Iterator[Batch]:
        """Some of the prompts in forwards; each says which prompts it holds and their labels."""
        for batch in plan_batches(prompts, self.lengths, self.batch_size):
            labels = [self.corpus.prompts[index].label for index in batch]
            ids, lengths = pad([self.tokens[index] for index in batch])
            yield Batch(ids, lengths, about=(batch, labels))


class Report:
    """Counts the tokens that are done and tells whoever asked.

    Args:
        progress: Called at once, and after each step, with tokens done and tokens in all.
        done: Tokens that an earlier run has done.
        total: Tokens in all.
    """

    def __init__(self, progress: Progress | None, done: int, total: int) -> None:
        self.progress, self.done, self.total = progress, done, total
        self.add(0)

    def add(self, tokens: int) -> None:
        """Count ``tokens`` more as done."""
        self.done += tokens
        if self.progress is not None:
            self.progress(self.done, self.total)


def _notes(
    tokens: Sequence[NDArray[np.int32]], cut: int, sequence_length: int | None
) -> tuple[str, ...]:
    empty = sum(len(ids) == 0 for ids in tokens)
    notes = []
    if empty:
        notes.append(f"{empty} of {len(tokens)} prompts have no tokens and are not in the numbers.")
    if cut:
        notes.append(f"{cut} of {len(tokens)} prompts are cut after {sequence_length} tokens.")
    return tuple(notes)
