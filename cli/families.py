"""``moe-lens families``: what is supported."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from . import screen
from .options import Json

if TYPE_CHECKING:
    from moe_lens.families import Support

_NARROW = 120

_SEAMS = {
    "inline": "the gate is a linear layer and the block routes by itself",
    "router": "a module of its own returns expert ids and weights",
    "special": "the block needs code of its own",
}


def families(
    model_type: Annotated[
        str | None,
        typer.Argument(
            metavar="[TYPE]", show_default=False, help="One model type (config.json) in detail."
        ),
    ] = None,
    json: Json = False,
) -> None:
    """List model types: what can be seen and changed in each.

    \b
    moe-lens families
    moe-lens families qwen3_moe
    """
    from moe_lens import all_supported, support

    if model_type is not None:
        one = support(model_type)
        if json:
            screen.emit_json(one.to_dict())
        else:
            screen.show(screen.facts(_details(one)))
        return
    found = all_supported()
    if json:
        screen.emit_json([each.to_dict() for each in found])
    else:
        _show_all(found)


def _show_all(found: list[Support]) -> None:
    narrow = screen.out().width < _NARROW
    names = ["model type", "family", "seam", "shows", "changes"]
    if not narrow:
        names[2:2] = ["block"]
        names.append("note")
    rows = [_row(each, narrow) for each in found]
    screen.show(screen.table(names, rows))
    values = max((each.values for each in found), key=len)
    overrides = max((each.overrides for each in found), key=len)
    legend = [
        ("shows", f"all: {', '.join(values)}"),
        ("changes", f"all: {', '.join(overrides)}"),
        *((f"seam {name}", meaning) for name, meaning in _SEAMS.items()),
        ("in all", f"{_count(found)}; `moe-lens families TYPE` says more about one"),
    ]
    screen.show("", screen.facts(legend))


def _count(found: list[Support]) -> str:
    aliases = sum(each.alias_of is not None for each in found)
    return f"{len(found) - aliases} model types, and {aliases} other names of some of them"


def _row(each: Support, narrow: bool) -> list[str]:
    shows, changes = (
        f"no {', '.join(missing)}" if missing else "all"
        for missing in (_missing(each, values=True), _missing(each, values=False))
    )
    if narrow:
        return [each.model_type, each.family, each.seam, shows, changes]
    return [each.model_type, each.family, each.block, each.seam, shows, changes, each.note]


def _missing(each: Support, *, values: bool) -> list[str]:
    """The values, or the overrides, that this model type does not have."""
    from moe_lens import VALUES

    return [name for name in each.without if (name in VALUES) == values]


def _details(one: Support) -> list[tuple[str, str]]:
    rows = [
        ("model type", one.model_type),
        *([("runs as", one.alias_of)] if one.alias_of else []),
        ("family", one.family),
        ("block", f"{one.block} of mlx-lm"),
        ("seam", f"{one.seam}: {_SEAMS[one.seam]}"),
        ("shows", ", ".join(one.values)),
        ("changes", ", ".join(one.overrides)),
    ]
    rows += [("cannot", f"{name}: {reason}") for name, reason in one.without.items()]
    rows.append(("config.json", f"{one.experts_key} (experts), {one.k_key} (experts per token)"))
    return [*rows, ("note", one.note)] if one.note else rows
