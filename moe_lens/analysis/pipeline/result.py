"""What following tokens across layers found, and how it is said."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from moe_lens.analysis.resampling import FALSE_SHARE
from moe_lens.analysis.result import Result
from moe_lens.analysis.table import Cell, Table

from .chains import Chain
from .flows import Flows
from .information import Information
from .matching import Matching
from .roles import Roles
from .steps import Steps

__all__ = ["Pipeline", "definition", "way"]

LARGEST_IN_JSON = 250_000
"""Cells of a table of all steps up to which JSON holds it."""

WHOLE_CHAIN = 8
"""Layers up to which a chain is written whole."""

SHOWN_STEPS, SHOWN_PAIRS, SHOWN_LAYERS = 15, 12, 6


@dataclass(frozen=True, eq=False)
class Pipeline(Result):
    """Experts across MoE layers. R is the router width; ``layers - 1`` counts successive pairs.

    Attributes:
        definition: What the numbers are.
        layers: Model layer index of each MoE layer.
        router_width: R.
        slots: Experts of a token, k.
        num_tokens: Tokens read.
        num_prompts: Prompts of the corpus.
        labels: The labels, sorted.
        first_loads: [layers, R] int64, tokens whose first choice it was.
        loads: [layers, R] int64, tokens that chose it.
        first: [layers - 1, R, R] int64, steps from first choice to first choice.
        any: [layers - 1, R, R] int64, steps from any choice to any choice, k x k a token.
        first_steps: The strongest of `first`.
        any_steps: The strongest of `any`.
        information: What a layer's choice tells of the next.
        matching: Experts of one layer that do the work of those of another.
        chains: For each label the chain of experts that its tokens take; empty without labels.
        roles: Specialisation by depth; None without labels.
        flows: What the flow diagram draws.
        width: Experts of a chain in each MoE layer.
        notes: What is not there, and why.
        seed: Of everything drawn at random.
    """

    kind: ClassVar[str] = "pipeline"
    definition: str
    layers: tuple[int, ...]
    router_width: int
    slots: int
    num_tokens: int
    num_prompts: int
    labels: tuple[str, ...]
    first_loads: NDArray[np.int64]
    loads: NDArray[np.int64]
    first: NDArray[np.int64]
    any: NDArray[np.int64]
    first_steps: Steps
    any_steps: Steps
    information: Information
    matching: Matching
    chains: tuple[Chain, ...]
    roles: Roles | None
    flows: Flows
    width: int
    notes: tuple[str, ...]
    seed: int

    @property
    def title(self) -> str:
        return (
            f"Experts across {len(self.layers)} MoE layers, {self.num_tokens:,} tokens of "
            f"{self.num_prompts:,} prompts"
        )

    @property
    def claimed(self) -> tuple[Chain, ...]:
        """The chains that are called pipelines, the clearest first."""
        return tuple(
            sorted((each for each in self.chains if each.claimed), key=lambda each: -each.lift_low)
        )

    def findings(self) -> list[str]:
        """Pipelines, what a layer tells of the next, and the matching."""
        return [*self.notes, *self._said_of_chains(), self._said_of_bits(), self._said_of_match()]

    def _said_of_chains(self) -> list[str]:
        if len(self.labels) < 2 or not self.chains:
            return []
        claimed = self.claimed
        many = f"{len(claimed)} of {len(self.chains)} labels have a pipeline"
        if not claimed:
            return [f"{many}: no label's tokens follow a chain of their own (see why below)."]
        best = claimed[0]
        return [
            f"{many}. The clearest is {best.label}: {_percent(best.flow)} % of its tokens take a "
            f"step of {way(best, self.layers)} ({_percent(best.others)} % of other labels'), "
            f"{_percent(best.whole)} % all of it; counted on {best.prompts} prompts that had no "
            "part in choosing it."
        ]

    def _said_of_bits(self) -> str:
        told = self.information
        best = int(np.argmax(told.bits))
        return (
            f"Layer {self.layers[best]} tells most of the next: {told.bits[best]:.2f} bits "
            f"[{told.low[best]:.2f}, {told.high[best]:.2f}] of the {told.entropy[best]:.2f} of "
            f"layer {self.layers[best + 1]}'s first choice; the prompt alone tells "
            f"{told.prompt[best]:.2f}."
        )

    def _said_of_match(self) -> str:
        found = self.matching
        sure = int((found.q <= FALSE_SHARE).sum())
        return (
            f"Matched by {found.by}, {sure} of {len(found.q)} pairs of layers are more alike than "
            f"by chance; {100 * float(found.flow.mean()):.0f} % of first choices follow the "
            f"matching, {100 * float(found.flow_random.mean()):.0f} % would by load."
        )

    def tables(self) -> list[Table]:
        """Chains, pairs of layers, the strongest steps, specialisation by depth."""
        shown = [self._chain_table()] if self.chains else []
        shown += [self._pair_table(), self._step_table()]
        return shown + ([self._role_table()] if self.roles is not None else [])

    def _chain_table(self) -> Table:
        brief = len(self.layers) <= WHOLE_CHAIN
        rows: list[tuple[Cell, ...]] = [
            (
                each.label,
                way(each, self.layers, brief=brief),
                100 * each.flow,
                f"{_percent(each.low)} to {_percent(each.high)}",
                100 * each.others,
                each.lift,
                100 * each.whole,
                100 * each.whole_independent,
                each.q,
                "pipeline" if each.claimed else each.why,
            )
            for each in sorted(self.chains, key=lambda each: (not each.claimed, -each.lift))
        ]
        heads = (
            *("label", "experts", "a step, %", "95 %", "others, %", "lift"),
            *("all of it, %", "by product, %", "q", "claim"),
        )
        through = (
            f"layers {', '.join(map(str, self.layers))}" if brief else "where most tokens take them"
        )
        return Table(heads, tuple(rows), f"Chains of labels, {through}")

    def _pair_table(self) -> Table:
        told, found = self.information, self.matching
        rows: list[tuple[Cell, ...]] = [
            (
                f"{self.layers[place]} → {self.layers[place + 1]}",
                float(told.bits[place]),
                float(told.prompt[place]),
                float(told.entropy[place]),
                float(found.score[place]),
                float(found.null[place]),
                float(found.corrected[place]),
                float(found.q[place]),
                100 * float(found.flow[place]),
                100 * float(found.flow_random[place]),
                100 * float(found.flow_best[place]),
            )
            for place in _spread(len(told.bits), SHOWN_PAIRS)
        ]
        heads = (
            *("layers", "bits", "by prompt", "at most", "alike", "by chance", "corrected", "q"),
            *("flow, %", "by load, %", "best, %"),
        )
        title = f"Successive layers: information of first choices; matched by {self.matching.by}"
        return Table(heads, tuple(rows), title + _part_of(len(told.bits), SHOWN_PAIRS))

    def _step_table(self) -> Table:
        steps = self.first_steps
        rows: list[tuple[Cell, ...]] = [
            (
                f"L{self.layers[steps.place[row]]}.E{steps.source[row]}",
                f"L{self.layers[steps.place[row] + 1]}.E{steps.target[row]}",
                int(steps.count[row]),
                100 * float(steps.chance[row]),
                float(steps.lift[row]),
                f"{steps.low[row]:.2f} to {steps.high[row]:.2f}" if steps.low[row] > 0 else "",
                float(steps.shuffled[row]),
                float(steps.q[row]),
            )
            for row in range(min(SHOWN_STEPS, len(steps.count)))
        ]
        heads = ("from", "to", "tokens", "P(to | from), %", "lift", "95 %", "by prompt", "q")
        return Table(heads, tuple(rows), "Strongest steps of first choices")

    def _role_table(self) -> Table:
        assert self.roles is not None
        roles, rows = self.roles, []
        places = _spread(len(self.layers), SHOWN_LAYERS)
        for number, name in enumerate(roles.names):
            cells: list[Cell] = [name]
            for place in places:
                lift = f" {roles.lift[number, place]:.1f}x" if roles.claimed[number, place] else ""
                top = f"E{roles.top[number, place]}{lift}"
                cells.append(f"{roles.effective[number, place]:.1f} ({top})")
            own = int(roles.own_from[number])
            rows.append((*cells, f"layer {own}" if own >= 0 else "none"))
        last: list[Cell] = [f"{roles.specialised[place]} experts" for place in places]
        rows.append(("specialised in any", *last, ""))
        heads = ("label", *(f"layer {self.layers[place]}" for place in places), "own experts from")
        title = "Effective number of experts, with the top expert and its lift where it is claimed"
        return Table(heads, tuple(rows), title + _part_of(len(self.layers), SHOWN_LAYERS))

    def to_dict(self) -> dict[str, Any]:
        """As `Result.to_dict`; tables of all steps with too many cells are null, and it is said."""
        found = super().to_dict()
        if self.first.size > LARGEST_IN_JSON:
            found |= {"first": None, "any": None}
            found["left_out"] = (
                f"first and any: {self.first.size:,} cells each; the strongest steps are in "
                "first_steps and any_steps, and the fields of the result in Python hold all"
            )
        return found


def way(chain: Chain, layers: tuple[int, ...], *, brief: bool = False) -> str:
    """``L1.E3 → L2.E7``; of a long chain the stretch of six layers that most tokens take.

    Args:
        chain: The chain.
        layers: Model layer index of each MoE layer.
        brief: ``3 → 7``, where the layers are said elsewhere.
    """
    many = len(layers)
    start = 0
    if many > WHOLE_CHAIN:
        stretch = np.convolve(chain.steps, np.ones(5), "valid")
        start, many = int(stretch.argmax()), 6
    parts = [
        ("" if brief else f"L{layers[place]}.E") + "+".join(map(str, chain.experts[place]))
        for place in range(start, start + many)
    ]
    before, after = "… " if start else "", " …" if start + many < len(layers) else ""
    return before + " → ".join(parts) + after


def definition(labelled: bool) -> str:
    """What the numbers are, as a caption."""
    chains = (
        "Chain: one expert in each MoE layer, chosen on half of a label's prompts by flow x log "
        "lift, measured on the other half. A step: share of the label's tokens that choose the "
        "chain's expert in a layer and in the next, mean over layers; lift: over the mean of all "
        "labels; null: labels shuffled over prompts. "
        if labelled
        else ""
    )
    return (
        f"{chains}Bits: mutual information of successive first choices (Miller's bias taken off). "
        "Alike: Bhattacharyya similarity of matched experts' profiles. Intervals: 95 %, prompts "
        "drawn anew."
    )


def _percent(share: float) -> str:
    """Without decimals from 10 % on, with one below, and nothing for NaN."""
    return "" if share != share else f"{100 * share:.{0 if share >= 0.0995 else 1}f}"


def _spread(many: int, most: int) -> list[int]:
    """At most `most` places of `many`, evenly."""
    return sorted({round(each) for each in np.linspace(0, many - 1, min(many, most)).tolist()})


def _part_of(many: int, most: int) -> str:
    return f" ({most} of {many})" if many > most else ""
