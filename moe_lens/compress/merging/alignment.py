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

from moe_lens.experts.channels import Order, channels, match, unit_rows, weight_rows
from moe_lens.experts.layer_sample import LayerSample

from .cluster_methods import Cluster


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


def _features(sample: LayerSample, expert: int, how: str) -> list[mx.array]:
    found = []
    if how in ("activations", "both"):
        found.append(unit_rows(channels(sample.layer, expert, sample.inputs).T))
    if how in ("weights", "both"):
        found.append(unit_rows(weight_rows(sample.layer, expert)))
    return found
