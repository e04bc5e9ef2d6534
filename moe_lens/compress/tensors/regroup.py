"""Quantisation groups of a narrower down projection.

Its groups lie along the channels, so an expert must keep whole groups. Where the wanted width is
no multiple of the parent's group, affine quantisation takes smaller groups: more scales, half a
bit a weight from 64 to 32 with 16-bit scales, and stock mlx-lm reads the group of each module from
config.json. The floating-point modes have one group size each.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

from moe_lens.errors import UsageError
from moe_lens.experts.quantisation import Quantisation

AFFINE_GROUPS = (128, 64, 32)
"""What ``mx.quantize`` takes in mode ``affine``, largest first."""


def regrouped(quantisation: Quantisation, width: int) -> Quantisation | None:
    """The same quantisation with the largest group, up to its own, of which `width` is made.

    None: no group size fits.
    """
    if width % quantisation.group_size == 0:
        return quantisation
    if quantisation.mode != "affine":
        return None
    for size in AFFINE_GROUPS:
        if size < quantisation.group_size and width % size == 0:
            return replace(quantisation, group_size=size)
    return None


def checked_groups(quantisation: Quantisation, width: int) -> Quantisation:
    """`regrouped`, or UsageError where no group size fits."""
    found = regrouped(quantisation, width)
    if found is None:
        unit = smallest_group(quantisation)
        raise UsageError(
            f"{width} channels cannot be stored in {quantisation.mode} quantisation, which packs "
            f"them in groups of {unit}; keep a multiple of {unit}"
        )
    return found


def smallest_group(quantisation: Quantisation) -> int:
    """The width of which every width that can be stored is a multiple."""
    if quantisation.mode == "affine":
        return min(quantisation.group_size, AFFINE_GROUPS[-1])
    return quantisation.group_size


def own_groups(width: int, quantisations: Sequence[Quantisation]) -> bool:
    """Whether every down projection keeps its group size at this width."""
    return all(width % each.group_size == 0 for each in quantisations)


def describe(quantisations: Iterable[Quantisation], width: int) -> str | None:
    """What happens to down projections quantised like this, for people; None if they are not."""
    parts = []
    for old in sorted(set(quantisations), key=str):
        new = checked_groups(old, width)
        groups = f"groups of {new.group_size}"
        if new != old:
            groups += f" instead of {old.group_size}"
        parts.append(f"{old.mode}, {old.bits} bits, {groups}")
    if not parts:
        return None
    return (
        "the down projections of the experts are quantised along the channels, so those that stay "
        f"are quantised again ({'; '.join(parts)})"
    )
