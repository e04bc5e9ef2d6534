"""How evenly experts are loaded, as a result: numbers by group of prompts and MoE layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from moe_lens.analysis.result import Result
from moe_lens.analysis.table import Cell, Table

__all__ = ["HOT", "Balance", "PerLayer"]

Array = NDArray[np.float64]

HOT = 2.0
"""Times the mean load that an expert must surely get to be called hot."""


@dataclass(frozen=True, eq=False)
class PerLayer:
    """One number for each group of prompts and each MoE layer.

    Attributes:
        unit: What it counts.
        value: [groups, layers] float64.
        low: [groups, layers] float64, lower end of the 95 % interval: how far another corpus of
            this size would differ. NaN of a group with one prompt.
        high: [groups, layers] float64, upper end.
        even: [groups, layers] float64, what an evenly random router would show on as many tokens;
            NaN where that says nothing.
    """

    unit: str
    value: Array
    low: Array
    high: Array
    even: Array


@dataclass(frozen=True, eq=False)
class Balance(Result):
    """How evenly the experts of each layer are loaded, and how sure the router is.

    A *slot* is one choice of one token. Slots of zero experts, which have no weights, are left out
    of every measure of load, and counted in `zero_share`.

    Attributes:
        definition: What the numbers are.
        layers: Model layer index of each MoE layer.
        groups: ``all``, then the labels.
        tokens: [groups] int64.
        prompts: [groups] int64.
        experts: [layers] int64, E, experts of each layer.
        slots: [layers] float64, k, slots of a token that went to experts, in the mean.
        share: [groups, layers, E] float64, part of the group's slots that an expert got; NaN where
            a layer has fewer experts.
        share_low: [groups, layers, E] float64, lower end of its 95 % interval over prompts.
        share_high: [groups, layers, E] float64, upper end.
        cv: Standard deviation of the load over experts, over its mean.
        gini: Gini coefficient of the load, unused experts as zeros.
        entropy: Entropy of the shares over log E: 1 is even.
        max_violation: (largest load - mean) / mean.
        dead: [groups, layers] int64, experts that were never chosen.
        dead_even: [groups, layers] float64, how many of an evenly random router would be.
        hot: [groups, layers] int64, experts whose share is above `HOT` / E with its interval.
        hot_experts: (layer, expert) of the hot experts of all prompts.
        zero_share: [groups, layers] float64, part of all slots that went to zero experts.
        weight_mass: Sum of the recorded expert weights of a token.
        weight_margin: First recorded weight less the second; None of a profile, which has no
            second ones.
        router_entropy: Entropy of the softmax of the router logits, in nats. For a router that
            scores by a sigmoid the softmax is a convention, not what it computes; the same holds
            for the next two and the last.
        softmax_mass: Softmax of the router logits, summed over the chosen.
        logit_margin: Lowest router logit of the chosen less the highest of the others, in nats
            (it is the logarithm of the ratio of their softmax); below 0 where a selection bias,
            groups or an override chose past a higher logit; 0 of a token that chose all.
        load_loss: E x sum over i of f_i P_i, f_i the share of the slots, P_i the mean softmax.
        missing: Why the last four are None; None where they are there.
        seed: Of draws and simulations.
    """

    kind: ClassVar[str] = "balance"
    definition: str
    layers: tuple[int, ...]
    groups: tuple[str, ...]
    tokens: NDArray[np.int64]
    prompts: NDArray[np.int64]
    experts: NDArray[np.int64]
    slots: Array
    share: Array
    share_low: Array
    share_high: Array
    cv: PerLayer
    gini: PerLayer
    entropy: PerLayer
    max_violation: PerLayer
    dead: NDArray[np.int64]
    dead_even: Array
    hot: NDArray[np.int64]
    hot_experts: tuple[tuple[int, int], ...]
    zero_share: Array
    weight_mass: PerLayer
    weight_margin: PerLayer | None
    router_entropy: PerLayer | None
    softmax_mass: PerLayer | None
    logit_margin: PerLayer | None
    load_loss: PerLayer | None
    missing: str | None
    seed: int

    @property
    def title(self) -> str:
        return f"Load of the experts, {int(self.tokens[0]):,} tokens"

    def busiest(self, group: int, place: int) -> int:
        """The expert of a layer with the highest share."""
        return int(np.nanargmax(self.share[group, place]))

    def findings(self) -> list[str]:
        """The least even layer, unused and overused experts, and how sure the router is."""
        said = [self._least_even(), self._extremes()]
        if self.zero_share[0].any():
            said.append(
                f"{100 * self.zero_share[0].mean():.1f} % of all choices are zero experts, which "
                "return their input and count in no measure of load."
            )
        return [*said, self._sureness()]

    def _least_even(self) -> str:
        found = self.max_violation
        place = int(np.nanargmax(found.value[0]))
        sure = ""
        if not np.isnan(found.low[0, place]):
            sure = f" ({1 + found.low[0, place]:.2f} to {1 + found.high[0, place]:.2f})"
        return (
            f"Layer {self.layers[place]} is least even: expert {self.busiest(0, place)} gets "
            f"{1 + found.value[0, place]:.2f} times the mean load{sure}; with a router that chose "
            f"at random the busiest would get {1 + found.even[0, place]:.2f} times."
        )

    def _extremes(self) -> str:
        dead, hot, number = int(self.dead[0].sum()), len(self.hot_experts), int(self.experts.sum())
        return (
            f"Of {number} experts {dead} {_were(dead)} never chosen (at random: "
            f"{self.dead_even[0].sum():.1f}), and {hot} {_were(hot)} surely given more than "
            f"{HOT:g} times the mean."
        )

    def _sureness(self) -> str:
        if self.router_entropy is None or self.softmax_mass is None:
            return f"Entropy, mass and margin of the router logits are not known: {self.missing}."
        entropy, most = self.router_entropy.value[0], self.router_entropy.even[0]
        part = 100 * entropy / np.where(most > 0, most, 1)
        mass = 100 * self.softmax_mass.value[0]
        return (
            f"The router's softmax has {part.min():.0f} to {part.max():.0f} % of the largest "
            f"entropy, and gives the chosen experts {mass.min():.0f} to {mass.max():.0f} % of its "
            "mass, by layer."
        )

    def tables(self) -> list[Table]:
        """Load by layer, the router by layer, and load by label where there are labels."""
        return [self._load(), self._router(), *([self._labels()] if len(self.groups) > 1 else [])]

    def _load(self) -> Table:
        rows: list[tuple[Cell, ...]] = []
        for place, layer in enumerate(self.layers):
            worst = self.max_violation
            ends = (worst.low[0, place], worst.high[0, place])
            rows.append(
                (
                    layer,
                    *(float(each.value[0, place]) for each in (self.entropy, self.gini, self.cv)),
                    float(worst.value[0, place]),
                    "" if np.isnan(ends[0]) else f"{ends[0]:.2f} to {ends[1]:.2f}",
                    float(worst.even[0, place]),
                    self.busiest(0, place),
                    int(self.dead[0, place]),
                    int(self.hot[0, place]),
                )
            )
        columns = (
            *("layer", "entropy / log E", "Gini", "CV", "MaxVio", "interval", "MaxVio at random"),
            *("busiest expert", "dead", "hot"),
        )
        return Table(columns, tuple(rows), "Load of the experts")

    def _router(self) -> Table:
        shown = (
            ("weights", self.weight_mass, 1.0),
            ("first - second", self.weight_margin, 1.0),
            ("entropy", self.router_entropy, 1.0),
            ("softmax, %", self.softmax_mass, 100.0),
            ("margin", self.logit_margin, 1.0),
            ("load loss", self.load_loss, 1.0),
        )
        there = [(name, found, scale) for name, found, scale in shown if found is not None]
        rows: list[tuple[Cell, ...]] = [
            (layer, *(scale * float(found.value[0, place]) for _, found, scale in there))
            for place, layer in enumerate(self.layers)
        ]
        return Table(
            ("layer", *(name for name, _, _ in there)),
            tuple(rows),
            "The router's choice: weights of the chosen; entropy and margin in nats",
        )

    def _labels(self) -> Table:
        rows: list[tuple[Cell, ...]] = []
        for group, name in enumerate(self.groups):
            place = int(np.nanargmax(self.max_violation.value[group]))
            rows.append(
                (
                    name,
                    int(self.prompts[group]),
                    int(self.tokens[group]),
                    *(
                        float(np.nanmean(each.value[group]))
                        for each in (self.entropy, self.gini, self.max_violation)
                    ),
                    f"layer {self.layers[place]}, expert {self.busiest(group, place)}",
                    1 + float(self.max_violation.value[group, place]),
                    int(self.dead[group].sum()),
                )
            )
        columns = (
            *("prompts of", "prompts", "tokens", "entropy / log E", "Gini", "MaxVio"),
            *("busiest", "times the mean", "dead"),
        )
        return Table(columns, tuple(rows), "Who loads what (mean over layers)")


def _were(number: int) -> str:
    return "was" if number == 1 else "were"
