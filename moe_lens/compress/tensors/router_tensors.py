"""The tensors of the smaller router: rows of members, their mean, or rows that the plan brings.

By what they mean: a row of the projection (with its bias) asks for an expert, a correction bias
helps it to be chosen, so both follow the plan's `router_row`. A per-expert scale multiplies what
the expert answers; the answer of a group is the mean of its members', so is its scale.
"""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx

from moe_lens.compress.plan.plan import ExpertGroup
from moe_lens.compress.plan.router_row import RouterRow
from moe_lens.errors import UsageError
from moe_lens.experts.quantisation import Leaves, Quantisation

from .merge import merge_rows, pack


def smaller_router(
    leaves: Leaves,
    groups: Sequence[ExpertGroup],
    quantisation: Quantisation | None,
    *,
    place: str,
    projection: bool,
    selection_bias: str | None,
    scale: str | None,
) -> Leaves:
    """The tensors of one module of a router with one row for each new expert, lazily.

    Args:
        leaves: Tensors by their last name; axis 0 is the width of the router.
        groups: What each new row is made of, identity experts included.
        quantisation: How `weight` is packed, or None.
        place: The path of the module, for errors.
        projection: Whether `weight` and `bias` make the logits.
        selection_bias: The name of the leaf that corrects the selection, if it is here.
        scale: The name of the leaf that scales the experts' outputs, if it is here.

    Raises:
        UsageError: A row of the plan is not as long as the router's input.
    """
    scales = {name: value for name, value in leaves.items() if name == scale}
    asking = {name: value for name, value in leaves.items() if name != scale}
    members = [_row_source(group) for group in groups]
    made = merge_rows(scales, groups, None) if scales else {}
    if not asking:
        return made
    made |= merge_rows(asking, members, quantisation)
    given = {
        number: group.router_row
        for number, group in enumerate(groups)
        if isinstance(group.router_row, RouterRow)
    }
    if not given:
        return made
    numbers, rows = list(given), list(given.values())
    if projection:
        _put(made, numbers, _projection(asking, rows, quantisation, place))
        _put_numbers(made, "bias", dict(zip(numbers, (row.bias for row in rows), strict=True)))
    if selection_bias is not None:
        biases = (row.selection_bias for row in rows)
        _put_numbers(made, selection_bias, dict(zip(numbers, biases, strict=True)))
    return made


def _row_source(group: ExpertGroup) -> ExpertGroup:
    """The group whose mean is the row; one expert where it is that of a member."""
    if isinstance(group.router_row, int):
        return ExpertGroup.single(group.router_row)
    return group


def _projection(
    like: Leaves, rows: Sequence[RouterRow], quantisation: Quantisation | None, place: str
) -> Leaves:
    """The given rows as the module stores them."""
    width = like["weight"].shape[-1]
    if quantisation is not None:
        width = like["scales"].shape[-1] * quantisation.group_size
    values = [row.values() for row in rows]
    for each in values:
        if len(each) != width:
            raise UsageError(
                f'a "router_row" of the plan has {len(each)} numbers, but {place} reads {width}; '
                "make a plan for this model"
            )
    weight = mx.stack([mx.array(each) for each in values])
    if quantisation is None:
        return {"weight": weight.astype(like["weight"].dtype)}
    return pack(weight, like, quantisation)


def _put(made: Leaves, numbers: Sequence[int], rows: Leaves) -> None:
    for name, values in rows.items():
        changed = made[name][:]
        changed[mx.array(list(numbers))] = values
        made[name] = changed


def _put_numbers(made: Leaves, name: str, values: dict[int, float | None]) -> None:
    """Scalars of the rows that bring one; the others keep the mean of their members."""
    known = {number: value for number, value in values.items() if value is not None}
    if name in made and known:
        dtype = made[name].dtype
        _put(made, list(known), {name: mx.array(list(known.values()), mx.float32).astype(dtype)})
