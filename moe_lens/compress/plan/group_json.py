"""Reading how one group is merged from a plan's JSON: the order of channels and the router row."""

from __future__ import annotations

from typing import Any

from moe_lens.errors import UsageError

from .plan import LayerPlan
from .ranges import read_ranges
from .router_row import RouterRow


def read_orders(
    content: Any, experts: tuple[int, ...], place: str
) -> tuple[tuple[int, ...] | None, ...] | None:
    """One order of channels for each member, None for a member that stays as it is."""
    if content is None:
        return None
    if (
        not isinstance(content, list)
        or len(content) != len(experts)
        or any(not isinstance(each, str | None) for each in content)
    ):
        raise UsageError(
            f'{place} of the plan: "orders" must be a list with a text such as "3 0-2", or null, '
            'for each of "experts"; take it out to merge the channels as they stand'
        )
    try:
        return tuple(None if each is None else read_ranges(each) for each in content)
    except ValueError as error:
        raise UsageError(f'{place} of the plan, "orders": {error}') from error


def read_router_row(content: Any, experts: tuple[int, ...], place: str) -> RouterRow | int | None:
    """The id of a member, a row, or None for the mean."""
    if content is None:
        return None
    if type(content) is int and content in experts:
        return content
    if not isinstance(content, dict):
        raise UsageError(
            f'{place} of the plan: "router_row" is {content!r}; it must be one of the experts of '
            "the group, or an object with a row; take it out for the mean of the members' rows"
        )
    try:
        return RouterRow.from_dict(content)
    except UsageError as error:
        raise UsageError(
            f'{place} of the plan: "router_row" cannot be used: {error}; take it out for the mean '
            "of the members' rows"
        ) from error


def check_orders(layer: LayerPlan, width: int) -> None:
    """Raise UsageError unless orders are of merged experts, and name each channel once."""
    for group in layer.groups:
        if group.orders is None:
            continue
        if not group.merged or len(group.orders) != len(group.experts):
            raise UsageError(
                f'layer {layer.layer} of the plan: "orders" of {list(group.experts)} must have one '
                "entry for each expert of a merged group; take it out"
            )
        for expert, order in zip(group.experts, group.orders, strict=True):
            if order is not None and sorted(order) != list(range(width)):
                raise UsageError(
                    f"layer {layer.layer} of the plan: the order of expert {expert} must name each "
                    f"of the channels 0 to {width - 1} once"
                )
