"""The groups of prompts that are measured: all, and each label; from a trace or a profile."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from moe_lens.analysis.passes import Fold, fold
from moe_lens.analysis.units import UnitCounts, Units
from moe_lens.errors import CaptureError
from moe_lens.profile import Profile
from moe_lens.telling import Progress
from moe_lens.trace import Trace

from .sums import LogitSums, WeightSums

__all__ = ["Group", "of_profile", "of_trace", "why_no_logits"]

Array = NDArray[np.float64]

NO_LOGITS = (
    "router logits were not recorded; record them with moe-lens trace ... --router-logits, or give "
    "the model itself"
)


@dataclass(frozen=True, eq=False)
class Group:
    """Units that are measured together.

    `stratum` is the group of units that each is drawn with; `sums` are [units, layers] by name;
    `means` are [layers] by name, of what is not known by unit.
    """

    name: str
    stratum: NDArray[np.int64]
    tokens: NDArray[np.int64]
    prompts: int
    counts: NDArray[np.int64]
    sums: dict[str, Array]
    probability: Array | None = None
    means: dict[str, Array] = field(default_factory=dict)


def why_no_logits(trace: Trace) -> str:
    """Why a trace has no router logits, and what to do."""
    reason = trace.model.get("missing", {}).get("router_logits")
    return NO_LOGITS if reason is None else f"the model gives none ({reason})"


def of_trace(trace: Trace, progress: Progress | None) -> tuple[list[Group], LogitSums | None]:
    """All prompts and each label with tokens, and what the logits add up to if they are there."""
    units = Units.of(trace)
    counted = UnitCounts(units, len(trace.layers), trace.router_width)
    weights = WeightSums(units, len(trace.layers))
    logits = None
    folds: list[Fold] = [counted, weights]
    sums = {"weight_mass": weights.mass, "weight_margin": weights.margin}
    if trace.has_router_logits:
        logits = LogitSums(units, len(trace.layers), trace.router_width)
        folds.append(logits)
        sums |= {
            "router_entropy": logits.entropy,
            "softmax_mass": logits.mass,
            "logit_margin": logits.margin,
        }
    fold(trace, *folds, progress=progress)
    members = [np.arange(len(units))]
    members += [np.flatnonzero(units.label == place) for place in range(len(units.names))]
    groups = [
        Group(
            name=name,
            stratum=units.label[own],
            tokens=units.tokens[own],
            prompts=int(units.prompts[own].sum()),
            counts=counted.counts[own],
            sums={each: table[own] for each, table in sums.items()},
            probability=None if logits is None else logits.probability[own],
        )
        for name, own in zip(("all", *units.names), members, strict=True)
        if len(own)
    ]
    return groups, logits


def of_profile(profile: Profile) -> list[Group]:
    """All prompts by blocks of the profile, and each label as one unit."""
    if profile.num_tokens == 0:
        raise CaptureError("the profile has no tokens; record it again")
    filled = np.flatnonzero(profile.block_tokens)
    counts, tokens = profile.block_counts[filled], profile.block_tokens[filled]
    alike = np.zeros(len(filled), dtype=np.int64)
    mass = {"weight_mass": profile.weight_sums.sum(axis=1) / profile.num_tokens}
    unknown = {"weight_mass": np.full(len(profile.layers), np.nan)}
    groups = [Group("all", alike, tokens, profile.num_prompts, counts, {}, means=mass)]
    for place, name in enumerate(profile.labels):
        if profile.label_tokens[place]:
            one = slice(place, place + 1)
            groups.append(
                Group(
                    name,
                    alike[:1],
                    profile.label_tokens[one],
                    int(profile.label_prompts[place]),
                    profile.label_counts[one],
                    {},
                    means=unknown,
                )
            )
    return groups
