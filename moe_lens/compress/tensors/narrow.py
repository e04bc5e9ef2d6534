"""The channels inside experts: those that stay, gathered from the tensors on both sides of them.

Everything here is lazy, as in `merge`. The projections that lead to the channels hold one row for
each (their output axis), so rows are copied and packed ones keep their bytes. The down projection
holds the channels along its input axis, where quantisation packs and scales them in groups. If the
channels that stay are whole groups, their bytes are copied as well; otherwise the weight is
dequantised, gathered and quantised again in the same mode and bits, one expert at a time.
"""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx

from moe_lens.experts.quantisation import Leaves, Quantisation, unpack

from .merge import pack
from .regroup import checked_groups

Channels = Sequence[Sequence[int]]
"""For each expert the channels that stay, ascending, equally many of each."""


def narrow_rows(leaves: Leaves, channels: Channels) -> Leaves:
    """The rows of the channels that stay, of a projection that leads to the channels.

    Args:
        leaves: [E, width, ...] each; a `global_scale` [E] stays as it is.
        channels: Of each of the E experts.
    """
    rows = mx.array([list(kept) for kept in channels])
    return {
        name: value if value.ndim == 1 else _take(value, rows, 1) for name, value in leaves.items()
    }


def narrow_down(leaves: Leaves, channels: Channels, quantisation: Quantisation | None) -> Leaves:
    """The down projection of the channels that stay, in the groups that `regrouped` names.

    Args:
        leaves: `weight` [E, hidden, width], packed or not, with what belongs to it.
        channels: Of each of the E experts.
        quantisation: How `weight` is packed, or None.

    Raises:
        UsageError: So many channels are no whole groups in this mode of quantisation.
    """
    if quantisation is None:
        kept = mx.array([list(each) for each in channels])
        return {**leaves, "weight": _take(leaves["weight"], kept, 2)}
    packed = checked_groups(quantisation, len(channels[0]))
    groups = [whole_groups(each, packed.group_size) for each in channels]
    if None not in groups:
        return _keep_groups(leaves, mx.array(groups), quantisation, packed)
    made = [
        _requantised(
            {name: value[expert : expert + 1] for name, value in leaves.items()},
            kept,
            quantisation,
            packed,
        )
        for expert, kept in enumerate(channels)
    ]
    return {name: mx.concatenate([each[name] for each in made], axis=0) for name in leaves}


def whole_groups(channels: Sequence[int], size: int) -> list[int] | None:
    """The quantisation groups that `channels` are made of; None where one is not whole."""
    groups = [channel // size for channel in channels[::size]]
    whole = [channel for group in groups for channel in range(group * size, (group + 1) * size)]
    return groups if whole == list(channels) else None


def _take(value: mx.array, kept: mx.array, axis: int) -> mx.array:
    """``value[e, ..., kept[e], ...]`` along `axis` for every expert e."""
    shape = [1] * value.ndim
    shape[0], shape[axis] = kept.shape
    return mx.take_along_axis(value, kept.reshape(shape), axis=axis)


def _keep_groups(leaves: Leaves, groups: mx.array, old: Quantisation, new: Quantisation) -> Leaves:
    """Whole groups [E, n] of the size of `new`: their packed words and scales, to the last bit.

    Where `new` has smaller groups, the parts of an old one share its scale.
    """
    kept: Leaves = dict(leaves)
    parts = old.group_size // new.group_size
    for name in ("scales", "biases"):
        if name in leaves:
            kept[name] = _take(leaves[name], groups // parts, 2)
    words = mx.unflatten(leaves["weight"], 2, (leaves["scales"].shape[-1] * parts, -1))
    kept["weight"] = _take(words, groups, 2).flatten(2, 3)
    return kept


def _requantised(
    leaves: Leaves, channels: Sequence[int], old: Quantisation, new: Quantisation
) -> Leaves:
    """One expert ([1, ...] each) without its other channels, packed anew."""
    weight = unpack(leaves, old)[..., mx.array(list(channels))]
    return {**leaves, **pack(weight, leaves, new)}
