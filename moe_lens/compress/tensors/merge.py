"""New tensors from old ones: rows kept, dropped, or averaged, quantised ones in their own format.

Everything here is lazy: the arrays returned are recipes that MLX follows when the writer asks for
their bytes, one tensor at a time.

A tensor that holds one row for each expert becomes the rows of the new experts. Where nothing is
merged, rows are copied and the bytes stay what they were, packed weights included. A merged row
is the weighted mean in float32; of a quantised tensor it is dequantised, averaged and quantised
again in the same mode, bits and group size. Where the plan aligns the channels of a member, they
are permuted before the mean: rows of the projections that lead to them, columns of the one that
reads them, so that the member by itself would compute what it did. All that is done for one group
at a time, so memory does not grow with the number of experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import mlx.core as mx

from moe_lens.compress.plan.plan import ExpertGroup
from moe_lens.experts.quantisation import Leaves, Quantisation, unpack

Side = Literal["out", "in"]
"""Where a Linear of an expert has the channels: they are what it gives, or what it reads."""


def merge_rows(
    leaves: Leaves,
    groups: Sequence[ExpertGroup],
    quantisation: Quantisation | None,
    side: Side | None = None,
) -> Leaves:
    """The tensors of one Linear with one row for each group, lazily.

    Args:
        leaves: Tensors whose axis 0 is the expert axis (or the width of a router).
        groups: What each new row is made of.
        quantisation: How `weight` is packed, or None.
        side: Where the channels are; None for a router, which has none.
    """
    if not any(group.merged for group in groups):
        kept = mx.array([group.experts[0] for group in groups])
        return {name: value[kept] for name, value in leaves.items()}
    pieces: dict[str, list[mx.array]] = {name: [] for name in leaves}
    for run in _runs(groups):
        if run[0].merged:
            members = [
                {name: value[expert : expert + 1] for name, value in leaves.items()}
                for expert in run[0].experts
            ]
            made = merge_members(members, run[0], quantisation, side)
        else:
            kept = mx.array([group.experts[0] for group in run])
            made = {name: value[kept] for name, value in leaves.items()}
        for name, value in made.items():
            pieces[name].append(value)
    return {name: mx.concatenate(parts, axis=0) for name, parts in pieces.items()}


def _runs(groups: Sequence[ExpertGroup]) -> list[list[ExpertGroup]]:
    """Neighbouring kept experts together, merged ones alone."""
    runs: list[list[ExpertGroup]] = []
    for group in groups:
        if runs and not group.merged and not runs[-1][0].merged:
            runs[-1].append(group)
        else:
            runs.append([group])
    return runs


def merge_members(
    members: Sequence[Leaves],
    group: ExpertGroup,
    quantisation: Quantisation | None,
    side: Side | None = None,
) -> Leaves:
    """The weighted mean of the same Linear of the experts of a group, in its own storage format.

    Args:
        members: The tensors of each member, with or without a leading axis of 1.
        group: The shares, and the orders of channels.
        quantisation: How `weight` is packed, or None.
        side: Where the channels are; None: nothing is permuted.
    """
    shares = group.weights
    orders = (None,) * len(members) if group.orders is None else group.orders
    if side == "out":
        members = [_reordered(each, order) for each, order in zip(members, orders, strict=True)]
    merged: Leaves = {}
    if "weight" in members[0]:
        total = mean(_weights(members, orders if side == "in" else None, quantisation), shares)
        if quantisation is not None:
            merged = pack(total, members[0], quantisation)
        else:
            merged["weight"] = total.astype(members[0]["weight"].dtype)
    for name in members[0]:
        if name not in merged:
            rest = mean([each[name] for each in members], shares)
            merged[name] = rest.astype(members[0][name].dtype)
    return {name: merged[name] for name in members[0]}


def _weights(
    members: Sequence[Leaves],
    orders: Sequence[tuple[int, ...] | None] | None,
    quantisation: Quantisation | None,
) -> list[mx.array]:
    """The weight of each member, unpacked, its inputs in the given orders."""
    if quantisation is None:
        weights = [each["weight"] for each in members]
    else:
        weights = [unpack(each, quantisation) for each in members]
    return [
        weight if order is None else weight[..., mx.array(order)]
        for weight, order in zip(weights, orders or (None,) * len(weights), strict=True)
    ]


def _reordered(leaves: Leaves, order: tuple[int, ...] | None) -> Leaves:
    """A Linear whose outputs are permuted; packed rows keep their bytes."""
    if order is None:
        return leaves
    rows = mx.array(order)
    moved = dict(leaves)
    for name, value in leaves.items():
        if name == "bias":
            moved[name] = value[..., rows]
        elif name != "global_scale":
            moved[name] = value[..., rows, :]
    return moved


def mean(arrays: Sequence[mx.array], weights: Sequence[float]) -> mx.array:
    """Weighted sum in float32."""
    total = arrays[0].astype(mx.float32) * weights[0]
    for array, weight in zip(arrays[1:], weights[1:], strict=True):
        total = total + array.astype(mx.float32) * weight
    return total


def pack(rows: mx.array, like: Leaves, quantisation: Quantisation) -> Leaves:
    """Quantise `rows`; names, dtypes and shapes are those of `like`."""
    packed: Leaves = {}
    scale = None
    if "global_scale" in like:
        scale = mx.abs(rows).max().astype(mx.float32)
        packed["global_scale"] = scale.reshape(like["global_scale"].shape)
    if quantisation.mode == "affine":
        # MLX gives scales and biases the dtype of what it quantises.
        rows = rows.astype(like["scales"].dtype)
    parts = mx.quantize(
        rows,
        quantisation.group_size,
        quantisation.bits,
        mode=quantisation.mode,
        global_scale=scale,
    )
    packed |= dict(zip(("weight", "scales", "biases"), parts, strict=False))
    return packed
