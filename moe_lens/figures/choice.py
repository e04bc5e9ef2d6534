"""What every method that was tried for one size loses: a picture of the choice among them.

save_choice(plan, "methods.png")
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from matplotlib.figure import Figure

from moe_lens.errors import UsageError

from .colors import hex_color
from .picture_file import write_picture
from .plan import KEPT, REMOVED
from .styles import TICK_SIZE, Style, style_named, write_caption

if TYPE_CHECKING:
    from moe_lens.compress.plan.plan import Plan

__all__ = ["draw_choice", "save_choice"]

_BELOW = 30.0
"""An interval that reaches down to 0 is cut off at this part of the least loss: the scale is
logarithmic."""


def save_choice(
    plan: Plan, path: str | os.PathLike[str], *, style: str = "light", dpi: int = 150
) -> Path:
    """Write the picture, whole or not at all; the arguments are those of `plan.save_plan`.

    Raises:
        UsageError: No methods were tried for this plan, or the format or style is not known.
        MoeLensError: The file cannot be written.
    """
    return write_picture(path, lambda: draw_choice(plan, style=style), dpi)


def draw_choice(plan: Plan, *, style: str = "light") -> Figure:
    """The picture as a matplotlib figure: the best trial of each method, the least loss on top.

    All were made for one size, so what each takes stands beside it in figures.

    Raises:
        UsageError: No methods were tried for this plan, or the style is not known.
    """
    choice: Any = plan.evidence.get("choice")
    if not choice:
        raise UsageError("no methods were tried for this plan: only --method auto tries them")
    look = style_named(style)
    best: dict[str, Any] = {}
    for trial in choice["trials"]:  # least loss first
        best.setdefault(trial["method"], trial)
    trials = list(best.values())
    limit = choice["limit_bytes"] / 1e6
    figure = look.figure(1.7 + 0.31 * len(trials), f"Methods at {limit:.4g} MB · {plan.model.name}")
    axes = figure.subplots()
    look.dress(axes)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter("{x:g}")
    least = min((t["kl"]["value"] for t in trials if t["kl"]["value"]), default=1.0) / _BELOW
    for place, trial in enumerate(trials):
        _mark(axes, place, trial, least, chosen=place == 0, look=look)
    axes.set_yticks(range(len(trials)), [trial["method"] for trial in trials])
    axes.set_ylim(len(trials) - 0.5, -0.5)
    axes.get_yticklabels()[0].set_fontweight("bold")
    beside = axes.secondary_yaxis("right")
    beside.set_yticks(range(len(trials)), [_size(trial) for trial in trials])
    beside.tick_params(colors=look.ink, labelsize=TICK_SIZE, length=0)
    axes.set_xlabel("KL divergence from the parent, nats per token")
    axes.grid(visible=True, axis="x", color=look.faint, linewidth=0.6)
    axes.set_axisbelow(True)
    tokens = choice["validation"]["tokens"]
    write_caption(
        axes,
        f"Measured on {tokens:,} tokens that made no plan; bars hold the middle 95 % of a "
        "bootstrap over prompts. Right: experts × channels."
        + (" Red: random removal, what any method must beat." if "random" in best else ""),
        look,
    )
    return figure


def _mark(axes: Any, place: int, trial: Any, least: float, *, chosen: bool, look: Style) -> None:
    kl = trial["kl"]
    color = hex_color(KEPT)
    if chosen:
        color = look.ink
    elif trial["method"] == "random":
        color = hex_color(REMOVED)
    value = max(kl["value"] or 0.0, least)
    if kl["low"] is not None and kl["high"] is not None:
        bar = [max(kl["low"], least), max(kl["high"], least)]
        axes.plot(bar, [place] * 2, color=color, linewidth=2.0, solid_capstyle="butt")
    axes.plot(
        [value], [place], marker="D" if chosen else "o", markersize=8, color=color, linestyle=""
    )


def _size(trial: Any) -> str:
    """``12 x 192, 2 per token, 3.53 MB``."""
    return (
        f"{trial['num_experts']} × {trial['expert_width']}, {trial['experts_per_token']} per token,"
        f" {trial['bytes'] / 1e6:.3g} MB"
    )
