"""Two models can be compared token by token only if a token is the same to both."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from moe_lens.corpus import Corpus
from moe_lens.errors import UsageError

REMEDY = "only a model and a smaller version of it can be compared"


def check_one_tokenizer(
    before: Any,
    after: Any,
    names: tuple[str, str],
    corpus: Corpus,
    tokens: Sequence[Sequence[int]],
    sequence_length: int | None,
    chat_template: bool,
) -> None:
    """Raise UsageError unless both tokenizers have one vocabulary and read `corpus` alike.

    Args:
        before: The parent's tokenizer.
        after: The child's.
        names: Of parent and child, for the message.
        corpus: The text.
        tokens: What the parent's tokenizer makes of it.
        sequence_length: As `tokens` were cut.
        chat_template: Whether `tokens` went through the chat template.
    """
    if after is before:
        return
    first, second = before.get_vocab(), after.get_vocab()
    if first != second:
        other = sum(second.get(token) != number for token, number in first.items())
        raise UsageError(
            f"the tokenizers of {names[0]} ({len(first)} tokens) and {names[1]} ({len(second)}) "
            f"differ: {other} tokens of the first are missing or numbered otherwise in the "
            f"second; {REMEDY}"
        )
    found = corpus.tokenize(after, sequence_length, chat_template)
    if found != list(tokens):
        prompt = next(n for n, (a, b) in enumerate(zip(tokens, found, strict=True)) if a != b)
        raise UsageError(
            f"the tokenizers of {names[0]} and {names[1]} read prompt {prompt + 1} of "
            f"{corpus.name} differently; {REMEDY}"
        )
