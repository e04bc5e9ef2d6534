"""Which prompts run together: shards in corpus order, batches of similar length inside a shard.

A shard is the unit that survives an interruption, so no batch reaches across two of them: what a
batch computes can depend, in the last bit, on its shape, and a resumed run must give the very same
bytes as one that was never interrupted.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

__all__ = ["BATCH_TOKENS", "draw_prompts", "pad", "plan_batches", "plan_shards"]

# Padded tokens of one forward. More does not run faster and takes memory in proportion.
BATCH_TOKENS = 8192


def plan_shards(lengths: Sequence[int], shard_tokens: int) -> list[range]:
    """Cut the prompts, in order, into runs of about ``shard_tokens`` tokens, at least one each.

    Args:
        lengths: Number of tokens of each prompt.
        shard_tokens: A shard is closed before the prompt that would take it above this.

    Returns:
        Ranges of prompt indices that cover all prompts, each with at least one token if the
        corpus has any. A prompt longer than ``shard_tokens`` has a shard of its own.
    """
    shards: list[range] = []
    start, tokens = 0, 0
    for index, length in enumerate(lengths):
        if length and tokens and tokens + length > shard_tokens:
            shards.append(range(start, index))
            start, tokens = index, 0
        tokens += length
    return [*shards, range(start, len(lengths))]


def plan_batches(
    prompts: Sequence[int],
    lengths: Sequence[int],
    batch_size: int,
    batch_tokens: int = BATCH_TOKENS,
) -> Iterator[list[int]]:
    """Group ``prompts`` by length, longest first, so that little of a batch is padding.

    Args:
        prompts: Indices of the prompts to run; those without tokens are left out.
        lengths: Number of tokens of each prompt of the corpus.
        batch_size: Most prompts in a batch.
        batch_tokens: Most tokens in a batch, padding included; a longer prompt runs alone.
    """
    by_length = sorted((p for p in prompts if lengths[p]), key=lambda p: (-lengths[p], p))
    batch: list[int] = []
    for prompt in by_length:
        longest = lengths[batch[0]] if batch else 0
        if batch and (len(batch) == batch_size or (len(batch) + 1) * longest > batch_tokens):
            yield batch
            batch = []
        batch.append(prompt)
    if batch:
        yield batch


def pad(tokens: Sequence[NDArray[np.int32]]) -> tuple[NDArray[np.int32], list[int]]:
    """Right-pad prompts with 0 to [B, L] int32 and give their lengths [B]."""
    lengths = [len(ids) for ids in tokens]
    padded = np.zeros((len(tokens), max(lengths)), dtype=np.int32)
    for row, ids in enumerate(tokens):
        padded[row, : len(ids)] = ids
    return padded, lengths


def draw_prompts(tokens: Sequence[Sequence[int]], count: int, seed: int) -> list[Sequence[int]]:
    """Whole prompts, drawn at random until `count` tokens are together.

    A corpus may be sorted by label, so its beginning would not do.
    """
    drawn: list[Sequence[int]] = []
    size = 0
    for prompt in np.random.default_rng(seed).permutation(len(tokens)):
        if size >= count:
            break
        if len(tokens[prompt]):
            drawn.append(tokens[prompt])
            size += len(tokens[prompt])
    return drawn
