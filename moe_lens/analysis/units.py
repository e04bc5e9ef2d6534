"""What is drawn and shuffled: prompts, never tokens, since tokens of one prompt are alike.

A unit is a prompt, or, where there are very many, some prompts of one label, so that tables by
unit stay small.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from moe_lens.profile import tally
from moe_lens.trace import Routes

__all__ = ["MOST_UNITS", "UnitCounts", "Units"]

MOST_UNITS = 512
"""By default. Counts by unit of 48 layers of 128 experts then take 25 MB."""

_SMALL_LABEL = 10
"""Units that a small label gets at least, as far as it has prompts, beside very large ones."""


class Labelled(Protocol):
    """What units are made of: a `Trace` has it."""

    labels: tuple[str | None, ...]
    prompt_tokens: NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Units:
    """How the prompts of a corpus are dealt into units. Prompts without tokens are in none.

    Attributes:
        names: The labels, sorted.
        label: [units] int64, place of the unit's label in `names`; -1: it has none.
        of_prompt: [prompts] int64, the unit of each prompt; -1: a prompt without tokens.
        prompts: [units] int64, prompts of each.
        tokens: [units] int64, tokens of each.
        squares: [units] int64, sum over the prompts of each of their squared numbers of tokens: it
            says how far the tokens of a unit depend on each other.
    """

    names: tuple[str, ...]
    label: NDArray[np.int64]
    of_prompt: NDArray[np.int64]
    prompts: NDArray[np.int64]
    tokens: NDArray[np.int64]
    squares: NDArray[np.int64]

    @classmethod
    def of(cls, corpus: Labelled, most: int = MOST_UNITS) -> Units:
        """Deal prompts into at most `most` units (or one for each label, if those are more).

        Each label gets units in proportion to its prompts, small ones a few more, so that a large
        label beside them does not merge them into one; within it, prompts go round in turn.
        """
        names = tuple(sorted({label for label in corpus.labels if label is not None}))
        number: dict[str | None, int] = {name: place for place, name in enumerate(names)}
        label = np.array([number.get(each, -1) for each in corpus.labels], dtype=np.int64)
        tokens = np.asarray(corpus.prompt_tokens, dtype=np.int64)
        of_prompt = np.full(len(tokens), -1, dtype=np.int64)
        members = [
            np.flatnonzero((label == place) & (tokens > 0)) for place in range(-1, len(names))
        ]
        shares = _shares([len(each) for each in members], most)
        first = 0
        for each, share in zip(members, shares, strict=True):
            of_prompt[each] = first + np.arange(len(each)) % max(1, share)
            first += share
        counted = of_prompt >= 0
        unit, lengths = of_prompt[counted], tokens[counted]
        return cls(
            names=names,
            label=np.repeat(np.arange(-1, len(names)), shares),
            of_prompt=of_prompt,
            prompts=np.bincount(unit, minlength=first),
            tokens=np.bincount(unit, lengths, first).astype(np.int64),
            squares=np.bincount(unit, lengths.astype(np.float64) ** 2, first).astype(np.int64),
        )

    def __len__(self) -> int:
        return len(self.label)

    def of_rows(self, routes: Routes) -> NDArray[np.int64]:
        """[tokens] the unit of each row."""
        return self.of_prompt[routes.prompt]

    def prompts_of(self, place: int) -> int:
        """Prompts with the label at `place` of `names`."""
        return int(self.prompts[self.label == place].sum())


def _shares(prompts: list[int], most: int) -> list[int]:
    """Units for groups of so many prompts: `most` in all, or one each if there are more groups."""
    total = sum(prompts)
    if total <= most:
        return prompts
    least = max(1, min(_SMALL_LABEL, most // sum(each > 0 for each in prompts)))
    shares = [max(min(each, least), each * most // total) for each in prompts]
    while sum(shares) > most and max(shares) > least:
        shares[shares.index(max(shares))] -= 1
    return shares


class UnitCounts:
    """A `Fold`: how often each expert was chosen in each unit.

    Args:
        units: The units.
        layers: Number of MoE layers.
        router_width: R, the experts a router can choose from.
        choices: Count only the first so many slots of a token, those with the highest weights;
            None counts all.

    Attributes:
        counts: [units, layers, R] int64, tokens routed to each expert.
    """

    def __init__(
        self, units: Units, layers: int, router_width: int, *, choices: int | None = None
    ) -> None:
        self.units = units
        self.counts = np.zeros((len(units), layers, router_width), dtype=np.int64)
        self._choices = choices

    def add(self, routes: Routes) -> None:
        counted = replace(routes, expert_ids=routes.expert_ids[:, :, : self._choices])
        self.counts += tally.group_counts(counted, self.units.of_rows(routes), len(self.units))
