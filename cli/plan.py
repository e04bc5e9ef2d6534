"""``moe-lens plan``: what a plan does to every expert, as a table and a picture."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import screen
from .options import Json, PictureFile

if TYPE_CHECKING:
    from moe_lens.compress import Plan

_MOST_ROWS = 40
"""Merged groups up to which each is shown; more stand in the plan."""


def plan(
    file: Annotated[
        Path,
        typer.Argument(
            metavar="FILE",
            show_default=False,
            help="A plan: plan.json of a smaller model, its folder, or what --save-plan wrote.",
        ),
    ],
    output: PictureFile = None,
    as_json: Json = False,
) -> None:
    """Show a plan: which experts stay, become one, or go.

    \b
    moe-lens plan demo-small/plan.json
    moe-lens plan plan.json --output plan.png

    The plan is checked like one that is applied, so this also tells whether an edited plan adds
    up. The picture has a cell for every expert of every layer.
    """
    from moe_lens.compress import read_plan

    place = file.expanduser()
    found = read_plan(place / "plan.json" if place.is_dir() else place)
    if output is not None:
        from moe_lens.figures.plan import save_plan

        save_plan(found, output)
    if as_json:
        screen.emit_json(
            {"plan": found.to_dict(), "output": None if output is None else str(output)}
        )
        return
    show_choice(found, first=True)
    show_plan(found, first=not found.evidence.get("choice"))
    screen.show("", f"Made from {found.model.name} with {found.corpus.tokens:,} tokens of text")
    if output is not None:
        screen.show(f"Written to {output}")


def show_choice(plan: Plan, *, first: bool) -> None:
    """The table of all methods, where they were tried."""
    from moe_lens.compress.choice.trial_table import choice_rows, skipped_lines

    choice: Any = plan.evidence.get("choice")
    if choice is None:
        return
    names, rows = choice_rows(choice)
    screen.heading(
        f"Methods at {choice['limit_bytes'] / 1e6:.2f} MB, tried on "
        f"{choice['validation']['tokens']:,} tokens that made no plan",
        first=first,
    )
    screen.show(screen.table(names, rows, right=names[1:]), choice["text"])
    for line in skipped_lines(choice):
        screen.note(line)


def show_plan(plan: Plan, *, first: bool) -> None:
    """What becomes of every layer, and of few merged groups how alike they are."""
    from moe_lens.compress.report.report import pair_rows, plan_rows

    screen.heading(f"Plan: {plan.summary()}", first=first)
    screen.show(screen.table(*plan_rows(plan)))
    if plan.kind != "merge":
        return
    names, rows = pair_rows(plan)
    if len(rows) <= _MOST_ROWS:
        screen.heading("Similarity in each merged group (of its least similar pair)")
        screen.show(screen.table(names, rows))
    chosen = plan.evidence.get("experts_per_token")
    if chosen:
        screen.show("", chosen["text"])
