"""One expert on a card, and the way back: one token and its experts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from moe_lens.analysis.result import Result
from moe_lens.analysis.table import Cell, Table
from moe_lens.errors import UsageError
from moe_lens.experts.directions import WriteDirections
from moe_lens.trace import TokenTexts, place_of

from .counting import IDS, IdCounts
from .pushed import PushedTokens, standardised
from .routed import RoutedVocabulary
from .written import Reading, WrittenVocabulary

__all__ = ["DirectionTokens", "ExpertCard", "TokenCard", "expert_card", "token_card"]


@dataclass(frozen=True, eq=False)
class DirectionTokens:
    """The tokens at both ends of an expert's write directions.

    Attributes:
        shares: [n] float64, part of the squared norm of the down projection in each direction.
        even: What each were if the projection had no preferred direction.
        ends: [n, top] tokens at the one end (``up``) and the other (``down``); which is which is
            arbitrary, and so is the sign of z.
        bias: [top] what the bias of the down projection pushes; None: there is none.
        texts: Texts of the ids.
    """

    shares: NDArray[np.float64]
    even: float
    ends: PushedTokens
    bias: PushedTokens | None
    texts: dict[int, str]

    @classmethod
    def of(
        cls,
        directions: WriteDirections,
        place: int,
        reading: Reading,
        texts: TokenTexts,
        top: int = 10,
    ) -> DirectionTokens:
        """Read directions of an expert of the MoE layer at `place` through the unembedding."""
        ends = PushedTokens.of(standardised(reading.alone(directions.vectors, place), texts), top)
        bias = None
        if directions.bias is not None:
            pushed = standardised(reading.alone(directions.bias[None], place), texts)
            bias = PushedTokens.of(pushed[0], top)
        shown = {*ends.ids().tolist(), *([] if bias is None else bias.ids().tolist())}
        return cls(
            shares=directions.shares,
            even=directions.even,
            ends=ends,
            bias=bias,
            texts={each: texts.visible(each) for each in sorted(shown)},
        )


@dataclass(frozen=True, eq=False)
class ExpertCard(Result):
    """Everything about the vocabulary of one expert.

    Attributes:
        definition: What the numbers are.
        layer: Model layer index.
        expert: Number of the expert.
        numbers: Name and value of what is known of it.
        rows: Name, and the tokens with their values, of each list of tokens.
    """

    kind: ClassVar[str] = "vocabulary of an expert"
    definition: str
    layer: int
    expert: int
    numbers: dict[str, float]
    rows: tuple[tuple[str, tuple[tuple[str, float], ...]], ...]

    @property
    def title(self) -> str:
        return f"Vocabulary of expert {self.layer}:{self.expert}"

    def tables(self) -> list[Table]:
        """The numbers, then the lists of tokens."""
        numbers = Table(("", "value"), tuple(self.numbers.items()), "In numbers")
        lists = [
            (name, "  ".join(f"{text} {value:.3g}" for text, value in tokens))
            for name, tokens in self.rows
        ]
        return [numbers, Table(("", "tokens and their values"), tuple(lists), "In tokens")]


def expert_card(
    layer: int,
    expert: int,
    routed: RoutedVocabulary | None,
    written: WrittenVocabulary | None,
    directions: DirectionTokens | None = None,
) -> ExpertCard:
    """The card of one expert, of what is there.

    Raises:
        UsageError: There is no such layer or expert, or nothing is given.
    """
    source = written if written is not None else routed
    if source is None:
        raise UsageError("there is neither routing nor contribution to show")
    place = place_of(source.layers, layer)
    width = (source.tokens if isinstance(source, WrittenVocabulary) else source.share).shape[1]
    if not 0 <= expert < width:
        raise UsageError(
            f"layer {layer} has the experts 0 to {width - 1}; {expert} is none of them"
        )
    numbers: dict[str, float] = {}
    rows: list[tuple[str, tuple[tuple[str, float], ...]]] = []
    definitions = []
    if routed is not None:
        definitions.append(routed.definition)
        numbers["ids that choose it most"] = int(routed.ids[place, expert])
        numbers["mean share of those, %"] = float(100 * routed.share[place, expert])
        shares = 100 * routed.top_share[place, expert]
        rows.append(
            (
                f"chosen for ({routed.token_kind}), %",
                _paired(routed.top[place, expert], shares, routed.texts),
            )
        )
    if written is not None:
        definitions.append(written.definition)
        numbers["tokens"] = int(written.tokens[place, expert])
        numbers["specific"] = float(written.specificity[place, expert])
        numbers["noise of that"] = float(written.noise[place, expert])
        numbers["sharp"] = float(written.sharpness[place, expert])
        numbers["sharp, random"] = written.random_sharpness
        numbers["size, logits"] = float(written.size[place, expert])
        numbers["its ten tokens in no other's ten"] = float(written.distinct[place, expert])
        rows += _ends("pushes {}, z", _at(written.pushed, place, expert), written.texts)
        rows += _ends("{} beyond the others, z", _at(written.beyond, place, expert), written.texts)
    if directions is not None:
        definitions.append(
            "Directions: left singular vectors of its down projection, each read alone through "
            "final norm and head; the two ends have no order."
        )
        numbers["share of a direction, even"] = directions.even
        for number, share in enumerate(directions.shares):
            numbers[f"share of direction {number + 1}"] = float(share)
            end = _at(directions.ends, number)
            rows += _ends(f"direction {number + 1}, {{}}, z", end, directions.texts, ("a", "b"))
        if directions.bias is not None:
            rows += _ends("bias {}, z", directions.bias, directions.texts)
    return ExpertCard(" ".join(definitions), layer, expert, numbers, tuple(rows))


def _at(tokens: PushedTokens, *place: int) -> PushedTokens:
    return PushedTokens(
        tokens.up[place], tokens.up_z[place], tokens.down[place], tokens.down_z[place]
    )


def _ends(
    name: str, tokens: PushedTokens, texts: dict[int, str], ends: tuple[str, str] = ("up", "down")
) -> list[tuple[str, tuple[tuple[str, float], ...]]]:
    return [
        (name.format(ends[0]), _paired(tokens.up, tokens.up_z, texts)),
        (name.format(ends[1]), _paired(tokens.down, tokens.down_z, texts)),
    ]


def _paired(
    ids: NDArray[np.int64], values: NDArray[np.float64], texts: dict[int, str]
) -> tuple[tuple[str, float], ...]:
    return tuple(
        (texts[int(each)], float(value))
        for each, value in zip(ids, values, strict=True)
        if each >= 0
    )


@dataclass(frozen=True, eq=False)
class TokenCard(Result):
    """One token and the experts it goes to, and that push it.

    Attributes:
        definition: What the numbers are.
        token_id: Of the token.
        text: Its text, spaces visible.
        layers: Model layer index of each MoE layer.
        occurrences: How often the token was counted.
        share: [layers, R] float64, share of those that chose the expert; NaN if it never occurs,
            None if routing was not asked for.
        z: [layers, R] float64, how far each expert pushes it; None if not asked for.
        beyond: [layers, R] float64, that less the mean z of the layer's others.
    """

    kind: ClassVar[str] = "experts of a token"
    definition: str
    token_id: int
    text: str
    layers: tuple[int, ...]
    occurrences: int | None
    share: NDArray[np.float64] | None
    z: NDArray[np.float64] | None
    beyond: NDArray[np.float64] | None

    @property
    def title(self) -> str:
        return f"Experts of the token {self.text}"

    def findings(self) -> list[str]:
        """How often it occurs, and who pushes it hardest."""
        said = []
        if self.share is not None:
            said.append(f"{self.text} (id {self.token_id}) occurs {self.occurrences} times.")
        if self.z is not None and not np.isnan(self.z).all():
            place, expert = np.unravel_index(np.nanargmax(self.z), self.z.shape)
            said.append(
                f"Expert {self.layers[int(place)]}:{expert} pushes it up most, by "
                f"{self.z[place, expert]:.1f} standard deviations over the vocabulary."
            )
        return said

    def tables(self) -> list[Table]:
        """The first experts of each layer."""
        columns = ["layer"]
        columns += [] if self.share is None else ["chosen most, %"]
        columns += [] if self.z is None else ["pushed up most, z", "beyond the others, z"]
        rows: list[tuple[Cell, ...]] = []
        for place, layer in enumerate(self.layers):
            cells: list[Cell] = [layer]
            if self.share is not None:
                cells.append(_best(100 * self.share[place], "{:.0f}"))
            pushed = [z for z in (self.z, self.beyond) if z is not None]
            cells += [_best(z[place], "{:+.1f}") for z in pushed]
            rows.append(tuple(cells))
        return [Table(tuple(columns), tuple(rows), "Experts by layer")]


def _best(values: NDArray[np.float64], form: str, most: int = 5) -> str:
    order = np.argsort(-np.nan_to_num(values, nan=-np.inf), kind="stable")[:most]
    return "  ".join(
        f"e{expert} {form.format(values[expert])}" for expert in order if values[expert] > 0
    )


def token_card(
    token_id: int,
    texts: TokenTexts,
    counts: IdCounts | None,
    written: WrittenVocabulary | None,
) -> TokenCard:
    """From a token to its experts.

    Args:
        token_id: The token.
        texts: Of the vocabulary, or of the run.
        counts: By routing.
        written: By contribution; `token_id` must be among those it was asked for.

    Raises:
        UsageError: Nothing is given, or the contribution was not asked for this token.
    """
    source = counts if counts is not None else written
    if source is None:
        raise UsageError("there is neither routing nor contribution to show")
    definitions, share, occurrences, z, beyond = [], None, None, None, None
    if counts is not None:
        choices = "first choice" if counts.slots == 1 else f"first {counts.slots} choices"
        definitions.append(
            f"Chosen: share of the tokens with this id ({IDS[counts.kind]}) whose {choices} the "
            "expert is (OLMoE, arXiv 2409.02060, Eq. 8)."
        )
        share, occurrences = _shares(counts, token_id)
    if written is not None:
        if token_id not in written.asked:
            raise UsageError(f"how far experts push the token {token_id} was not kept")
        definitions.append(written.definition)
        at = written.asked.index(token_id)
        z, beyond = written.asked_z[:, :, at], written.asked_beyond[:, :, at]
    return TokenCard(
        definition=" ".join(definitions),
        token_id=token_id,
        text=texts.visible(token_id),
        layers=source.layers,
        occurrences=occurrences,
        share=share,
        z=z,
        beyond=beyond,
    )


def _shares(counts: IdCounts, token_id: int) -> tuple[NDArray[np.float64], int]:
    row = int(np.searchsorted(counts.token_ids, token_id))
    if row == len(counts.token_ids) or counts.token_ids[row] != token_id:
        return np.full((len(counts.layers), counts.router_width), np.nan), 0
    chosen = np.stack([table[[row]].toarray()[0] for table in counts.chosen])
    return chosen / counts.occurrences[row], int(counts.occurrences[row])
