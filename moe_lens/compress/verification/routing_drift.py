"""How far the smaller model routes from where the parent routed, layer by layer.

For one token and one MoE layer let w be the weights of the parent's experts and v those of the
child's. A map m says which of the child's experts each of the parent's became: the plan's group,
itself where nothing was renumbered, or nowhere if it was removed. With

    p(g) = sum of |w(e)| over the experts e with m(e) = g, divided by the sum of all |w|
    q(g) = |v(g)|, divided by the sum of all |v|

for the child's experts g and for "nowhere", the drift of the token is the total variation distance

    d = 1/2 sum over g of |p(g) - q(g)|,  from 0 to 1:

the share of the routing weight that goes elsewhere. What the parent gave to removed experts,
p(nowhere), is part of it and cannot be avoided: it is given as `removed`. Weights are those the
block multiplies by, after every normalisation; a factor common to all cancels.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from moe_lens.bootstrap import Bootstrap, Measure
from moe_lens.errors import UsageError
from moe_lens.instrument import Forward as Values
from moe_lens.streaming import Batch, Passed

from .expert_map import ExpertMap

if TYPE_CHECKING:
    from moe_lens.routed_model import RoutedModel

Routes = tuple[NDArray[np.int64], NDArray[np.float64]]
"""Expert ids and weights [tokens, k] of one layer."""

_Kept = tuple[dict[int, tuple[mx.array, mx.array]], NDArray[np.bool_]]
"""Ids and weights by layer, and which tokens are no pads, of one forward."""


@dataclass(frozen=True)
class LayerDrift:
    """Of one MoE layer: the mean drift, and the mean share that went to removed experts."""

    layer: int
    drift: Measure
    removed: float

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {"drift": self.drift.to_dict(), "removed": self.removed}


@dataclass(frozen=True)
class RoutingDrift:
    """The drift of every layer that can show it, and why others cannot.

    `mean` is over tokens and layers. `mapping` says how the parent's experts became the child's;
    without one there are no layers, and `reason` says why.
    """

    layers: tuple[LayerDrift, ...]
    mean: Measure | None
    mapping: str | None
    reason: str | None

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "mean": None if self.mean is None else self.mean.to_dict(),
            "layers": {str(each.layer): each.to_dict() for each in self.layers},
            "mapping": self.mapping,
            "reason": self.reason,
        }


class Watched:
    """A model whose forwards leave the routing of their tokens behind; it computes as before."""

    values = frozenset({"expert_ids", "expert_weights"})

    def __init__(self, router: RoutedModel) -> None:
        self._router = router
        self._kept: deque[_Kept] = deque()

    def forwards(self, batches: Sequence[Batch], passed: Passed | None) -> Sequence[mx.array]:
        """Logits [B, L, vocab] of every batch."""
        with self._router.recording(self):
            return self._router.forwards(batches, passed)

    def record(self, forward: Values) -> None:
        """Keep the routing of this forward; the model's own evaluation fills it."""
        shown = [
            layer
            for layer in forward.layers
            if all(forward.reason(name, layer) is None for name in self.values)
        ]
        values = {
            layer: (forward.value("expert_ids", layer), forward.value("expert_weights", layer))
            for layer in shown
        }
        self._kept.append((values, forward.valid))

    def take(self) -> dict[int, Routes]:
        """By layer, of the real tokens of the oldest forward not taken yet, row by row."""
        values, valid = self._kept.popleft()
        return {
            layer: (
                np.array(ids)[valid].astype(np.int64),
                np.array(weights.astype(mx.float32))[valid].astype(np.float64),
            )
            for layer, (ids, weights) in values.items()
        }


class DriftMeter:
    """Adds up the drift of two models that read the same batches.

    Args:
        before: The parent, watched.
        after: The child, watched.
        mapping: Which of the child's experts each of the parent's became.
    """

    def __init__(self, before: Watched, after: Watched, mapping: ExpertMap) -> None:
        self._models = before, after
        self._map = mapping
        self._prompts: list[NDArray[np.int64]] = []
        self._drift: dict[int, list[NDArray[np.float64]]] = {layer: [] for layer in mapping.layers}
        self._removed: dict[int, list[NDArray[np.float64]]] = {
            layer: [] for layer in mapping.layers
        }

    def add(self, batch: Sequence[int], lengths: Sequence[int]) -> None:
        """Take the next forward of both models.

        Args:
            batch: The prompt number of each row.
            lengths: The number of tokens of each row.
        """
        self._prompts.append(np.repeat(np.asarray(batch, np.int64), lengths))
        parent, child = (model.take() for model in self._models)
        for layer, groups in self._map.layers.items():
            drift, removed = token_drift(
                parent[layer], child[layer], groups, self._map.width(layer)
            )
            self._drift[layer].append(drift)
            self._removed[layer].append(removed)

    def found(self, seed: int = 0) -> RoutingDrift:
        """The means over all tokens, with a bootstrap over prompts."""
        if not self._map.layers:
            return RoutingDrift((), None, None, self._map.reason)
        bootstrap = Bootstrap(np.concatenate(self._prompts), seed=seed)
        drifts = {layer: np.concatenate(parts) for layer, parts in self._drift.items()}
        layers = tuple(
            LayerDrift(
                layer,
                bootstrap.measure(drift),
                float(np.concatenate(self._removed[layer]).mean()),
            )
            for layer, drift in drifts.items()
        )
        mean = bootstrap.measure(np.mean(list(drifts.values()), axis=0))
        return RoutingDrift(layers, mean, self._map.text, self._map.reason)


def token_drift(
    parent: Routes, child: Routes, groups: NDArray[np.int64], width: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The drift of each token of one layer, and the parent's share on removed experts.

    Args:
        parent: Ids and weights [tokens, k] of the parent.
        child: Ids and weights [tokens, k'] of the child.
        groups: [parent's experts] the child's expert that each became, -1 for none.
        width: The number of the child's experts.

    Returns:
        Both [tokens], from 0 to 1.

    Raises:
        UsageError: The models did not read the same number of tokens.
    """
    ids, weights = parent
    if len(ids) != len(child[0]):
        raise UsageError("both models must read the same tokens for their routing to be compared")
    before = _shares(groups[ids], weights, width)
    after = _shares(*child, width)
    drift = 0.5 * np.abs(before - after).sum(axis=1)
    return np.clip(drift, 0.0, 1.0), before[:, -1]


def _shares(
    ids: NDArray[np.int64], weights: NDArray[np.float64], width: int
) -> NDArray[np.float64]:
    """[tokens, width + 1] normalised |weights| by expert; the last column is nowhere."""
    tokens = len(ids)
    sizes = np.abs(weights)
    column = np.where(ids < 0, width, ids)
    flat = np.arange(tokens)[:, None] * (width + 1) + column
    shares = np.bincount(flat.reshape(-1), sizes.reshape(-1), minlength=tokens * (width + 1))
    shares = shares.reshape(tokens, width + 1)
    total = shares.sum(axis=1, keepdims=True)
    # A token whose weights are all zero is sent nowhere.
    shares[:, -1] += (total == 0)[:, 0]
    normalised: NDArray[np.float64] = shares / np.where(total == 0, 1.0, total)
    return normalised
