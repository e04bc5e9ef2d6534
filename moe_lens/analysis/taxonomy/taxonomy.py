"""What do my experts do? A name, a role and the evidence for every expert of every MoE layer.

    found = name_experts(trace)
    found.card(1, 12).name               # "html · tags"
    found.names[1, 12]                   # the same, from a mapping of all
    found.select(role="specialist").cards
    found.page(1, 12)                    # typical tokens, examples, all labels and kinds

An expert is named after a *topic*: a label of the corpus or a kind of token (`kinds`). The measures
of a topic stand in `evidence`, the thresholds in `naming`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from moe_lens.analysis.enrichment import FEWEST_TOKENS, FEWEST_UNITS, Enrichment, enrichment
from moe_lens.analysis.passes import fold
from moe_lens.analysis.resampling import draws, interval
from moe_lens.telling import Progress
from moe_lens.trace import Trace

from .cards import ExpertCard
from .clusters import CLUSTERS, Cluster, cluster_tokens
from .counting import ClassCounts, TokenCounts, TokenSample, frequent_ids, units_for
from .evidence import Evidence, all_q, blocks, evidence, labels_there, measures
from .kinds import KINDS, PARTITIONS
from .naming import Naming, Thresholds, candidates, choose, name_all, significant
from .result import Taxonomy, kind_definitions, topic_evidence
from .tokens_of_experts import ExpertTokens

__all__ = ["name_experts"]

NAME_DRAWS = 200
"""Bootstrap draws of names and of the kinds' lifts: a share of them is exact to 3.5 %."""

SHOWN_EVIDENCE = 4
"""Topics on a card."""

LIKE_SHARE = 0.4
"""Share of an expert's tokens that a group must make up for the expert to be named after it."""

Floats = NDArray[np.floating[Any]]


def name_experts(
    trace: Trace,
    *,
    clusters: int = CLUSTERS,
    thresholds: Thresholds | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> Taxonomy:
    """Name every expert after what goes to it.

    Args:
        trace: A recorded run, with labels or without.
        clusters: Groups of token ids to make; 0 for none.
        thresholds: What a topic must reach before an expert is named after it.
        seed: Of intervals, nulls and examples.
        progress: Called with tokens read and tokens in all.

    Raises:
        CaptureError: The trace has no tokens.
        MoeLensError: A shard is damaged.
    """
    least = thresholds or Thresholds()
    units = units_for(trace)
    layers, width = len(trace.layers), trace.router_width
    ids, occurrences = frequent_ids(trace)
    seen = ClassCounts(units, trace.texts, layers, width)
    by_id, sample = TokenCounts(ids, layers, width), TokenSample(layers, seed=seed)
    fold(trace, seen, by_id, sample, progress=progress)
    total = trace.num_tokens
    even = seen.slots / total / width
    in_any_slot = seen.counts[:, : PARTITIONS[0]].sum(axis=1, dtype=np.int64)
    tokens = in_any_slot.sum(axis=0)
    labelled = enrichment(units, in_any_slot, seed=seed) if len(labels_there(units)) else None
    q = all_q(seen, labelled, seed=seed)
    drawn = _drawn(seen, labelled, even, least, q, seed)
    found = evidence(seen, labelled, even, drawn.intervals, q)
    groups = cluster_tokens(ids, occurrences, by_id.counts, trace.texts, clusters)
    like, like_share = _clusters_of(groups, by_id, tokens, total)
    alike = np.where(like_share >= LIKE_SHARE, like, "")
    named = name_all(found, tokens, even * total, alike, least)
    told = ExpertTokens(trace.texts, by_id, occurrences, sample, tokens, total)
    cards = [
        _card(trace.layers, (place, expert), named, found, drawn, told, like, like_share, even)
        for place in range(layers)
        for expert in range(width)
    ]
    return Taxonomy(
        definition=_definition(least, found.labels > 0),
        layers=trace.layers,
        router_width=width,
        num_tokens=total,
        num_prompts=int(units.prompts.sum()),
        labels=found.names[: found.labels],
        thresholds=least,
        cards=tuple(cards),
        clusters=tuple(groups),
        kinds=kind_definitions(),
        evidence=found,
        complete=True,
        seed=seed,
    )


class _Drawn:
    """What the bootstrap gave.

    Attributes:
        intervals: [3, kinds, layers, R] of the kinds: low and high of the lift, low of the focus.
        topic: [draws, layers, R] int16, the winning topic of each draw.
        fits: [draws, layers, R] whether it passes the thresholds on size.
        enough: Whether there are units enough for this to mean anything.
    """

    def __init__(self, layers: int, width: int, units: int) -> None:
        self.intervals = np.full((3, len(KINDS), layers, width), np.nan)
        self.topic = np.full((NAME_DRAWS, layers, width), -1, dtype=np.int16)
        self.fits = np.zeros((NAME_DRAWS, layers, width), dtype=bool)
        self.enough = units >= FEWEST_UNITS

    def confidence(self, named: Naming, cell: tuple[int, int]) -> float:
        """Share of the draws that give the expert the same topic in the same way."""
        if not self.enough or named.topic[cell] < 0:
            return float("nan")
        same = self.topic[:, cell[0], cell[1]] == named.topic[cell]
        return float((same & (self.fits[:, cell[0], cell[1]] == named.fits[cell])).mean())


def _drawn(
    seen: ClassCounts,
    labelled: Enrichment | None,
    even: Floats,
    least: Thresholds,
    q: Floats,
    seed: int,
) -> _Drawn:
    """Draw units anew, and name every expert by the rule of `name_all` each time."""
    units, width = len(seen.units), seen.counts.shape[-1]
    labels = len(labels_there(seen.units))
    found = _Drawn(len(even), width, units)
    table = draws(seen.units.label, seed=seed, resamples=NAME_DRAWS).astype(np.float32)
    for layer, each in enumerate(even):
        for experts in blocks(width, NAME_DRAWS, labels):
            part, _ = measures(seen, layer, experts, table, float(each))
            ends = found.intervals[:, :, layer, experts]
            ends[0], ends[1] = interval(part.lift[:, labels:], units=units)
            ends[2], _ = interval(part.focus[:, labels:], units=units)
            low = ends[0]
            if labelled is not None:
                there = labels_there(seen.units)
                low = np.concatenate([labelled.low[there, layer, experts], low])
            sure = significant(q[:, layer, experts], low, least)
            explained, fits = candidates(part, part.focus, sure, least)
            topic, won = choose(explained.swapaxes(0, 1), fits.swapaxes(0, 1), labels)
            found.topic[:, layer, experts] = topic
            found.fits[:, layer, experts] = won
    return found


def _clusters_of(
    groups: list[Cluster], by_id: TokenCounts, tokens: NDArray[np.int64], total: int
) -> tuple[NDArray[np.object_], Floats]:
    """[layers, R] name of the group that an expert has most of beyond its share, and its share."""
    names = np.full(tokens.shape, "", dtype=object)
    shares = np.zeros(tokens.shape)
    best = np.zeros(tokens.shape)
    for group in groups:
        rows = np.searchsorted(by_id.ids, np.array(group.token_ids))
        share = by_id.counts[rows].sum(axis=0) / np.maximum(tokens, 1)
        beyond = share - group.tokens / total
        more = beyond > best
        names[more], shares[more], best[more] = group.name, share[more], beyond[more]
    return names, shares


def _card(
    layers: tuple[int, ...],
    cell: tuple[int, int],
    named: Naming,
    found: Evidence,
    drawn: _Drawn,
    told: ExpertTokens,
    like: NDArray[np.object_],
    like_share: Floats,
    even: Floats,
) -> ExpertCard:
    topic, fits = int(named.topic[cell]), bool(named.fits[cell])
    enough = told.tokens[cell] >= FEWEST_TOKENS
    explained = found.measures.explained[:, cell[0], cell[1]]
    order = [int(each) for each in np.argsort(-explained, kind="stable") if explained[each] > 0]
    if topic >= 0:
        order = [topic, *(each for each in order if each != topic)]
    listed = order[:SHOWN_EVIDENCE] if enough else []
    return ExpertCard(
        layer=layers[cell[0]],
        expert=cell[1],
        name=str(named.name[cell]),
        role=str(named.role[cell]),
        topic=found.names[topic] if fits and enough else None,
        tokens=int(told.tokens[cell]),
        share=float(told.tokens[cell] / told.total),
        even=float(even[cell[0]]),
        confidence=drawn.confidence(named, cell) if enough else float("nan"),
        evidence=tuple(topic_evidence(found, each, cell) for each in listed),
        typical=told.typical(*cell),
        examples=told.examples(*cell),
        cluster=str(like[cell]),
        cluster_share=float(like_share[cell]),
    )


def _definition(least: Thresholds, labelled: bool) -> str:
    labels = (
        f"; of a label also {least.own_focus:g} against the same classes of token in all labels, "
        f"and {least.strength:g} on the mean of both"
        if labelled
        else ""
    )
    return (
        "Lift: share of a topic's tokens that go to the expert, over that of the text. Focus: by "
        "how much the topic's share of the expert's tokens exceeds that of the text, of what is "
        f"possible. Named after a topic: focus of {least.focus:g} at the low end of its 95 % "
        f"interval over prompts{labels}; odds {least.reach:g} times even ones; q <= "
        f"{least.false_share:g}. Partly: significant, but less. Confidence: share of {NAME_DRAWS} "
        "draws of prompts with the same topic."
    )
