"""Which channels inside each expert matter least, and a plan without them.

The same number goes from every expert of every layer, since stock mlx-lm takes one width. Which
ones is decided for each expert by itself.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from moe_lens.compress.plan.plan import ExpertGroup, LayerPlan, Plan
from moe_lens.compress.plan.plan_json import validate
from moe_lens.compress.plan.ranges import write_ranges
from moe_lens.compress.statistics.channel_statistics import ChannelCalibration, ChannelStatistics
from moe_lens.errors import UsageError

IMPORTANCE = (
    "importance of a channel: sum, over the calibration tokens routed to its expert, of the "
    "squared weight of the expert x the squared value of the channel, times the squared L2 norm of "
    "its column in the down projection; the channel's own share of the squared change of the "
    "layer's output when it is removed"
)

FEWEST_TOKENS = 16
"""Tokens below which an expert's channels are judged by their weights alone. The mean of n squares
of a normal variable is known to sqrt(2 / n) of itself: a third at 16."""


def channel_importance(statistics: ChannelStatistics) -> NDArray[np.float64]:
    """[E, width] how much the layer's output changes without each channel, in squared norm.

    The routed output is the sum of g h_c W[:, c] over experts and channels c, so taking channel c
    away changes it by exactly g h_c W[:, c]: squared and summed over tokens that is
    sum(g^2 h_c^2) ||W[:, c]||^2, the second-order term of Optimal Brain Damage (LeCun 1990) with
    the identity as the Hessian of the layer's output. HEAPr (arXiv:2509.22299) has the Hessian of
    the loss in its place, for which it needs gradients. What channels share (the cross terms) is
    left out.

    Experts with fewer than `FEWEST_TOKENS` tokens are judged by their weights: the squared norm
    of the column, times those of the rows that make the channel, which is what the formula gives
    up to a factor for inputs that point everywhere alike.
    """
    measured = statistics.weighted_squares * statistics.column_squares
    weights_only = statistics.row_squares * statistics.column_squares
    known = statistics.counts >= FEWEST_TOKENS
    return np.where(known[:, None], measured, weights_only)


def most_important(values: NDArray[np.float64], width: int) -> tuple[int, ...]:
    """The `width` most important channels of one expert, ascending; ties go to the lower one."""
    order = np.argsort(-values, kind="stable")
    return tuple(sorted(order[:width].tolist()))


def plan_channels(
    calibration: ChannelCalibration,
    width: int,
    plan: Plan | None = None,
    *,
    experts_per_token: int | None = None,
) -> Plan:
    """Keep the `width` most important channels of every expert.

    Args:
        calibration: Of the parent.
        width: What `width_for` gave.
        plan: A plan that removes experts; those it keeps lose channels as well. None: all stay.
        experts_per_token: Without `plan`: of the smaller model; None keeps it.

    Raises:
        UsageError: `plan` merges experts or is of another model, or `width` does not fit it.
    """
    plan = _every_expert(calibration, experts_per_token) if plan is None else plan
    if plan.model != calibration.model:
        raise UsageError(
            "the plan and the calibration of the channels are of different models; make both from "
            "one"
        )
    layers, kept_share, few = [], {}, {}
    for layer in plan.layers:
        statistics = calibration.layer(layer.layer)
        importance = channel_importance(statistics)
        channels = {
            group.experts[0]: most_important(importance[group.experts[0]], width)
            for group in layer.groups
        }
        layers.append(replace(layer, channels=tuple(channels.values())))
        measured = [e for e in channels if statistics.counts[e] >= FEWEST_TOKENS]
        kept = sum(importance[e, list(channels[e])].sum() for e in measured)
        whole = importance[measured].sum()
        kept_share[str(layer.layer)] = round(float(kept / whole), 6) if whole > 0 else None
        guessed = [e for e in channels if e not in measured]
        if guessed:
            few[str(layer.layer)] = write_ranges(guessed)
    made = replace(
        plan,
        layers=tuple(layers),
        expert_width=width,
        settings={**plan.settings, "expert_width": width},
        evidence={
            **plan.evidence,
            "kept_importance": kept_share,
            "channels_by_weights_only": few,
        },
    )
    validate(made)
    return made


def _every_expert(calibration: ChannelCalibration, experts_per_token: int | None) -> Plan:
    """A plan that keeps all experts."""
    model = calibration.model
    everything = tuple(ExpertGroup.single(expert) for expert in range(model.num_experts))
    return Plan(
        kind="channels",
        model=model,
        corpus=calibration.corpus,
        num_experts=model.num_experts,
        experts_per_token=experts_per_token or model.experts_per_token,
        layers=tuple(LayerPlan(each.layer, everything) for each in calibration.layers),
    )
