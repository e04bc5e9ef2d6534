"""Calibration text in two parts: one that makes plans, one that chooses among them.

A method that is chosen by its loss on the text that made its plan looks better than it is, and
text for the final evaluation must not choose either, or that would look too good in turn.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from dataclasses import replace

from moe_lens.corpus import Corpus
from moe_lens.errors import UsageError

SHARE = 3
"""One prompt of so many validates."""

MOST_PROMPTS = 64
"""For validation: beyond that the interval narrows slowly, and the cost grows with every prompt
and method."""


def split(corpus: Corpus, seed: int = 0) -> tuple[Corpus, Corpus]:
    """(calibration, validation): a third of the prompts of each label, at most 64, validates.

    Which ones is drawn by a hash of seed and prompt, so that the same text always falls on the
    same side, and copies of a prompt on one.

    Raises:
        UsageError: Fewer than four different prompts.
    """
    texts = {prompt.sha256 for prompt in corpus.prompts}
    if len(texts) < 4:
        raise UsageError(
            f"{corpus.name} has {len(texts)} different prompts, too few to make plans from some "
            "and choose among them on the others; give more text (--data), or name one method "
            "(--method reap)"
        )
    by_label: dict[str | None, list[str]] = defaultdict(list)
    for prompt in corpus.prompts:
        if prompt.sha256 not in by_label[prompt.label]:
            by_label[prompt.label].append(prompt.sha256)
    drawn: list[str] = []
    for hashes in by_label.values():
        ordered = sorted(hashes, key=lambda each: _draw(seed, each))
        drawn += ordered[: max(1, len(ordered) // SHARE) if len(ordered) > 1 else 0]
    if not drawn:  # every label has one prompt
        drawn = sorted(texts, key=lambda each: _draw(seed, each))[: len(texts) // SHARE]
    chosen = set(sorted(drawn, key=lambda each: _draw(seed, each))[:MOST_PROMPTS])
    validation = tuple(prompt for prompt in corpus.prompts if prompt.sha256 in chosen)
    calibration = tuple(prompt for prompt in corpus.prompts if prompt.sha256 not in chosen)
    return (
        replace(corpus, prompts=calibration, notes=()),
        replace(corpus, name=f"{corpus.name} (validation)", prompts=validation, notes=()),
    )


def _draw(seed: int, text_hash: str) -> bytes:
    return hashlib.sha256(f"validation:{seed}:{text_hash}".encode()).digest()
