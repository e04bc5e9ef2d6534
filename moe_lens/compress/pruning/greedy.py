"""Greedy removal: one expert after another, the one the block's output misses least.

For sampled calibration tokens the outputs of all experts are known. Whether an expert may go is
then asked of the block's own rule: with it and all removed before it masked, the tokens are routed
again among the rest, weights and all, and the new routed output is compared with the parent's.
This is NAEE's criterion (arXiv:2402.14800, which tries all subsets) taken step by step.

Cost: a step tries the `CANDIDATES` experts that did least harm when last tried, and every expert is
tried at least once; so E + candidates x removed routings of the sampled tokens a layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from moe_lens.experts.answers import all_outputs
from moe_lens.experts.layer_sample import LayerSample

CANDIDATES = 8
"""Experts tried for every removal."""


@dataclass(frozen=True)
class Removal:
    """What goes from one layer, first to last, and what the block's output has lost by then."""

    order: tuple[int, ...]
    losses: tuple[float, ...]
    """Squared error of the routed output over its square, summed over the sampled tokens, once
    the expert and all before it are gone."""
    values: NDArray[np.float64]
    """[E] that loss by expert; for one that stays, what it would be if it went next. NaN for
    those that were protected, which are not tried."""


def remove_greedily(
    sample: LayerSample,
    quotas: Sequence[tuple[tuple[int, ...], int]],
    *,
    k: int,
    protected: Sequence[int] = (),
    candidates: int = CANDIDATES,
) -> Removal:
    """Choose what goes from one layer.

    Args:
        sample: What the layer reads.
        quotas: Router groups (ids of their experts), and how many experts each loses.
        k: Experts per token of the smaller model.
        protected: Experts that stay.
        candidates: Experts tried for every removal.
    """
    block = _Block(sample, k)
    left = {
        number: [expert for expert in experts if expert not in protected]
        for number, (experts, _) in enumerate(quotas)
    }
    due = {number: fewer for number, (_, fewer) in enumerate(quotas)}
    harm = {e: -np.inf for experts in left.values() for e in experts}
    removed: list[int] = []
    losses: list[float] = []
    before = block.loss(())
    while any(due.values()):
        open_ids = [e for number, experts in left.items() if due[number] for e in experts]
        # Never tried (-inf) comes first; after that the ones that did least harm when last tried.
        untried = [e for e in open_ids if harm[e] == -np.inf]
        tried = sorted((e for e in open_ids if harm[e] > -np.inf), key=lambda e: (harm[e], e))
        loss = {e: block.loss((*removed, e)) for e in untried + tried[:candidates]}
        harm |= {e: value - before for e, value in loss.items()}
        best = min(loss, key=lambda e: (loss[e], e))
        before = loss[best]
        removed.append(best)
        losses.append(before)
        number = next(n for n, experts in left.items() if best in experts)
        left[number].remove(best)
        due[number] -= 1
    values = np.full(sample.layer.num_experts, np.nan)
    values[removed] = losses
    for expert in (e for experts in left.values() for e in experts):
        values[expert] = block.loss((*removed, expert))
    return Removal(tuple(removed), tuple(losses), values)


class _Block:
    """The routed output of one block on the sampled tokens, with any experts masked."""

    def __init__(self, sample: LayerSample, k: int) -> None:
        self._layer, self._sample, self._k = sample.layer, sample, k
        self._outputs = all_outputs(sample)
        self._parent = self._routed(None, sample.layer.k)
        self._square = max(float(mx.square(self._parent).sum()), 1e-30)

    def loss(self, removed: Sequence[int]) -> float:
        """Squared error of the routed output without `removed`, relative to its square."""
        flags = np.zeros(self._layer.router_width, bool)
        flags[list(removed)] = True
        mask = mx.array(flags) if removed else None
        change = self._routed(mask, self._k) - self._parent
        return float(mx.square(change).sum()) / self._square

    def _routed(self, mask: mx.array | None, k: int) -> mx.array:
        """[S, width] sum of weight x output over the k experts of each token."""
        ids, weights = self._layer.route(
            self._sample.logits, self._sample.inputs.dtype, mask=mask, k=k
        )
        if self._layer.family.weights_on_input:
            weights = mx.ones_like(weights)
        real = ids < self._layer.num_experts
        rows = mx.arange(len(ids))[:, None]
        chosen = self._outputs[rows, mx.where(real, ids, 0)]
        # An identity expert answers with its input.
        inputs = self._sample.inputs.astype(mx.float32)[:, None, :]
        answers = (
            chosen if self._layer.zero_experts == 0 else mx.where(real[..., None], chosen, inputs)
        )
        return (answers * weights.astype(mx.float32)[..., None]).sum(axis=1)
