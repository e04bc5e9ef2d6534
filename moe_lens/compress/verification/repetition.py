"""Does a model that writes by itself begin to repeat itself?

A compressed model can predict given text well and still fall into loops when it reads its own.
Both models continue the same beginnings greedily, and the repeated 4-grams of what each wrote are
counted: seq-rep-4 of Welleck et al. 2019 (arXiv 1908.04319), for one continuation

    1 - (different 4-grams) / (4-grams).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from moe_lens.bootstrap import Bootstrap, Measure
from moe_lens.corpus import Prompt

from .writing import Advance, continue_greedily

if TYPE_CHECKING:
    from moe_lens.routed_model import RoutedModel

PROMPTS = 16
"""Beginnings that are continued."""
NEW_TOKENS = 64
"""Most tokens of a continuation: 61 4-grams."""
_BEGINNING = 32
_NGRAM = 4


@dataclass(frozen=True)
class Repetition:
    """The share of repeated 4-grams in greedy continuations, before and after.

    `change` is after - before, prompt by prompt. `tokens_before` and `tokens_after` are the
    lengths of all continuations together, without end tokens.
    """

    prompts: int
    new_tokens: int
    before: Measure
    after: Measure
    change: Measure
    tokens_before: int
    tokens_after: int

    def rises(self, limit: float) -> bool:
        """Whether the share rises by more than `limit`, and its interval lies above 0."""
        return self.change.value > limit and (self.change.low is None or self.change.low > 0)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            name: value.to_dict() if isinstance(value, Measure) else value
            for name, value in vars(self).items()
        }


def repeated_share(tokens: Sequence[int], n: int = _NGRAM) -> float:
    """seq-rep-n of one continuation; 0 where it is too short to have any n-gram twice."""
    grams = [tuple(tokens[start : start + n]) for start in range(len(tokens) - n + 1)]
    return 1.0 - len(set(grams)) / len(grams) if grams else 0.0


def beginnings(
    prompts: Sequence[Prompt],
    tokens: Sequence[Sequence[int]],
    *,
    chat_template: bool = False,
    count: int = PROMPTS,
    seed: int = 0,
) -> list[list[int]]:
    """What the models continue: `count` prompts drawn with `seed`, as token ids.

    Of plain text the first half, at most 32 tokens. A chat that ends with a question is given
    whole, since the template has opened the answer. Prompts without two tokens are left out.
    """
    usable = [number for number, ids in enumerate(tokens) if len(ids) > 1]
    order = np.random.default_rng(seed).permutation(len(usable))[:count]
    return [
        _beginning(prompts[usable[place]], tokens[usable[place]], chat_template)
        for place in sorted(order)
    ]


def _beginning(prompt: Prompt, ids: Sequence[int], chat_template: bool) -> list[int]:
    if prompt.messages is not None or chat_template:
        answered = prompt.messages is not None and prompt.messages[-1].get("role") == "assistant"
        if not answered:
            return list(ids)
    return list(ids[: min(_BEGINNING, len(ids) // 2)])


def measure_repetition(
    before: RoutedModel,
    after: RoutedModel,
    starts: Sequence[Sequence[int]],
    *,
    new_tokens: int = NEW_TOKENS,
    seed: int = 0,
    advance: Advance | None = None,
) -> Repetition:
    """Continue every beginning greedily with both models, and count.

    Args:
        before: The parent.
        after: The child.
        starts: Token ids, at least one beginning.
        new_tokens: Most tokens of a continuation; an end token ends it sooner.
        seed: Of the bootstrap over beginnings.
        advance: Called with the number of tokens written since the last call.
    """
    texts = [continue_greedily(each, starts, new_tokens, advance) for each in (before, after)]
    first, second = (np.array([repeated_share(text) for text in written]) for written in texts)
    bootstrap = Bootstrap(np.arange(len(starts)), seed=seed)
    return Repetition(
        prompts=len(starts),
        new_tokens=new_tokens,
        before=bootstrap.measure(first),
        after=bootstrap.measure(second),
        change=bootstrap.measure(second - first),
        tokens_before=sum(map(len, texts[0])),
        tokens_after=sum(map(len, texts[1])),
    )
