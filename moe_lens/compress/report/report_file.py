"""What lies beside the weights for people and programs: README.md, report.json and pictures."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from moe_lens import __version__
from moe_lens.compress.calibration.held_out import EVIDENCE as PROMPTS
from moe_lens.compress.plan.json_text import dump
from moe_lens.compress.plan.plan import Plan
from moe_lens.compress.tensors.parent import Parent
from moe_lens.compress.verification.verification import Verification
from moe_lens.timing import Timing

from .card import write_card
from .commands import Commands
from .pictures import Picture, write_pictures

FORMAT = "moe-lens report"
VERSION = 1
FILE = "report.json"

_CALIBRATION = (
    "unreached",
    "uncertain",
    "rank_stability",
    "stability",
    "channels_by_weights_only",
)
"""What a plan's evidence says about the calibration, and not about the plan."""

_READING = ("sample_size", "chat_template", "cpu_experts")
"""Settings of a plan that say how the text was read, and the model computed."""

_TO_APPLY = ("orders", "router_row")
"""What only the application of a plan needs, large, and only in plan.json."""


def write_report(
    folder: Path,
    parent: Parent,
    plan: Plan,
    commands: Commands,
    verification: Verification | None = None,
    notes: Sequence[str] = (),
    timing: Timing | None = None,
    request: str | None = None,
    *,
    layout: str = "mlx",
) -> None:
    """Write report.json, the model card and the pictures into the folder of a smaller model.

    Raises:
        MoeLensError: A picture cannot be written.
    """
    pictures = write_pictures(plan, folder)
    content = report(plan, commands, verification, pictures, notes, timing, request, layout=layout)
    (folder / FILE).write_text(dump(content), encoding="utf-8")
    write_card(folder, parent, plan, commands, verification, pictures, layout=layout)


def report(
    plan: Plan,
    commands: Commands,
    verification: Verification | None = None,
    pictures: Sequence[Picture] = (),
    notes: Sequence[str] = (),
    timing: Timing | None = None,
    request: str | None = None,
    *,
    layout: str = "mlx",
) -> dict[str, Any]:
    """All that is known about a smaller model, as plain values for JSON.

    Of the plan it holds what a reader asks for; the order of channels, router rows and the list of
    channels, which only applying it needs, stand in plan.json.

    Args:
        plan: What the model is made of.
        commands: That make and measure it again.
        verification: What it lost; None where nothing was measured.
        pictures: That lie beside it.
        notes: What was said while it was made.
        timing: Where the time went until now.
        request: Hash of all that decides a byte of the model, which another run can be compared by.
        layout: Of the weights: that of ``mlx`` or ``hf``.
    """
    return {
        "format": FORMAT,
        "version": VERSION,
        "summary": plan.summary(),
        "made_by": {"moe-lens": __version__, **_versions("mlx", "mlx-lm")},
        "layout": layout,
        "request": request,
        "commands": commands.to_dict(),
        "parent": plan.model.to_dict(),
        "calibration": _calibration(plan),
        "choice": plan.evidence.get("choice"),
        "plan": _plan(plan),
        "verification": None if verification is None else verification.to_dict(),
        "pictures": [each.to_dict() for each in pictures],
        "notes": list(notes),
        "timing": None if timing is None else timing.to_dict(),
    }


def _calibration(plan: Plan) -> dict[str, Any]:
    evidence = {name: plan.evidence[name] for name in _CALIBRATION if name in plan.evidence}
    settings = {name: plan.settings[name] for name in _READING if name in plan.settings}
    return {"text": plan.corpus.to_dict(), **settings, **evidence}


def _plan(plan: Plan) -> dict[str, Any]:
    content = plan.to_dict()
    elsewhere = (*_CALIBRATION, "choice", PROMPTS)
    content["evidence"] = {k: v for k, v in plan.evidence.items() if k not in elsewhere}
    for name in ("format", "version", "summary", "model", "corpus"):
        del content[name]
    for layer in content["layers"]:
        layer.pop("channels", None)
        layer["groups"] = [
            {name: value for name, value in group.items() if name not in _TO_APPLY}
            for group in layer["groups"]
        ]
    return {"file": "plan.json", **content}


def _versions(*names: str) -> dict[str, str]:
    found = {}
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
