"""The tokens of an expert that a person is shown: typical ones, and some in their context."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from moe_lens.trace.tokens import TokenTexts

from .cards import Example, TypicalToken
from .clusters import typical_order
from .counting import AROUND, TokenCounts, TokenSample

__all__ = ["ExpertTokens"]

SHOWN_TYPICAL = 12
SHOWN_EXAMPLES = 8

FEWEST_OF_ID = 5
"""Tokens of an id that an expert must have for the id to be typical of it."""

FEWEST_SHARE = 0.002
"""Of the expert's tokens; the same."""


class ExpertTokens:
    """Typical tokens and examples, from what one reading has counted.

    Args:
        texts: Texts of the token ids.
        by_id: Counts by token id.
        occurrences: [ids] how often each of its ids occurs.
        sample: Tokens with their routes.
        tokens: [layers, R] tokens of each expert.
        total: Tokens of the trace.
    """

    def __init__(
        self,
        texts: TokenTexts,
        by_id: TokenCounts,
        occurrences: NDArray[np.int64],
        sample: TokenSample,
        tokens: NDArray[np.int64],
        total: int,
    ) -> None:
        self.tokens, self.total = tokens, total
        self._texts, self._by_id, self._occurrences = texts, by_id, occurrences
        self._sample = sample
        self._shown: dict[int, str] = {-1: ""}
        self._examples: dict[int, Example] = {}
        self._rows = [_by_expert(sample.expert_ids[:, place]) for place in range(len(tokens))]

    def typical(self, place: int, expert: int) -> tuple[TypicalToken, ...]:
        """The most typical tokens of the expert, best first."""
        counts = self._by_id.counts[:, place, expert]
        received = int(self.tokens[place, expert])
        fewest = max(FEWEST_OF_ID, int(FEWEST_SHARE * received))
        order, lift = typical_order(counts, received, self._occurrences, self.total, fewest)
        return tuple(
            TypicalToken(
                token_id=int(self._by_id.ids[row]),
                text=self._text(int(self._by_id.ids[row])),
                count=int(counts[row]),
                share=float(counts[row] / self._occurrences[row]),
                lift=float(lift[row]),
            )
            for row in order[:SHOWN_TYPICAL]
        )

    def examples(self, place: int, expert: int) -> tuple[Example, ...]:
        """Random tokens of the expert, of different prompts as far as there are such."""
        rows = self._rows[place].get(expert, np.zeros(0, dtype=np.int64))
        prompts = self._sample.prompt[rows]
        _, first = np.unique(prompts, return_index=True)
        again = np.ones(len(rows), dtype=bool)
        again[first] = False
        order = np.lexsort((np.arange(len(rows)), again))[:SHOWN_EXAMPLES]
        return tuple(self._example(int(row)) for row in rows[order])

    def _text(self, token_id: int) -> str:
        if token_id not in self._shown:
            self._shown[token_id] = self._texts.visible(token_id)
        return self._shown[token_id]

    def _example(self, row: int) -> Example:
        if row not in self._examples:
            shown = [self._text(int(token_id)) for token_id in self._sample.context[row]]
            self._examples[row] = Example(
                prompt=int(self._sample.prompt[row]),
                position=int(self._sample.position[row]),
                before="".join(shown[:AROUND]),
                token=shown[AROUND],
                after="".join(shown[AROUND + 1 :]),
            )
        return self._examples[row]


def _by_expert(ids: NDArray[np.integer]) -> dict[int, NDArray[np.int64]]:
    """Rows of [tokens, k] expert ids in which each expert is, ascending."""
    order = np.argsort(ids.ravel(), kind="stable")
    experts, begins = np.unique(ids.ravel()[order], return_index=True)
    rows = np.split(order // max(1, ids.shape[1]), begins[1:])
    return dict(zip(experts.tolist(), rows, strict=True)) if len(order) else {}
