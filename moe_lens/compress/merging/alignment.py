"""Which channel of one expert does what a channel of another does.

The channels inside an expert have no order of their own: rows of the projections that lead to
them and columns of the down projection can be permuted together, and the expert computes the same.
So before two experts are averaged, the channels of one are put in the order of the other by a
linear assignment (Kuhn 1955; `scipy.optimize.linear_sum_assignment`) that makes the sum of their
distances smallest. The distance of two channels is the Euclidean distance of two unit vectors:
what both hold on the same sampled tokens (REAM, arXiv:2604.04356, whose release compares different
tokens), or their weights [gate row | up row | down column] (Git Re-Basin, arXiv:2209.04836), or
the sum of both.
"""

from __future__ import annotations

import mlx.core as mx
import numpy as np
from scipy.optimize import linear_sum_assignment

from moe_lens.compress.calibration.layer_sample import LayerSample
from moe_lens.compress.tensors.expert_weights import expert_modules
from moe_lens.families import MoELayer, down_name
from moe_lens.families.channel_seam import ChannelSeam
from moe_lens.families.class_swap import call_original

from .cluster_methods import Cluster

Order = tuple[int, ...]
"""``order[c]`` is the channel of the member that goes where the dominant one has channel c."""


def orders(
    sample: LayerSample, cluster: Cluster, dominant: int, how: str
) -> tuple[Order | None, ...]:
    """For every member of a cluster the order of its channels; None for the dominant one.

    Args:
        sample: What the layer reads.
        cluster: The members.
        dominant: The member whose channels stay where they are.
        how: One of `merging.ALIGNMENTS`, not ``none``.
    """
    target = _features(sample, dominant, how)
    return tuple(
        None if expert == dominant else match(target, _features(sample, expert, how))
        for expert in cluster.experts
    )


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


def _features(sample: LayerSample, expert: int, how: str) -> list[mx.array]:
    found = []
    if how in ("activations", "both"):
        found.append(_unit_rows(channels(sample.layer, expert, sample.inputs).T))
    if how in ("weights", "both"):
        found.append(_unit_rows(weight_rows(sample.layer, expert)))
    return found


def _unit_rows(rows: mx.array) -> mx.array:
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
