"""What is added up of a run by unit: tokens of each expert, and how sure the router was."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from moe_lens.analysis.units import Units
from moe_lens.kernels import NO_EXPERT
from moe_lens.trace import Routes

__all__ = ["LogitSums", "WeightSums"]

Array = NDArray[np.float64]

_CHUNK = 8192
"""Tokens whose softmax is taken at once, so that it stays in the cache."""

_LOWEST = -200.0
"""Distance to the highest logit, in nats, from which on a probability is 0."""


class WeightSums:
    """A `Fold`: sums of the recorded expert weights by unit.

    Attributes:
        mass: [units, layers] float64, of all weights of a token.
        margin: [units, layers] float64, of the first weight less the second; a token with one
            choice has no second and adds its first weight.
    """

    def __init__(self, units: Units, layers: int) -> None:
        self._units = units
        self.mass, self.margin = (np.zeros((len(units), layers)) for _ in range(2))

    def add(self, routes: Routes) -> None:
        unit, number = self._units.of_rows(routes), len(self._units)
        for place, (ids, weights) in enumerate(
            zip(routes.expert_ids, routes.expert_weights, strict=True)
        ):
            filled = weights.astype(np.float32)
            if ids.dtype != np.uint8:  # which cannot hold an empty slot
                filled[ids == NO_EXPERT] = 0
            lead = filled[:, 0] - filled[:, 1] if routes.slots > 1 else filled[:, 0]
            self.mass[:, place] += np.bincount(unit, np.einsum("tk->t", filled), number)
            self.margin[:, place] += np.bincount(unit, lead, number)


class LogitSums:
    """A `Fold`: sums over the softmax of the router logits by unit.

    Attributes:
        entropy: [units, layers] float64, of the softmax of each token, in nats.
        mass: [units, layers] float64, of the softmax over the chosen experts.
        margin: [units, layers] float64, lowest logit of the chosen less highest of the others;
            0 for a token that chose all.
        probability: [units, layers, R] float64, of the softmax.
        exists: [layers, R] bool, whether the layer has that expert: its logit is a number.
    """

    def __init__(self, units: Units, layers: int, router_width: int) -> None:
        self._units = units
        self.entropy, self.mass, self.margin = (np.zeros((len(units), layers)) for _ in range(3))
        self.probability = np.zeros((len(units), layers, router_width))
        self.exists = np.zeros((layers, router_width), dtype=bool)

    def add(self, routes: Routes) -> None:
        assert routes.router_logits is not None
        unit = self._units.of_rows(routes)
        # Prompts are whole, so units come in runs, whose rows add up without a scatter.
        for start in range(0, len(routes), _CHUNK):
            rows = slice(start, min(start + _CHUNK, len(routes)))
            starts = np.flatnonzero(np.diff(unit[rows], prepend=-1))
            owners = unit[rows][starts]
            for place, logits in enumerate(routes.router_logits[:, rows]):
                self._add(
                    place, logits.astype(np.float32), routes.expert_ids[place, rows], starts, owners
                )

    def _add(
        self,
        place: int,
        logits: NDArray[np.float32],
        ids: NDArray[np.unsignedinteger],
        starts: NDArray[np.int64],
        owners: NDArray[np.int64],
    ) -> None:
        width = logits.shape[1]
        self.exists[place] |= np.isfinite(logits).any(axis=0)
        below = np.maximum(logits - logits.max(axis=1, keepdims=True), _LOWEST)
        p = np.exp(below)
        whole = p.sum(axis=1, keepdims=True)
        p /= whole
        entropy = np.log(whole[:, 0]) - np.einsum("te,te->t", p, below)
        slots = np.minimum(ids, width, dtype=np.int64)
        empty = slots == width
        slots[empty] = 0
        mass = np.where(empty, 0, np.take_along_axis(p, slots, axis=1)).sum(axis=1)
        lowest = np.where(empty, np.inf, np.take_along_axis(below, slots, axis=1)).min(axis=1)
        chosen = np.zeros(p.shape, dtype=bool)
        chosen[np.nonzero(~empty)[0], slots[~empty]] = True
        highest = np.where(chosen | ~np.isfinite(logits), -np.inf, below).max(axis=1)
        margin = lowest - highest
        rows = np.stack([entropy, mass, np.where(np.isfinite(margin), margin, 0.0)], axis=1)
        sums = np.add.reduceat(rows.astype(np.float64), starts, axis=0)
        for kind, table in enumerate((self.entropy, self.mass, self.margin)):
            np.add.at(table[:, place], owners, sums[:, kind])
        np.add.at(
            self.probability[:, place], owners, np.add.reduceat(p, starts, axis=0, dtype=np.float64)
        )
