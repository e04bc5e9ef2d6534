"""What is drawn and shuffled: prompts, never tokens, since tokens of one prompt are alike.

A unit is a prompt, or, where there are very many, a few prompts of one label, so that tables by
unit stay small.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from moe_lens.profile import tally
from moe_lens.trace import Routes

__all__ = ["MOST_UNITS", "UnitCounts", "Units"]

MOST_UNITS = 512
"""By default. Counts by unit of 48 layers of 128 experts then take 25 MB."""


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
    """

    names: tuple[str, ...]
    label: NDArray[np.int64]
    of_prompt: NDArray[np.int64]
    prompts: NDArray[np.int64]
    tokens: NDArray[np.int64]

    @classmethod
    def of(cls, corpus: Labelled, most: int = MOST_UNITS) -> Units:
        """Deal prompts into at most `most` units (or one for each label, if those are more).

        Each label gets units in proportion to its prompts; within it, prompts go round in turn.
        """
        names = tuple(sorted({label for label in corpus.labels if label is not None}))
        number: dict[str | None, int] = {name: place for place, name in enumerate(names)}
        label = np.array([number.get(each, -1) for each in corpus.labels], dtype=np.int64)
        tokens = np.asarray(corpus.prompt_tokens, dtype=np.int64)
        filled = int((tokens > 0).sum())
        of_prompt = np.full(len(tokens), -1, dtype=np.int64)
        labels: list[int] = []
        for place in range(-1, len(names)):
            members = np.flatnonzero((label == place) & (tokens > 0))
            if len(members) == 0:
                continue
            share = len(members) if filled <= most else max(1, len(members) * most // filled)
            of_prompt[members] = len(labels) + np.arange(len(members)) % share
            labels += [place] * share
        counted = of_prompt >= 0
        return cls(
            names=names,
            label=np.array(labels, dtype=np.int64),
            of_prompt=of_prompt,
            prompts=np.bincount(of_prompt[counted], minlength=len(labels)),
            tokens=np.bincount(of_prompt[counted], tokens[counted], len(labels)).astype(np.int64),
        )

    def __len__(self) -> int:
        return len(self.label)

    def of_rows(self, routes: Routes) -> NDArray[np.int64]:
        """[tokens] the unit of each row."""
        return self.of_prompt[routes.prompt]

    def prompts_of(self, place: int) -> int:
        """Prompts with the label at `place` of `names`."""
        return int(self.prompts[self.label == place].sum())


class UnitCounts:
    """A `Fold`: how often each expert was chosen in each unit.

    Args:
        units: The units.
        layers: Number of MoE layers.
        router_width: R, the experts a router can choose from.

    Attributes:
        counts: [units, layers, R] int64, tokens routed to each expert, in any slot.
    """

    def __init__(self, units: Units, layers: int, router_width: int) -> None:
        self.units = units
        self.counts = np.zeros((len(units), layers, router_width), dtype=np.int64)

    def add(self, routes: Routes) -> None:
        self.counts += tally.group_counts(routes, self.units.of_rows(routes), len(self.units))
