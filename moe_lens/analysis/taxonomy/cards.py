"""What is said of one expert: its card in the list, and its page with tokens in context."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from moe_lens.analysis.result import Result
from moe_lens.analysis.table import Cell, Table

__all__ = ["Example", "ExpertCard", "ExpertPage", "TopicEvidence", "TypicalToken"]


@dataclass(frozen=True)
class TypicalToken:
    """A token id that the expert gets more often than the text has it.

    Attributes:
        token_id: Which.
        text: As a person reads it.
        count: How often it went to the expert.
        share: Share of its occurrences that did.
        lift: Its share of the expert's tokens over its share of the text.
    """

    token_id: int
    text: str
    count: int
    share: float
    lift: float


@dataclass(frozen=True)
class Example:
    """A token that went to the expert, with the text around it.

    Attributes:
        prompt: Which prompt.
        position: Place of the token in it.
        before: The tokens before it.
        token: The token.
        after: The tokens after it.
    """

    prompt: int
    position: int
    before: str
    token: str
    after: str

    @property
    def marked(self) -> str:
        """In one line, with the token in double angle quotation marks."""
        return f"{self.before}«{self.token}»{self.after}"


@dataclass(frozen=True)
class TopicEvidence:
    """What speaks for a label or a kind of token, for one expert; see `evidence` for the formulas.

    Attributes:
        name: The topic.
        source: ``label`` or ``kind``.
        rate: Share of the topic's tokens that go to the expert.
        lift: Rate over that of the whole text.
        low: Lower end of the 95 % interval of the lift over prompts.
        high: Upper end.
        purity: Share of the expert's tokens that are of the topic.
        focus: 0 to 1.
        reach: Odds of the rate over those of an even share.
        own_lift: Of a label: against the same classes of token in all labels.
        explained: Share of the expert's uncertainty, 0 to 1.
        q: NaN on too little data.
    """

    name: str
    source: str
    rate: float
    lift: float
    low: float
    high: float
    purity: float
    focus: float
    reach: float
    own_lift: float
    explained: float
    q: float


@dataclass(frozen=True)
class ExpertCard:
    """One expert.

    Attributes:
        layer: Index of the layer in the model.
        expert: Number of the expert.
        name: What a person may call it.
        role: One of `ROLES`.
        topic: The label or kind it is named after, if it passes all thresholds.
        tokens: Tokens that it received.
        share: Of all tokens, 0 to 1.
        even: What an even router would give it, k / E.
        confidence: Share of the bootstrap draws over prompts in which the same topic wins in the
            same way; NaN on too little data.
        evidence: The topics that explain most, best first.
        typical: The most typical tokens, best first.
        examples: Tokens in context.
        cluster: Name of the group of tokens that makes up most of it, beyond its share; may be
            empty.
        cluster_share: Share of its tokens that are of that group.
    """

    layer: int
    expert: int
    name: str
    role: str
    topic: str | None
    tokens: int
    share: float
    even: float
    confidence: float
    evidence: tuple[TopicEvidence, ...]
    typical: tuple[TypicalToken, ...]
    examples: tuple[Example, ...]
    cluster: str
    cluster_share: float

    @property
    def lift(self) -> float:
        """Of the topic that explains most; NaN if none does."""
        return self.evidence[0].lift if self.evidence else float("nan")

    def row(self) -> tuple[Cell, ...]:
        """Its line in a table of experts."""
        typical = " ".join(token.text for token in self.typical[:5])
        return (
            f"{self.layer}:{self.expert}",
            self.name,
            self.role,
            100 * self.share,
            self.lift,
            None if self.confidence != self.confidence else f"{100 * self.confidence:.0f} %",
            typical,
        )


COLUMNS = ("expert", "name", "role", "share, %", "lift", "confidence", "typical tokens")
"""Of `ExpertCard.row`."""


@dataclass(frozen=True, eq=False)
class ExpertPage(Result):
    """The evidence of one expert, like an entry of a dictionary.

    Attributes:
        definition: What the numbers are.
        card: The expert.
        labels: What speaks for each label, by lift.
        kinds: The same for the kinds of token, those with any effect.
        meanings: Definition of each kind that is listed.
    """

    kind: ClassVar[str] = "expert"
    definition: str
    card: ExpertCard
    labels: tuple[TopicEvidence, ...]
    kinds: tuple[TopicEvidence, ...]
    meanings: dict[str, str]

    @property
    def title(self) -> str:
        return f"Layer {self.card.layer}, expert {self.card.expert}: {self.card.name}"

    def findings(self) -> list[str]:
        """Role, share, and what its name rests on."""
        card = self.card
        said = [
            f"{card.role.capitalize()}: {card.tokens:,} tokens, {100 * card.share:.1f} % of all "
            f"({100 * card.even:.1f} % if routing were even)."
        ]
        if card.evidence and card.confidence == card.confidence:
            best = card.evidence[0]
            said.append(
                f"{best.name} explains most: lift {best.lift:.1f} ({best.low:.1f} to "
                f"{best.high:.1f}), {100 * best.purity:.0f} % of its tokens, q = {best.q:.2g}; the "
                f"same in {100 * card.confidence:.0f} % of the draws."
            )
        if card.cluster:
            said.append(
                f"{100 * card.cluster_share:.0f} % of its tokens are of the group {card.cluster!r}."
            )
        return said

    def tables(self) -> list[Table]:
        """Typical tokens, examples, labels, kinds."""
        card = self.card
        typical = tuple(
            (each.text, each.count, 100 * each.share, each.lift) for each in card.typical
        )
        examples = tuple(
            (f"{each.prompt}:{each.position}", each.before, f"«{each.token}»", each.after)
            for each in card.examples
        )
        tables = [
            Table(("token", "count", "goes here, %", "lift"), typical, "Typical tokens"),
            Table(("prompt:position", "before", "token", "after"), examples, "Examples"),
        ]
        for title, listed in (("Labels", self.labels), ("Kinds of token", self.kinds)):
            if listed:
                tables.append(_evidence_table(title, listed, self.meanings))
        return [table for table in tables if table.rows]


def _evidence_table(
    title: str, listed: tuple[TopicEvidence, ...], meanings: dict[str, str]
) -> Table:
    rows = tuple(
        (
            each.name,
            100 * each.rate,
            each.lift,
            each.low,
            each.high,
            100 * each.purity,
            each.focus,
            *((each.own_lift,) if each.source == "label" else (meanings[each.name],)),
            each.q,
        )
        for each in listed
    )
    last = "own lift" if listed[0].source == "label" else "which are"
    columns = ("", "go here, %", "lift", "low", "high", "of its tokens, %", "focus", last, "q")
    return Table(columns, rows, title)
