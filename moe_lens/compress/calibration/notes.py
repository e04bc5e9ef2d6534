"""What a user should know about a calibration before trusting its plan, in sentences."""

from __future__ import annotations

from moe_lens.compress.plan.plan import Plan
from moe_lens.compress.statistics.convergence import rank_stability
from moe_lens.compress.statistics.saliency import FORMULAS
from moe_lens.compress.statistics.statistics import FEW_TOKENS, Calibration

STABLE = 0.9
"""Rank stability below which it is said that more text would change the plan."""


def calibration_notes(calibration: Calibration, plan: Plan) -> list[str]:
    """Experts that no or few tokens reached, and saliencies that another text would change."""
    method = plan.settings.get("method")
    found = [*_unreached(calibration, plan), *_uncertain(calibration)]
    if plan.kind == "prune" and method in FORMULAS:
        found += _unstable(calibration, str(method))
    return found


def _unreached(calibration: Calibration, plan: Plan) -> list[str]:
    experts = calibration.unreached()
    if not experts:
        return []
    first = plan.kind == "prune" and plan.settings.get("method") in FORMULAS
    what = (
        "their saliency is unknown and they were removed first"
        if first
        else "nothing is known about their outputs when they are chosen"
    )
    return [
        f"{_count(experts)} experts were chosen by no calibration token, so {what} "
        f"({_listed(experts)}); more or more varied calibration text would tell"
    ]


def _uncertain(calibration: Calibration) -> list[str]:
    experts = calibration.uncertain()
    if not experts:
        return []
    return [
        f"{_count(experts)} experts were chosen by fewer than {FEW_TOKENS} calibration tokens, so "
        f"what is known of them is uncertain ({_listed(experts)})"
    ]


def _unstable(calibration: Calibration, method: str) -> list[str]:
    if any(each.halves is None for each in calibration.layers):
        return []
    if calibration.corpus.prompts < 2:
        return ["the calibration text is one prompt, so how stable the ranking is cannot be told"]
    found = rank_stability(calibration.layers, method)
    layer = min(found, key=lambda index: found[index])
    if found[layer] >= STABLE:
        return []
    return [
        f"two halves of the calibration text rank the experts of layer {layer} differently (rank "
        f"correlation {found[layer]:.2f}, the lowest of {len(found)} layers): with more text other "
        "experts might go"
    ]


def _count(experts: dict[int, tuple[int, ...]]) -> int:
    return sum(map(len, experts.values()))


def _listed(experts: dict[int, tuple[int, ...]]) -> str:
    return ", ".join(f"layer {layer}: {' '.join(map(str, ids))}" for layer, ids in experts.items())
