"""A plan as a picture: what becomes of every expert, layer by layer.

    save_plan(read_plan("demo-small/plan.json"), "plan.png")

An expert that stays is blue (grey beside merged ones), up to the share of its channels that stays;
experts that become one have one colour; one that is removed is an empty cell with a cross.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from numpy.typing import NDArray

from .colors import RGB, hex_color, readable_on, tag_color
from .picture_file import write_picture
from .styles import TICK_SIZE, Style, style_named, write_caption

if TYPE_CHECKING:
    from moe_lens.compress.plan.plan import ExpertGroup, LayerPlan, Plan

__all__ = ["draw_plan", "save_plan"]

KEPT: RGB = (107, 155, 196)
KEPT_BESIDE_MERGED: RGB = (204, 207, 211)
"""No colour, where colours tell groups apart."""
REMOVED: RGB = (214, 39, 40)
"""Of the crosses: apart from the blue in lightness as well, for the colour-blind."""

_STEPS = 16
"""Parts of the height of a cell, for the share of the channels."""

NUMBERED = 24
"""More experts than this leave no room for numbers in the cells."""

_LABELLED = 40
"""More layers than this leave no room for what stands beside each."""


def save_plan(
    plan: Plan, path: str | os.PathLike[str], *, style: str = "light", dpi: int = 150
) -> Path:
    """Write the picture of a plan, whole or not at all.

    Args:
        plan: What `moe_lens.compress.read_plan` or a ``plan_...`` function returned.
        path: File to write; its ending chooses the format: ``.png``, ``.svg`` or ``.pdf``.
        style: ``"light"`` or ``"dark"``.
        dpi: Dots per inch of a PNG; 150 gives 1920 pixels of width.

    Raises:
        UsageError: The format or style is not known.
        MoeLensError: The file cannot be written.
    """
    return write_picture(path, lambda: draw_plan(plan, style=style), dpi)


def draw_plan(plan: Plan, *, style: str = "light") -> Figure:
    """The picture as a matplotlib figure: experts of the parent to the right, layers down."""
    look = style_named(style)
    experts, rows = plan.model.num_experts, len(plan.layers)
    figure = look.figure(min(2.2 + 0.34 * rows, 13.0), f"Plan · {plan.model.name}")
    axes = figure.subplots()
    axes.imshow(
        np.concatenate([_row(layer, plan, look) for layer in plan.layers]),
        extent=(-0.5, experts - 0.5, rows - 0.5, -0.5),
        aspect="auto",
        interpolation="nearest",
    )
    look.dress(axes)
    _crosses(axes, plan)
    if experts <= NUMBERED and rows <= _LABELLED:
        for place, layer in enumerate(plan.layers):
            _numbers(axes, place, layer, plan)
    for edge in range(1, rows):
        axes.axhline(edge - 0.5, color=look.paper, linewidth=2.5 if rows <= _LABELLED else 0.6)
    for edge in range(1, experts):
        axes.axvline(edge - 0.5, color=look.paper, linewidth=1.5 if experts <= 64 else 0.4)
    _ticks(axes, plan, look)
    write_caption(axes, plan.summary().replace("->", "→"), look)
    _legend(figure, plan, look)
    return figure


def _row(layer: LayerPlan, plan: Plan, look: Style) -> NDArray[np.float64]:
    """[steps, experts, 3] the colours of one layer."""
    empty = look.colors.get_bad()[:3]
    cells = np.empty((_STEPS, plan.model.num_experts, 3))
    cells[:] = empty
    for number, group in enumerate(layer.groups):
        paint = _paint(plan, number, group)
        share = 1.0
        if layer.channels is not None and plan.model.expert_width:
            share = len(layer.channels[number]) / plan.model.expert_width
        filled = max(1, round(_STEPS * share))
        cells[_STEPS - filled :, list(group.experts)] = np.array(paint) / 255
    return cells


def _paint(plan: Plan, number: int, group: ExpertGroup) -> RGB:
    if group.merged:
        return tag_color(number)
    return KEPT_BESIDE_MERGED if plan.kind == "merge" else KEPT


def _crosses(axes: Any, plan: Plan) -> None:
    places = [(e, row) for row, layer in enumerate(plan.layers) for e in layer.removed]
    if places:
        size = float(np.clip(900 / max(plan.model.num_experts, 6 * len(plan.layers)), 3, 60))
        axes.scatter(
            *zip(*places, strict=True),
            marker="x",
            s=size,
            color=hex_color(REMOVED),
            linewidth=1.6 if size > 12 else 0.8,
        )


def _numbers(axes: Any, place: int, layer: LayerPlan, plan: Plan) -> None:
    """In every cell that stays the number of the new expert."""
    for number, group in enumerate(layer.groups):
        ink = hex_color(readable_on(_paint(plan, number, group)))
        # Half-filled cells are filled from below; the number stands in the part that is.
        height = 0.22 if layer.channels is not None else 0.0
        for expert in group.experts:
            axes.text(
                expert,
                place + height,
                str(number),
                ha="center",
                va="center",
                color=ink,
                fontsize=TICK_SIZE - 1 - 2 * (layer.channels is not None),
            )


def _ticks(axes: Any, plan: Plan, look: Style) -> None:
    experts, rows = plan.model.num_experts, len(plan.layers)
    step = 1
    while experts / step > 34:
        step *= 2
    axes.set_xticks(range(0, experts, step), [str(e) for e in range(0, experts, step)])
    axes.set_xlabel("expert of the parent")
    step = 1
    while rows / step > _LABELLED:
        step *= 2
    places = range(0, rows, step)
    axes.set_yticks(places, [str(plan.layers[place].layer) for place in places])
    axes.set_ylabel("layer")
    if step > 1:
        return
    beside = axes.secondary_yaxis("right")
    beside.set_yticks(range(rows), [_what(layer, plan) for layer in plan.layers])
    beside.tick_params(colors=look.ink, labelsize=TICK_SIZE, length=0)
    beside.spines["right"].set_visible(False)


def _what(layer: LayerPlan, plan: Plan) -> str:
    """What stays of one layer, in a few words."""
    parts = []
    if len(layer.groups) < plan.model.num_experts:
        parts.append(f"{plan.model.num_experts} → {len(layer.groups)}")
    kept = plan.evidence.get("kept_importance", {}).get(str(layer.layer))
    if kept is not None:
        parts.append(f"{kept:.1%} of importance")
    known = [group.similarity for group in layer.groups if group.similarity is not None]
    if known:
        parts.append(f"similarity ≥ {min(known):.2f}")
    return ", ".join(parts)


def _legend(figure: Figure, plan: Plan, look: Style) -> None:
    """The meaning of the colours that the picture holds."""
    handles: list[Any] = []
    groups = [group for layer in plan.layers for group in layer.groups]
    channels = any(layer.channels is not None for layer in plan.layers)
    single = next((group for group in groups if not group.merged), None)
    if single is not None:
        kept = _paint(plan, 0, single)
        text = "stays, filled to the share of its channels" if channels else "stays as it is"
        handles.append(Patch(color=hex_color(kept), label=text))
    if any(group.merged for group in groups):
        numbers = (n for layer in plan.layers for n, g in enumerate(layer.groups) if g.merged)
        color = hex_color(tag_color(next(numbers)))
        handles.append(Patch(color=color, label="one colour in a layer: become one"))
    if any(layer.removed for layer in plan.layers):
        look_of_cross: dict[str, Any] = {"marker": "x", "linestyle": "", "markeredgewidth": 1.6}
        handles.append(Line2D([], [], color=hex_color(REMOVED), label="removed", **look_of_cross))
    if plan.model.num_experts <= NUMBERED and len(plan.layers) <= _LABELLED:
        handles.append(Patch(color="none", label="numbers: the new expert"))
    figure.legend(
        handles=handles,
        loc="outside lower left",
        ncols=len(handles),
        frameon=False,
        fontsize=TICK_SIZE,
        labelcolor=look.ink,
    )
