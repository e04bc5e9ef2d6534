"""The taxonomy of a model's experts: who they are, by name, role and layer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar, Protocol

import numpy as np

from moe_lens.analysis.result import Result
from moe_lens.analysis.table import Cell, Table
from moe_lens.errors import UsageError
from moe_lens.trace import place_of

from .cards import COLUMNS, ExpertCard, ExpertPage, TopicEvidence
from .clusters import Cluster
from .evidence import Evidence
from .kinds import KINDS
from .naming import ROLES, TOO_LITTLE, Thresholds

__all__ = ["SORTS", "Taxonomy", "check_expert", "kind_definitions", "topic_evidence"]

LISTED = 96
"""Experts that are listed one by one without being asked for."""

_SORTS: dict[str, Callable[[ExpertCard], tuple[float, ...]]] = {
    "expert": lambda card: (card.layer, card.expert),
    "lift": lambda card: (-card.lift if card.lift == card.lift else 0.0,),
    "share": lambda card: (-card.share,),
}
SORTS = tuple(_SORTS)
"""Orders of `Taxonomy.select`."""


@dataclass(frozen=True, eq=False)
class Taxonomy(Result):
    """Names, roles and evidence of all experts.

    Attributes:
        definition: What role, name and confidence mean, with the thresholds.
        layers: Model layer index of each MoE layer.
        router_width: R, the experts of a layer.
        num_tokens: Tokens that were counted.
        num_prompts: Prompts they come from.
        labels: The labels of the corpus; may be empty.
        thresholds: What a topic must reach.
        cards: The experts, of all layers or those that were selected.
        clusters: Groups of token ids that are routed alike.
        kinds: Definition of every kind of token.
        evidence: All measures of all topics.
        complete: Whether `cards` are all experts.
        seed: Of everything drawn.
    """

    kind: ClassVar[str] = "experts"
    definition: str
    layers: tuple[int, ...]
    router_width: int
    num_tokens: int
    num_prompts: int
    labels: tuple[str, ...]
    thresholds: Thresholds
    cards: tuple[ExpertCard, ...]
    clusters: tuple[Cluster, ...]
    kinds: dict[str, str]
    evidence: Evidence
    complete: bool
    seed: int

    @property
    def title(self) -> str:
        some = f"{len(self.cards):,} of " if not self.complete else ""
        experts = len(self.layers) * self.router_width
        return f"What {some}{experts:,} experts do, {self.num_tokens:,} tokens"

    @property
    def names(self) -> dict[tuple[int, int], str]:
        """(layer, expert) -> name, of the experts in `cards`."""
        return {(card.layer, card.expert): card.name for card in self.cards}

    def card(self, layer: int, expert: int) -> ExpertCard:
        """The card of one expert.

        Raises:
            UsageError: There is no such layer or expert, or it was not selected.
        """
        check_expert(self, layer, expert)
        for card in self.cards:
            if (card.layer, card.expert) == (layer, expert):
                return card
        raise UsageError(f"expert {layer}:{expert} is not among those that were selected")

    def page(self, layer: int, expert: int) -> ExpertPage:
        """All the evidence of one expert.

        Raises:
            UsageError: As `card`.
        """
        card = self.card(layer, expert)
        cell = (self.layers.index(layer), expert)
        every = [
            topic_evidence(self.evidence, topic, cell) for topic in range(len(self.evidence.names))
        ]
        labels = sorted(
            (each for each in every if each.source == "label"), key=lambda each: -_known(each.lift)
        )
        kinds = sorted(
            (each for each in every if each.source == "kind" and each.explained >= 1e-3),
            key=lambda each: -each.explained,
        )
        return ExpertPage(
            definition=self.definition,
            card=card,
            labels=tuple(labels),
            kinds=tuple(kinds),
            meanings={each.name: self.kinds[each.name] for each in kinds},
        )

    def select(
        self,
        *,
        layer: int | None = None,
        role: str | None = None,
        name: str | None = None,
        sort: str = "expert",
    ) -> Taxonomy:
        """The same with some of the experts, in an order.

        Args:
            layer: Only those of this layer.
            role: Only those of this role, one of `ROLES`.
            name: Only those whose name has this in it; case does not matter.
            sort: ``expert``, ``lift`` or ``share``.

        Raises:
            UsageError: There is no such layer, role or order.
        """
        if layer is not None:
            check_expert(self, layer, 0)
        if role is not None and role not in ROLES:
            raise UsageError(f"there is no role {role!r}; the roles are {', '.join(ROLES)}")
        if sort not in _SORTS:
            raise UsageError(f"experts are sorted by {', '.join(SORTS)}, not by {sort!r}")
        cards = [
            card
            for card in self.cards
            if (layer is None or card.layer == layer)
            and (role is None or card.role == role)
            and (name is None or name.casefold() in card.name.casefold())
        ]
        cards.sort(key=_SORTS[sort])
        complete = self.complete and (layer, role, name) == (None, None, None)
        return replace(self, cards=tuple(cards), complete=complete)

    def findings(self) -> list[str]:
        """How many of each role; what the specialists are for; how little data is said."""
        if not self.cards:
            return ["No expert is of that kind."]
        roles = Counter(card.role for card in self.cards)
        said = [f"{', '.join(f'{roles[role]} {role}' for role in ROLES if roles[role])}."]
        topics = Counter(card.topic for card in self.cards if card.topic is not None)
        if topics:
            named = ", ".join(f"{topic} ({many})" for topic, many in topics.most_common(12))
            said.append(f"Named after: {named}.")
        if roles[TOO_LITTLE]:
            least = self.thresholds.fewest_tokens
            said.append(
                f"{roles[TOO_LITTLE]} experts received fewer than {least} tokens, too little for a "
                "name: give more text."
            )
        if not self.labels:
            said.append("The text has no labels: experts are named after kinds of token alone.")
        if self._summarised:
            said.append(
                "A layer's experts: --layer N; one with its evidence: --expert LAYER:EXPERT; all "
                "of a role: --role specialist; everything: --json."
            )
        return said

    @property
    def _summarised(self) -> bool:
        return self.complete and len(self.cards) > LISTED

    def tables(self) -> list[Table]:
        """Every expert, or, where there are very many, a line for each layer."""
        tables = []
        if self._summarised:
            tables.append(self._by_layer())
        elif self.cards:
            tables.append(Table(COLUMNS, tuple(card.row() for card in self.cards)))
        if self.complete and not self.labels and self.clusters:
            tables.append(self._groups())
        return tables

    def _groups(self) -> Table:
        rows = tuple(
            (" ".join(group.texts[:8]), len(group.token_ids), 100 * group.tokens / self.num_tokens)
            for group in self.clusters
        )
        title = "Groups of tokens that are routed alike"
        return Table(("tokens", "different ones", "share of the text, %"), rows, title)

    def _by_layer(self) -> Table:
        roles = [role for role in ROLES if any(card.role == role for card in self.cards)]
        rows: list[tuple[Cell, ...]] = []
        for layer in self.layers:
            here = [card for card in self.cards if card.layer == layer]
            many = Counter(card.role for card in here)
            best = sorted((card for card in here if card.topic), key=lambda card: -card.lift)[:4]
            named = ", ".join(f"{card.expert} {card.name}" for card in best)
            rows.append((layer, *(many[role] for role in roles), named))
        return Table(("layer", *roles, "experts of the highest lift"), tuple(rows))


class _Layered(Protocol):
    """What has experts: a `Trace`, a `Taxonomy`."""

    @property
    def layers(self) -> tuple[int, ...]: ...

    @property
    def router_width(self) -> int: ...


def check_expert(found: _Layered, layer: int, expert: int) -> None:
    """Raise a UsageError if there is no such expert."""
    place_of(found.layers, layer)
    if not 0 <= expert < found.router_width:
        raise UsageError(
            f"there is no expert {expert}; a layer has experts 0 to {found.router_width - 1}"
        )


def topic_evidence(found: Evidence, topic: int, cell: tuple[int, int]) -> TopicEvidence:
    """One topic and one expert, as plain numbers."""
    measured = found.measures
    where = (topic, *cell)
    return TopicEvidence(
        name=found.names[topic],
        source="label" if topic < found.labels else "kind",
        rate=float(measured.rate[where]),
        lift=float(measured.lift[where]),
        low=float(found.low[where]),
        high=float(found.high[where]),
        purity=float(measured.purity[where]),
        focus=float(measured.focus[where]),
        reach=float(measured.reach[where]),
        own_lift=float(measured.own_lift[where]),
        explained=float(measured.explained[where]),
        q=float(found.q[where]),
    )


def _known(value: float) -> float:
    return -np.inf if value != value else value


def kind_definitions() -> dict[str, str]:
    """Name and definition of every kind of token."""
    return {kind.name: kind.definition for kind in KINDS}
