"""The router row of a group of experts: one logit that asks for the group as its members did.

A softmax gives a group the sum of its members' shares if its logit is the log-sum-exp of theirs;
for small scores a sigmoid does so, too. That logit is no linear function of the router's input, so
the row is the one that comes nearest on sampled tokens: ridge regression on what differs from the
weighted mean of the members' rows, so that with no evidence the mean is left. The strength of the
ridge is the one, of a few, with the least leave-one-out error over the groups of the layer.

A router with a bias gets one for the group from the same regression. A correction bias, which only
helps to be chosen (arXiv:2412.19437, eq. 16), is set so that the group's score and bias are on
average what the best of its members' were.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray
from scipy.special import logsumexp

from moe_lens.compress.plan.plan import ExpertGroup
from moe_lens.compress.plan.router_row import RouterRow
from moe_lens.errors import UsageError
from moe_lens.experts.layer_sample import LayerSample
from moe_lens.experts.matrices import router_weights
from moe_lens.families import MoELayer
from moe_lens.kernels.reference import expert_scores

Floats = NDArray[np.float64]

STRENGTHS = tuple(10.0**power for power in range(-6, 3))
"""Ridge strengths that are tried, relative to the mean square length of an input."""


@dataclass(frozen=True)
class Fit:
    """Fitted logits of some groups: [S, G] on the sample, and what makes them."""

    logits: Floats
    weights: Floats
    """[G, hidden]."""
    biases: Floats | None
    """[G], where the router has a bias."""


def fitted_rows(sample: LayerSample, groups: Sequence[ExpertGroup]) -> list[RouterRow | None]:
    """The fitted row of every group that merges experts; None for those that do not.

    Args:
        sample: What the router reads on sampled tokens, and its logits.
        groups: All new experts of the layer, in order.
    """
    layer = sample.layer
    merged = [number for number, group in enumerate(groups) if group.merged]
    if not merged:
        return [None] * len(groups)
    logits = np.array(sample.logits.astype(mx.float32), np.float64)
    found = _fit(sample, [groups[number] for number in merged], logits)
    corrections = _selection_biases(layer, groups, merged, logits, found.logits)
    rows: list[RouterRow | None] = [None] * len(groups)
    for place, number in enumerate(merged):
        rows[number] = RouterRow.of(
            found.weights[place],
            None if found.biases is None else float(found.biases[place]),
            None if corrections is None else float(corrections[place]),
        )
    return rows


def logit_scale(layer: MoELayer) -> float:
    """What the block multiplies its logits by before it scores them."""
    if layer.family.route is not None:
        return 1.0
    rule = layer.rule()
    return rule.multiplier / rule.temperature


def _fit(sample: LayerSample, groups: Sequence[ExpertGroup], logits: Floats) -> Fit:
    if sample.router_inputs is None:
        raise UsageError("fitted router rows need the router's inputs: sample with router_inputs")
    inputs = np.array(sample.router_inputs.astype(mx.float32), np.float64)
    rows, bias = router_weights(sample.layer)
    scale = logit_scale(sample.layer)
    targets = np.stack(
        [logsumexp(scale * logits[:, list(group.experts)], axis=1) / scale for group in groups],
        axis=1,
    )
    shares = np.zeros((len(groups), logits.shape[1]))
    for place, group in enumerate(groups):
        shares[place, list(group.experts)] = group.weights
    start = logits @ shares.T
    left = targets - start
    centre, level = np.zeros(inputs.shape[1]), np.zeros(len(groups))
    if bias is not None:
        centre, level = inputs.mean(axis=0), left.mean(axis=0)
    change = ridge(inputs - centre, left - level)
    shift = level - centre @ change
    return Fit(
        logits=start + inputs @ change + shift,
        weights=shares @ rows + change.T,
        biases=None if bias is None else shares @ bias + shift,
    )


def ridge(inputs: Floats, targets: Floats) -> Floats:
    """[n, G] coefficients of the ridge regression with the least leave-one-out error.

    Args:
        inputs: [S, n].
        targets: [S, G]; all share one strength out of `STRENGTHS`.
    """
    vectors, squares = _left_singular(inputs)
    scale = max(float(squares.sum()) / len(inputs), 1e-30)
    turned = vectors.T @ targets
    best, least = turned, np.inf
    for strength in STRENGTHS:
        inverse = 1 / (squares + strength * scale)
        # Leave-one-out residuals of ridge regression in closed form (Allen 1974, PRESS).
        missed = targets - vectors @ ((squares * inverse)[:, None] * turned)
        leverage = np.minimum((vectors**2) @ (squares * inverse), 1 - 1e-9)
        error = float(((missed / (1 - leverage)[:, None]) ** 2).sum())
        if error < least:
            best, least = inverse[:, None] * turned, error
    change: Floats = inputs.T @ (vectors @ best)
    return change


def _left_singular(inputs: Floats) -> tuple[Floats, Floats]:
    """[S, r] left singular vectors of [S, n], and [r] squared singular values that are not 0.

    From the smaller of both Gram matrices: the work grows with the cube of its size.
    """
    wide = inputs.shape[1] >= len(inputs)
    squares, vectors = np.linalg.eigh(inputs @ inputs.T if wide else inputs.T @ inputs)
    real = squares > max(float(squares[-1]), 1e-300) * 1e-12
    squares, vectors = squares[real], vectors[:, real]
    if not wide:
        vectors = inputs @ vectors / np.sqrt(squares)
    return vectors, squares


def _selection_biases(
    layer: MoELayer,
    groups: Sequence[ExpertGroup],
    merged: Sequence[int],
    logits: Floats,
    fitted: Floats,
) -> Floats | None:
    """[merged] the correction bias of every merged group; None where the rule has none."""
    if layer.family.route is not None:
        return None
    rule = layer.rule()
    if rule.selection_bias is None:
        return None
    bias = np.array(rule.selection_bias.astype(mx.float32), np.float64)
    kept = [group.experts[0] for group in groups]
    kept += range(layer.num_experts, layer.router_width)
    new_logits = logits[:, kept]
    new_logits[:, list(merged)] = fitted
    before = np.array(expert_scores(rule, mx.array(logits, mx.float32)), np.float64) + bias
    after = np.array(expert_scores(rule, mx.array(new_logits, mx.float32)), np.float64)
    return np.array(
        [
            (before[:, list(groups[number].experts)].max(axis=1) - after[:, number]).mean()
            for number in merged
        ]
    )
