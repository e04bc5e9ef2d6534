"""The channels inside an expert, and which channel of one does what a channel of another does.

Channels have no order of their own: rows of the projections that lead to them and columns of the
down projection can be permuted together, and the expert computes the same. Which is which is found
by a linear assignment (Kuhn 1955; `scipy.optimize.linear_sum_assignment`) that makes the sum of
distances smallest, the distance of two channels being the Euclidean distance of two unit vectors.
"""

from __future__ import annotations

import mlx.core as mx
import numpy as np
from scipy.optimize import linear_sum_assignment

from moe_lens.families import MoELayer, down_name
from moe_lens.families.channel_seam import ChannelSeam
from moe_lens.families.class_swap import call_original

from .matrices import expert_modules

Order = tuple[int, ...]
"""``order[c]`` is the channel of the member that goes where the target has channel c."""


def match(target: list[mx.array], member: list[mx.array]) -> Order:
    """The order of the member's channels that brings them nearest to those of the target.

    Args:
        target: Kinds of features, [width, n] each, rows of unit length.
        member: The same kinds.
    """
    cost = np.zeros((len(target[0]), len(member[0])))
    for ours, theirs in zip(target, member, strict=True):
        cosines = np.array(ours @ theirs.T, np.float64)
        cost += np.sqrt(np.maximum(2 - 2 * cosines, 0))
    _, columns = linear_sum_assignment(cost)
    return tuple(int(channel) for channel in columns)


def unit_rows(rows: mx.array) -> mx.array:
    rows = rows.astype(mx.float32)
    norms = mx.sqrt(mx.square(rows).sum(axis=-1, keepdims=True))
    return rows / mx.maximum(norms, 1e-30)


def weight_rows(layer: MoELayer, expert: int) -> mx.array:
    """[width, n] all weights (and biases) that belong to each channel of one expert."""
    parts = []
    down = down_name(layer.experts[0] if layer.list_experts else layer.experts)
    for name, matrix in expert_modules(layer, expert).items():
        if name == down:
            parts.append(matrix.rows().T)
            continue
        parts.append(matrix.rows())
        if matrix.bias is not None:
            parts.append(matrix.bias[:, None])
    return mx.concatenate(parts, axis=-1)


def channels(layer: MoELayer, expert: int, inputs: mx.array) -> mx.array:
    """[S, width] what the down projection of one expert reads, for inputs [S, hidden]."""
    shown: dict[str, mx.array] = {}
    seam = ChannelSeam(layer, shown.__setitem__)
    seam.watched = True
    try:
        seam.set_up()
        if layer.list_experts:
            call_original(layer.experts[expert], inputs)
            seam.emit_listed((len(inputs), 1))
        else:
            ids = mx.full((len(inputs), 1), expert, mx.uint32)
            seam.enter(ids)
            call_original(layer.experts, inputs, ids)
        found = shown["expert_channels"]
        mx.eval(found)
    finally:
        seam.take_down()
    return found.reshape(len(inputs), -1)
