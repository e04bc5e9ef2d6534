"""The analysis as a whole: two readings of a trace, then everything from sums.

    found = pipeline(Trace.open("run/"))
    found.chains[0].experts                      # the chain of the first label, layer by layer
    found.information.bits                       # what each MoE layer's choice tells of the next's

The first reading counts; it decides which steps, chains and matchings are looked at. The second
counts these by unit, for intervals and tests. What is kept does not grow with tokens.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from moe_lens.analysis.enrichment import FEWEST_TOKENS, Enrichment, enrichment
from moe_lens.analysis.passes import Fold, fold
from moe_lens.analysis.units import UnitCounts, Units
from moe_lens.errors import UsageError
from moe_lens.telling import Progress
from moe_lens.trace import Trace

from .chains import MOST_LABELS, Chain, ChainUnits, Halves, best_chains, chains
from .counting import StepCounts
from .flows import FlowUnits, shown_experts
from .information import PointwiseSums, information
from .matching import (
    Matched,
    MatchedFlow,
    TokenProfiles,
    match_layers,
    matching,
    token_influence,
)
from .result import Pipeline, definition
from .roles import roles
from .steps import StepUnits, judged, strongest

__all__ = ["pipeline"]


def pipeline(
    trace: Trace, *, width: int = 1, seed: int = 0, progress: Progress | None = None
) -> Pipeline:
    """Follow tokens through the experts of successive MoE layers.

    Args:
        trace: A recorded run. Chains and roles need labels; the rest does without.
        width: Experts of a chain in each MoE layer.
        seed: Of halves, draws and shuffles.
        progress: Called with tokens read and tokens in all; each is read twice.

    Raises:
        UsageError: The model has one MoE layer, or `width` is not between 1 and the experts.
        CaptureError: The trace has no tokens.
    """
    layers, experts = len(trace.layers), trace.router_width
    if layers < 2:
        raise UsageError(
            f"{trace.model['name']} has one MoE layer, so there is no step from one to the next; "
            "analyse a model with two or more"
        )
    if not 1 <= width <= experts:
        raise UsageError(f"a chain cannot have {width} experts a layer; give 1 to {experts}")
    units = Units.of(trace)
    labelled = len(units.names) > 1
    halves = Halves.of(units, seed=seed)
    groups = len(halves.names)
    first, both = UnitCounts(units, layers, experts, choices=1), UnitCounts(units, layers, experts)
    steps = StepCounts(units, layers, experts, trace.slots, halves.choosing, groups, seed)
    profiles = None if labelled else TokenProfiles(layers, experts)
    folds: list[Fold] = [first, both, steps, *([] if profiles is None else [profiles])]
    fold(trace, *folds, progress=_part(progress, 0))

    enriched = enrichment(units, both.counts, seed=seed) if labelled else None
    matched, influence = _matched(enriched, profiles, both.counts, seed)
    ways = _ways(steps, units, halves, width)
    first_loads, loads = first.counts.sum(axis=0), both.counts.sum(axis=0)
    first_steps = StepUnits(units, strongest(steps.ranks[0], first_loads), 1)
    any_steps = StepUnits(units, strongest(steps.any, loads), trace.slots)
    told = PointwiseSums(units, steps.ranks[0])
    flow = MatchedFlow(units, matched.match, influence)
    names = _largest_labels(units)
    drawn = FlowUnits(units, names, shown_experts(units, names, first.counts, ways), experts)
    followed = ChainUnits(units, halves, ways, experts) if ways else None
    second: list[Fold] = [
        first_steps,
        any_steps,
        told,
        flow,
        drawn,
        *([followed] if followed else []),
    ]
    fold(trace, *second, progress=_part(progress, 1))

    named: tuple[Chain, ...] = chains(followed, ways, seed=seed) if followed else ()
    found = matching(matched, flow, steps.ranks[0], both.counts if labelled else None, seed=seed)
    return Pipeline(
        definition=definition(labelled),
        layers=trace.layers,
        router_width=experts,
        slots=trace.slots,
        num_tokens=trace.num_tokens,
        num_prompts=trace.num_prompts,
        labels=units.names,
        first_loads=first_loads,
        loads=loads,
        first=steps.ranks[0],
        any=steps.any,
        first_steps=judged(
            first_steps, steps.ranks[0], first.counts, steps.shuffled.sum(axis=0), seed=seed
        ),
        any_steps=judged(any_steps, steps.any, both.counts, seed=seed),
        information=information(told, steps.ranks, steps.shuffled, seed=seed),
        matching=found,
        chains=named,
        roles=(
            None
            if enriched is None
            else roles(units, both.counts, enriched, trace.layers, found.match, seed=seed)
        ),
        flows=drawn.flows(),
        width=width,
        notes=_notes(units, halves),
        seed=seed,
    )


def _matched(
    enriched: Enrichment | None,
    profiles: TokenProfiles | None,
    counts: NDArray[np.int64],
    seed: int,
) -> tuple[Matched, NDArray[np.float64] | None]:
    """The matching, and what a token adds to its scores where profiles are over tokens."""
    if enriched is not None:
        rate = np.nan_to_num(np.moveaxis(enriched.rate, 0, 2))
        return match_layers(rate, counts.sum(axis=0) >= FEWEST_TOKENS, seed=seed), None
    assert profiles is not None
    many = profiles.counts.astype(np.float64)
    matched = match_layers(many, many.sum(axis=2) >= FEWEST_TOKENS, seed=seed)
    return matched, token_influence(profiles.counts, matched.match)


def _ways(
    steps: StepCounts, units: Units, halves: Halves, width: int
) -> list[tuple[tuple[int, ...], ...]]:
    tokens = np.array(
        [units.tokens[halves.choosing == place].sum() for place in range(len(halves.names))],
        dtype=np.int64,
    )
    return best_chains(steps.of_group, tokens, width) if len(tokens) else []


def _largest_labels(units: Units) -> tuple[str, ...]:
    """The labels with the most tokens, in the order of their names."""
    tokens = [int(units.tokens[units.label == place].sum()) for place in range(len(units.names))]
    places = sorted(range(len(tokens)), key=lambda place: -tokens[place])[:MOST_LABELS]
    return tuple(units.names[place] for place in sorted(places))


def _notes(units: Units, halves: Halves) -> tuple[str, ...]:
    if not units.names:
        return (
            "No pipelines by label: the prompts have no labels. Give --data JSONL with a label in "
            'each line ({"text": "...", "label": "math"}), or a folder with a folder for each '
            "label.",
        )
    if len(units.names) == 1:
        return (
            f"No lift and no claim: all prompts have the label {units.names[0]!r}, and a pipeline "
            "is what a label has more than others. Add prompts with another label.",
        )
    left = len(units.names) - len(halves.names)
    if left:
        return (
            f"{left} of {len(units.names)} labels get no chain: it takes two prompts at least, and "
            f"only the {MOST_LABELS} labels with the most tokens are followed.",
        )
    return ()


def _part(progress: Progress | None, number: int) -> Progress | None:
    """Progress of one of two readings, as part of both."""
    if progress is None:
        return None
    return lambda done, total: progress(
        done + number * (total or 0), None if total is None else 2 * total
    )
