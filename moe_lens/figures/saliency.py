"""How salient every expert was, layer by layer, and which went: a picture of a plan that removes.

save_saliency(plan, "saliency.png")
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from moe_lens.errors import UsageError

from .colors import hex_color
from .picture_file import write_picture
from .plan import KEPT, REMOVED
from .styles import TICK_SIZE, Style, style_named, write_caption

if TYPE_CHECKING:
    from moe_lens.compress.plan.plan import Plan

__all__ = ["draw_saliency", "save_saliency"]

_NUMBERED = 12
"""More layers than this leave no room for the numbers of removed experts."""

_WIDE = 20.0
"""Largest / smallest saliency from which the scale is logarithmic."""


def save_saliency(
    plan: Plan, path: str | os.PathLike[str], *, style: str = "light", dpi: int = 150
) -> Path:
    """Write the picture, whole or not at all; the arguments are those of `plan.save_plan`.

    Raises:
        UsageError: The plan has no saliencies, or the format or style is not known.
        MoeLensError: The file cannot be written.
    """
    return write_picture(path, lambda: draw_saliency(plan, style=style), dpi)


def draw_saliency(plan: Plan, *, style: str = "light") -> Figure:
    """The picture as a matplotlib figure: one strip for each layer, in it the experts by number.

    Raises:
        UsageError: The plan has no saliencies, or the style is not known.
    """
    if not any(layer.saliency for layer in plan.layers):
        raise UsageError(
            "this plan judges no expert by a saliency: only plans that remove experts have one"
        )
    look = style_named(style)
    figure = look.figure(6.4, f"Saliency · {plan.model.name}")
    axes = figure.subplots()
    look.dress(axes)
    values = _values(plan)
    _scale(axes, values)
    removed = np.zeros(values.shape, bool)
    for row, layer in enumerate(plan.layers):
        removed[row, list(layer.removed)] = True
    rows, experts = values.shape
    across = (np.arange(experts) + 0.5) / experts * 0.84 - 0.42
    places = np.arange(rows)[:, None] + across
    known = ~np.isnan(values)
    size = float(np.clip(9000 / values.size, 6, 42))
    kept = known & ~removed
    axes.scatter(places[kept], values[kept], s=size, color=hex_color(KEPT), label="stays")
    gone = known & removed
    axes.scatter(
        places[gone],
        values[gone],
        s=size,
        marker="x",
        color=hex_color(REMOVED),
        linewidth=1.8 if size > 12 else 1.0,
        label="removed",
    )
    if not known.all():
        _unknown(axes, places[~known], size)
    if rows <= _NUMBERED:
        _numbers(axes, places, values, gone, look)
    _ticks(axes, plan, look)
    method = plan.settings.get("method", "")
    axes.set_ylabel(f"saliency ({method})" if method else "saliency")
    meaning = plan.definition.partition(";")[0]
    write_caption(
        axes,
        f"{meaning[:1].upper()}{meaning[1:]}. In each strip the experts by number, 0 to "
        f"{experts - 1}.",
        look,
    )
    figure.legend(
        loc="outside lower left",
        ncols=3,
        frameon=False,
        fontsize=TICK_SIZE,
        labelcolor=look.ink,
    )
    return figure


def _values(plan: Plan) -> NDArray[np.float64]:
    """[layers, experts] NaN where nothing is known."""
    unknown = (None,) * plan.model.num_experts
    return np.array(
        [
            [np.nan if value is None else value for value in layer.saliency or unknown]
            for layer in plan.layers
        ],
        np.float64,
    )


def _scale(axes: Any, values: NDArray[np.float64]) -> None:
    known = values[~np.isnan(values)]
    if known.size and known.min() > 0 and known.max() > _WIDE * known.min():
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")
    elif known.size and known.min() >= 0:
        axes.set_ylim(0, 1.06 * max(float(known.max()), 1e-12))


def _unknown(axes: Any, places: NDArray[np.float64], size: float) -> None:
    """Experts that no token chose, along the lower edge."""
    axes.scatter(
        places,
        np.full(places.shape, 0.012),
        s=size,
        marker="^",
        facecolors="none",
        edgecolors=hex_color(REMOVED),
        transform=axes.get_xaxis_transform(),
        label="chosen by no token",
    )


def _numbers(
    axes: Any,
    places: NDArray[np.float64],
    values: NDArray[np.float64],
    gone: NDArray[np.bool_],
    look: Style,
) -> None:
    for row, expert in zip(*np.nonzero(gone), strict=True):
        axes.annotate(
            str(expert),
            (places[row, expert], values[row, expert]),
            xytext=(0, -6),
            textcoords="offset points",
            ha="center",
            va="top",
            fontsize=TICK_SIZE - 2,
            color=look.ink,
        )


def _ticks(axes: Any, plan: Plan, look: Style) -> None:
    rows = len(plan.layers)
    step = 1
    while rows / step > 40:
        step *= 2
    places = range(0, rows, step)
    axes.set_xticks(places, [str(plan.layers[place].layer) for place in places])
    axes.set_xlabel("layer")
    axes.set_xlim(-0.5, rows - 0.5)
    for edge in range(1, rows):
        axes.axvline(edge - 0.5, color=look.faint, linewidth=0.8)
    axes.grid(visible=True, axis="y", color=look.faint, linewidth=0.6)
    axes.set_axisbelow(True)
