"""By contribution: which tokens each expert pushes up and down.

What an expert adds to the residual stream of a token, its output f times its weight g, changes the
logits directly, through final norm and head, and through later layers. It is read in two ways,
mean over the tokens routed to the expert:

* ``effect``: the direct change of the logits, to first order: the derivative of the norm at the
  token's own final stream, then the head. What points along the stream changes nothing, since the
  norm divides it out.
* ``alone``: g f through norm and head as if it were the whole stream (a logit lens of the expert).
  What points along the stream is in it. It says what the expert and the stream agree on as well.

Either gives one number for each token of the vocabulary; z says how many standard deviations it
lies above the mean over the vocabulary (adding the same to all logits changes nothing).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

import numpy as np
from numpy.typing import NDArray

from moe_lens.analysis.result import Result
from moe_lens.analysis.table import Cell, Table
from moe_lens.errors import UsageError
from moe_lens.recording.effects import HALVES, ExpertEffects
from moe_lens.telling import Progress
from moe_lens.trace import TokenTexts

from .pushed import (
    SHARP,
    PushedTokens,
    beyond_others,
    correlation,
    real_tokens,
    sharpness,
    standardised,
)

__all__ = [
    "FEWEST_TOKENS",
    "READ",
    "PushedTokens",
    "Reading",
    "WrittenVocabulary",
    "written_vocabulary",
]

FEWEST_TOKENS = 50
"""Tokens that an expert must have received before anything is said of its mean output."""

RANDOM_DIRECTIONS = 64

READ = {
    "effect": "direct change of the logits by what an expert adds to the stream, to first order",
    "alone": "logits of what an expert adds to the stream, read alone through final norm and head",
}
"""What z is of."""


class Reading(Protocol):
    """The way to the logits; `moe_lens.unembedding.ExpertReading` is one."""

    def effects(self, vectors: NDArray[np.float64]) -> NDArray[np.float32]:
        """[n, vocabulary] of changes [n, hidden] of what the head reads."""

    def alone(self, vectors: NDArray[np.float64], place: int | None = None) -> NDArray[np.float32]:
        """[n, vocabulary] of vectors of the stream, or of the experts of the layer at `place`."""


@dataclass(frozen=True, eq=False)
class WrittenVocabulary(Result):
    """What experts push, by MoE layer and expert. NaN for experts with too few tokens.

    Attributes:
        definition: What the numbers are.
        layers: Model layer index of each MoE layer.
        tokens: [layers, R] int64, tokens routed to each expert.
        read: Key of `READ`.
        size: [layers, R] float64, standard deviation over the vocabulary, in logits. Of an effect
            it says how much (up to the factor by which some architectures scale what a layer
            adds), of what is read alone nothing.
        pushed: [layers, R, top] the ends of z.
        beyond: [layers, R, top] of the tokens whose z is above 1 (below -1), those by whose z it
            differs most from the mean z of the layer's others. Without that limit the tokens that
            no expert pushes, such as bytes that never occur, would be on top.
        specificity: [layers, R] float64, 1 - correlation over the vocabulary of its z with the
            mean z of the layer's other experts: 0 pushes what all push, 1 what no other does.
        noise: [layers, R] float64, 1 - correlation of its z from the two halves of the prompts:
            a specificity below that is not established.
        sharpness: [layers, R] float64, mean z of the ten tokens pushed up most.
        random_sharpness: The 97.5 % quantile of that for random directions of the stream.
        distinct: [layers, R] float64, share of the tokens in `pushed.up` that no other expert of
            the layer has in its own.
        asked: Token ids asked for.
        asked_z: [layers, R, asked] float64, z of those.
        asked_beyond: [layers, R, asked] float64, z less the mean z of the layer's others.
        texts: Texts of the ids above.
        seed: Of the random directions.
    """

    kind: ClassVar[str] = "vocabulary by contribution"
    definition: str
    layers: tuple[int, ...]
    read: str
    tokens: NDArray[np.int64]
    size: NDArray[np.float64]
    pushed: PushedTokens
    beyond: PushedTokens
    specificity: NDArray[np.float64]
    noise: NDArray[np.float64]
    sharpness: NDArray[np.float64]
    random_sharpness: float
    distinct: NDArray[np.float64]
    asked: tuple[int, ...]
    asked_z: NDArray[np.float64]
    asked_beyond: NDArray[np.float64]
    texts: dict[int, str]
    seed: int

    @property
    def title(self) -> str:
        return "Vocabulary of experts by contribution"

    @property
    def established(self) -> NDArray[np.bool_]:
        """[layers, R] experts whose specificity is above its noise."""
        return self.specificity > self.noise

    def findings(self) -> list[str]:
        """How specific experts are, where most, and how sharp against random directions."""
        known = ~np.isnan(self.specificity)
        if not known.any():
            return [f"No expert received {FEWEST_TOKENS} tokens: run more text."]
        median = [
            float(np.median(row[seen])) if seen.any() else np.nan
            for row, seen in zip(self.specificity, known, strict=True)
        ]
        best = int(np.nanargmax(median))
        sharp = (self.sharpness > self.random_sharpness)[known]
        said = [
            f"Experts of layer {self.layers[best]} push the most tokens of their own: half have a "
            f"specificity above {median[best]:.2f}.",
            f"{int(sharp.sum())} of {len(sharp)} experts push {SHARP} tokens harder than 97.5 % of "
            f"random directions do (sharpness {self.random_sharpness:.1f}).",
        ]
        unsure = int((known & ~self.established).sum())
        if unsure:
            said.append(
                f"{unsure} experts differ between halves of the text as much as from each other: "
                "they are left out of the table."
            )
        return said

    def tables(self) -> list[Table]:
        """The experts with the most specific pushes."""
        return [self.expert_table()]

    def expert_table(self, most: int = 16, chosen_for: Callable[..., str] | None = None) -> Table:
        """Experts by falling specificity.

        Args:
            most: Rows.
            chosen_for: ``(place, expert) -> text`` for one more column.
        """
        score = np.where(self.established, self.specificity, np.nan)
        order = np.argsort(-np.nan_to_num(score, nan=-1.0), axis=None, kind="stable")
        rows: list[tuple[Cell, ...]] = []
        for cell in order[:most]:
            place, expert = divmod(int(cell), score.shape[1])
            if np.isnan(score[place, expert]):
                break
            rows.append(
                (
                    f"{self.layers[place]}:{expert}",
                    float(self.specificity[place, expert]),
                    float(self.sharpness[place, expert]),
                    float(self.size[place, expert]),
                    self.shown(self.pushed.up[place, expert]),
                    self.shown(self.beyond.up[place, expert]),
                    *([] if chosen_for is None else [chosen_for(place, expert)]),
                )
            )
        columns = ["expert", "specific", "sharp", "size", "pushes up", "beyond the others"]
        columns += [] if chosen_for is None else ["chosen for, %"]
        return Table(tuple(columns), tuple(rows), "Experts with the most specific pushes")

    def shown(self, ids: NDArray[np.int64], most: int = 5) -> str:
        """The texts of the first ids."""
        return "  ".join(self.texts[int(each)] for each in ids[:most] if each >= 0)


def written_vocabulary(
    effects: ExpertEffects,
    reading: Reading,
    texts: TokenTexts,
    *,
    read: str = "effect",
    top: int = 10,
    asked: Sequence[int] = (),
    seed: int = 0,
    progress: Progress | None = None,
) -> WrittenVocabulary:
    """What experts push, on real text. Memory: a few tables of [R, vocabulary], for one layer.

    Args:
        effects: Sums of what the experts do.
        reading: The way to the logits.
        texts: Of every id that is a token; others (padding of the head) take no part.
        read: ``effect`` or ``alone``.
        top: Ids kept at each end.
        asked: Ids whose z is kept for every expert.
        seed: Of the random directions.
        progress: Called with layers done and layers in all.

    Raises:
        UsageError: There is no such reading.
    """
    if read not in READ:
        raise UsageError(f"what experts add cannot be read as {read!r}; choose {' or '.join(READ)}")
    tokens = effects.counts.sum(axis=0)
    means = [effects.mean(half, write=read == "alone") for half in (None, *range(HALVES))]
    asking = _Asking(reading, read, texts, top, tuple(asked))
    parts = []
    for place in range(len(effects.layers)):
        parts.append(asking.layer(tokens[place], *(mean[place] for mean in means)))
        if progress is not None:
            progress(place + 1, len(effects.layers))
    pushed = PushedTokens.stack([part.pushed for part in parts])
    beyond = PushedTokens.stack([part.beyond for part in parts])
    shown = {*pushed.ids().tolist(), *beyond.ids().tolist(), *map(int, asked)}
    return WrittenVocabulary(
        definition=(
            f"z: {READ[read]}, mean over its tokens, in standard deviations over the vocabulary. "
            "Specific: 1 - correlation of its z with the mean z of the layer's other experts; "
            "beyond the others: z above 1, by its difference from that mean. "
            f"Sharp: mean z of the {SHARP} highest; size: the standard deviation, in logits."
        ),
        layers=effects.layers,
        read=read,
        tokens=tokens,
        size=np.stack([part.size for part in parts]),
        pushed=pushed,
        beyond=beyond,
        specificity=np.stack([part.specificity for part in parts]),
        noise=np.stack([part.noise for part in parts]),
        sharpness=np.stack([part.sharpness for part in parts]),
        random_sharpness=asking.random_sharpness(effects.sums.shape[-1], seed),
        distinct=_distinct(pushed.up, tokens >= FEWEST_TOKENS),
        asked=tuple(map(int, asked)),
        asked_z=np.stack([part.asked_z for part in parts]),
        asked_beyond=np.stack([part.asked_beyond for part in parts]),
        texts={each: texts.visible(each) for each in sorted(shown)},
        seed=seed,
    )


@dataclass(frozen=True, eq=False)
class _Layer:
    """One layer of `WrittenVocabulary`."""

    size: NDArray[np.float64]
    pushed: PushedTokens
    beyond: PushedTokens
    specificity: NDArray[np.float64]
    noise: NDArray[np.float64]
    sharpness: NDArray[np.float64]
    asked_z: NDArray[np.float64]
    asked_beyond: NDArray[np.float64]


@dataclass(frozen=True)
class _Asking:
    """The questions to one layer."""

    reading: Reading
    read: str
    texts: TokenTexts
    top: int
    asked: tuple[int, ...]

    def random_sharpness(self, width: int, seed: int) -> float:
        directions = np.random.default_rng(seed).normal(size=(RANDOM_DIRECTIONS, width))
        z = standardised(self.reading.alone(directions), self.texts)
        return float(np.quantile(sharpness(z), 0.975))

    def layer(self, tokens: NDArray, mean: NDArray, *halves: NDArray) -> _Layer:
        known = tokens >= FEWEST_TOKENS
        z, size = self._z(mean, known)
        number = max(1, int(known.sum()))
        others = (z[known].sum(axis=0) - z) / max(1, number - 1)
        beyond = z - others
        half = [self._z(each, known)[0] for each in halves]
        asked = list(self.asked)
        return _Layer(
            size=size,
            pushed=PushedTokens.of(z, self.top),
            beyond=beyond_others(z, beyond, self.top),
            specificity=1 - correlation(z, others) if number > 1 else np.full(len(z), np.nan),
            noise=1 - correlation(*half),
            sharpness=np.where(known, sharpness(z), np.nan),
            asked_z=z[:, asked].astype(np.float64),
            asked_beyond=beyond[:, asked].astype(np.float64),
        )

    def _z(
        self, vectors: NDArray, known: NDArray[np.bool_]
    ) -> tuple[NDArray[np.float32], NDArray[np.float64]]:
        """z [n, vocabulary] and size [n]; NaN in rows that are not known."""
        given = np.where(known[:, None], np.nan_to_num(vectors), 0.0)
        logits = self.reading.alone(given) if self.read == "alone" else self.reading.effects(given)
        z = standardised(logits, self.texts)
        z[~known] = np.nan
        size = logits[:, real_tokens(logits.shape[1], self.texts)].std(axis=1, dtype=np.float64)
        return z, np.where(known, size, np.nan)


def _distinct(up: NDArray[np.int64], known: NDArray[np.bool_]) -> NDArray[np.float64]:
    """[layers, R] share of an expert's ids that no other known expert of the layer has."""
    found = np.full(known.shape, np.nan)
    for place, layer in enumerate(up):
        ids, times = np.unique(layer[known[place]], return_counts=True)
        once = ids[times == 1]
        for expert in np.flatnonzero(known[place]):
            found[place, expert] = np.isin(layer[expert], once).mean()
    return found
