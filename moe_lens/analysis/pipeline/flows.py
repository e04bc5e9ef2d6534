"""What the flow diagram draws: first choices from layer to layer, by label.

The experts of each MoE layer that take most of a label stand for themselves, the others together,
so the tables stay small for any number of experts.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moe_lens.analysis.units import Units
from moe_lens.trace import Routes

__all__ = ["ALL_SHOWN", "FEW_SHOWN", "FlowUnits", "Flows", "shown_experts"]

ALL_SHOWN = 20
"""Up to so many experts all are shown."""

FEW_SHOWN = 24
"""Of more, so many of each MoE layer."""


@dataclass(frozen=True, eq=False)
class Flows:
    """First choices from layer to layer.

    Attributes:
        groups: The labels, then an empty text for tokens of no label (or of a label left out).
        tokens: [groups] int64.
        experts: For each MoE layer the experts that are shown, by falling load.
        others: [layers] int64, how many experts stand together as one more.
        counts: [groups, layers - 1, S + 1, S + 1] int64, tokens from each shown expert (the last:
            the others) to each of the next MoE layer.
    """

    groups: tuple[str, ...]
    tokens: NDArray[np.int64]
    experts: tuple[tuple[int, ...], ...]
    others: NDArray[np.int64]
    counts: NDArray[np.int64]


def shown_experts(
    units: Units,
    names: tuple[str, ...],
    counts: NDArray[np.int64],
    ways: list[tuple[tuple[int, ...], ...]],
) -> NDArray[np.int64]:
    """[layers, S] experts to show, by falling load: of chains, and with most of any label.

    Args:
        units: The units.
        names: Labels that are told apart.
        counts: [units, layers, R] first choices.
        ways: For each chain and MoE layer its experts; the first is shown.
    """
    loads, width = counts.sum(axis=0), counts.shape[2]
    taken = loads / max(1, int(units.tokens.sum()))
    for name in names:
        own = units.label == units.names.index(name)
        taken = np.maximum(taken, counts[own].sum(axis=0) / max(1, int(units.tokens[own].sum())))
    for chain in ways:
        for layer, experts in enumerate(chain):
            taken[layer, experts[0]] += 1
    many = width if width <= ALL_SHOWN else FEW_SHOWN
    shown = np.argsort(-taken, axis=1, kind="stable")[:, :many]
    order = np.argsort(-np.take_along_axis(loads, shown, axis=1), axis=1, kind="stable")
    return np.take_along_axis(shown, order, axis=1)


class FlowUnits:
    """A `Fold` of the second reading: the table of `Flows`.

    Args:
        units: The units.
        names: Labels that are told apart.
        shown: [layers, S] experts that are shown.
        width: R.
    """

    def __init__(
        self, units: Units, names: tuple[str, ...], shown: NDArray[np.int64], width: int
    ) -> None:
        layers, many = shown.shape
        self.units, self.names, self.shown, self.width = units, names, shown, width
        number = {name: place for place, name in enumerate(names)}
        places = [number.get(name, len(names)) for name in units.names]
        # The label -1 is the last entry.
        self.group = np.array([*places, len(names)], dtype=np.int64)[units.label]
        self.side = many + 2  # the others, and empty slots
        self.place = np.full((layers, width + 1), many, dtype=np.int64)
        np.put_along_axis(self.place, shown, np.arange(many)[None], axis=1)
        self.place[:, width] = many + 1
        shape = (layers - 1, len(names) + 1, self.side, self.side)
        self.counts = np.zeros(shape, dtype=np.int64)

    def add(self, routes: Routes) -> None:
        base = self.group[self.units.of_rows(routes)] * self.side**2
        first = np.minimum(routes.expert_ids[:, :, 0], self.width, dtype=np.intp)
        for layer, table in enumerate(self.counts):
            one = self.place[layer][first[layer]] * self.side
            two = self.place[layer + 1][first[layer + 1]]
            table += np.bincount(base + one + two, minlength=table.size).reshape(table.shape)

    def flows(self) -> Flows:
        """The finished table."""
        groups = len(self.names) + 1
        tokens = np.bincount(self.group, self.units.tokens, groups).astype(np.int64)
        return Flows(
            groups=(*self.names, ""),
            tokens=tokens,
            experts=tuple(tuple(each) for each in self.shown.tolist()),
            others=np.full(len(self.shown), self.width - self.shown.shape[1]),
            counts=np.moveaxis(self.counts, 1, 0)[:, :, :-1, :-1].copy(),
        )
