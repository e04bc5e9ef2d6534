"""What a plan remembers for people, checked: it is shown in tables, pictures and model cards.

It changes nothing of what a plan does, so it can always be taken out; but a slip in it must not
come up when a model is already written.
"""

from __future__ import annotations

import math
from typing import Any

from moe_lens.errors import UsageError
from moe_lens.json_shape import NUMBER, fits

_NONE = type(None)
_TEXT = {"text": str}
_MEASURE = {"value": NUMBER, "low": (NUMBER, _NONE), "high": (NUMBER, _NONE)}
_TRIAL = {
    "method": str,
    "num_experts": int,
    "expert_width": int,
    "experts_per_token": int,
    "bytes": NUMBER,
    "kl": _MEASURE,
    "perplexity": _MEASURE,
    "top1_agreement": _MEASURE,
}
_PART = {"experts": [int], "first": [int], "second": [int], "height": [NUMBER]}

_EVIDENCE: dict[str, Any] = {
    "choice": {
        "text": str,
        "definition": str,
        "limit_bytes": NUMBER,
        "validation": {"fingerprint": str, "tokens": int},
        "trials": [_TRIAL],
        "skipped": [{"method": str, "reason": str}],
    },
    "merge_tree": {"layer": int, "height": str, "parts": [_PART]},
    "experts_per_token": _TEXT,
    "router_repair": _TEXT,
    "kept_importance": {"*": (NUMBER, _NONE)},
    "calibration_prompts": [str],
}
"""What is shown or used of the evidence; ``*`` stands for every key."""

_SETTINGS: dict[str, Any] = {
    "threshold": (NUMBER, _NONE),
    "method": (str, _NONE),
    "grouping": str,
    "weights": str,
    "align": str,
    "router_rows": str,
}


def check_settings(settings: Any) -> None:
    """Raise UsageError unless the settings of a plan can be shown."""
    _check(settings, _SETTINGS, "settings")


def check_evidence(evidence: Any, num_experts: int) -> None:
    """Raise UsageError unless the evidence of a plan can be shown."""
    _check(evidence, _EVIDENCE, "evidence")
    tree = evidence.get("merge_tree")
    if tree is not None and not all(_is_tree(part, num_experts) for part in tree["parts"]):
        raise _wrong("merge_tree", "evidence")
    choice = evidence.get("choice")
    if choice is not None and not choice["trials"]:
        raise _wrong("choice", "evidence")


def _check(content: Any, shapes: dict[str, Any], where: str) -> None:
    if not isinstance(content, dict):
        raise UsageError(f'"{where}" of the plan must be an object; take it out')
    for name, shape in shapes.items():
        if content.get(name) is not None and not fits(content[name], shape):
            raise _wrong(name, where)


def _wrong(name: str, where: str) -> UsageError:
    return UsageError(
        f'"{name}" in the "{where}" of the plan is not as moe-lens writes it; take it out, it '
        "changes nothing of what the plan does"
    )


def _is_tree(part: dict[str, Any], num_experts: int) -> bool:
    """Whether each join is of two things that are there and not joined yet."""
    size = len(part["experts"])
    joins = list(zip(part["first"], part["second"], part["height"], strict=False))
    if not 0 < size <= num_experts or {len(part[name]) for name in part} != {size, size - 1}:
        return False
    if len(joins) != size - 1 or not all(0 <= each < num_experts for each in part["experts"]):
        return False
    left = set(range(size))
    for number, (first, second, height) in enumerate(joins):
        if first == second or not {first, second} <= left or not math.isfinite(height):
            return False
        left = left - {first, second} | {size + number}
    return True
