"""From evidence to a name and a role, with the thresholds that keep chance out.

What chance does is known: the routers of ``demo`` were replaced by random ones, since a random
direction in the states of a trained model still tells domains apart a little (lifts of 2 are
common, and with much text all of them are significant). The thresholds were chosen on 48 such
models and checked on others; ``docs/analysis/experts.md`` has the counts.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

import numpy as np
from numpy.typing import NDArray

from moe_lens.analysis.enrichment import FEWEST_TOKENS
from moe_lens.analysis.resampling import FALSE_SHARE

from .evidence import Evidence, Measures
from .kinds import KINDS

Cell = tuple[int, int]
"""Place of a layer, and an expert."""

__all__ = [
    "ROLES",
    "TOO_LITTLE",
    "Naming",
    "Thresholds",
    "candidates",
    "choose",
    "name_all",
    "significant",
]

TOO_LITTLE = "too little data"
ROLES = ("specialist", "syntax", "positional", "generalist", "rarely used", TOO_LITTLE)

MIN_FOCUS = 0.5
"""Half-way from an expert that does not care to one that takes nothing else."""

MIN_OWN_FOCUS = 0.2
"""What of the focus on a label must remain against the same classes of token in the other labels:
with six labels an own lift of 2. Without it, a router that sorts token ids at random gets
specialists for labels with a vocabulary of their own."""

MIN_STRENGTH = 0.42
"""Mean of focus and own focus that a label needs: where the one is near its threshold, the other
must not be. Random routers reached 0.40, the weakest specialist of ``demo`` 0.44."""

MIN_REACH = 2.25
"""Odds, against those of an even router, with which a topic must choose the expert: an expert that
takes few tokens has extreme lifts by chance. With an eighth of the experts chosen, it must get a
quarter of the topic's tokens."""

RARE = 0.1
"""Of an even share; experts with less are rarely used."""

LEANING_LIFT = 1.5
"""Lift from which a topic is mentioned in the name of an expert that it does not fit."""

MENTIONED_PURITY = 0.25
"""Share of a specialist's tokens from which a kind of token is mentioned beside its label."""


@dataclass(frozen=True)
class Thresholds:
    """What a topic must reach before an expert is named after it.

    Attributes:
        focus: At the lower end of the interval; 0 to 1.
        own_focus: Labels only; 0 to 1.
        strength: Labels only: the mean of the two.
        reach: Odds against those of an even router.
        false_share: Largest q.
        fewest_tokens: Tokens that the expert must have.
    """

    focus: float = MIN_FOCUS
    own_focus: float = MIN_OWN_FOCUS
    strength: float = MIN_STRENGTH
    reach: float = MIN_REACH
    false_share: float = FALSE_SHARE
    fewest_tokens: int = FEWEST_TOKENS


@dataclass(frozen=True, eq=False)
class Naming:
    """The outcome, [layers, R] each.

    Attributes:
        topic: Topic that explains most of the expert, among those that fit if any does; -1: none.
        fits: Whether it passes all thresholds.
        role: Name of the role.
        name: The name.
    """

    topic: NDArray[np.int64]
    fits: NDArray[np.bool_]
    role: NDArray[np.object_]
    name: NDArray[np.object_]


def fitting(found: Measures, focus: NDArray[np.floating], least: Thresholds) -> NDArray[np.bool_]:
    """Which topics pass the thresholds on size, in the shape of the measures.

    Args:
        found: The measures.
        focus: What is held against the threshold of focus.
        least: The thresholds.
    """
    strength = (focus + found.own_focus) / 2
    label = (found.own_focus >= least.own_focus) & (strength >= least.strength)
    own = np.isnan(found.own_lift) | label
    return (focus >= least.focus) & (found.reach >= least.reach) & own


def significant(
    q: NDArray[np.floating], low: NDArray[np.floating], least: Thresholds
) -> NDArray[np.bool_]:
    """Whether topics are chosen more than others: by the null, and by the interval of the lift."""
    return (q <= least.false_share) & (low > 1.0)


def candidates(
    found: Measures, focus: NDArray[np.floating], sure: NDArray[np.bool_], least: Thresholds
) -> tuple[NDArray[np.floating], NDArray[np.bool_]]:
    """What each topic explains if it may stand in a name, else 0, and whether it fits.

    Args:
        found: The measures.
        focus: What is held against the threshold of focus.
        sure: Whether the lift is significant, of the same shape or one that spreads to it.
        least: The thresholds.
    """
    fits = sure & fitting(found, focus, least)
    leaning = sure & (found.lift >= LEANING_LIFT)
    return np.where(leaning | fits, found.explained, 0.0), fits


def choose(
    explained: NDArray[np.floating], fits: NDArray[np.bool_], labels: int
) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """The winning topic and whether it fits; topics on the first axis, which goes.

    A label that fits wins over kinds, a kind that fits over what does not; among equals, the one
    that explains more.
    """
    first = (np.arange(len(explained)) < labels).reshape(-1, *[1] * (explained.ndim - 1))
    key = explained + np.where(fits, np.where(first, 4.0, 2.0), 0.0)
    winner = key.argmax(axis=0)
    won = np.take_along_axis(key, winner[None], axis=0)[0]
    return np.where(won > 0, winner, -1), won >= 2.0


def name_all(
    found: Evidence,
    tokens: NDArray[np.int64],
    even_tokens: NDArray[np.float64],
    like: NDArray[np.object_],
    least: Thresholds,
) -> Naming:
    """Names and roles of all experts.

    Args:
        found: The evidence.
        tokens: [layers, R] tokens that each expert received.
        even_tokens: [layers] tokens that each would receive from an even router.
        like: [layers, R] what an expert is called after its tokens, where no topic helps.
        least: The thresholds.
    """
    measured = found.measures
    sure = significant(found.q, found.low, least)
    explained, fits = candidates(measured, found.low_focus, sure, least)
    topic, fit = choose(explained, fits, found.labels)
    leaning = sure & (measured.lift >= LEANING_LIFT)
    names = np.empty(tokens.shape, dtype=object)
    roles = np.empty(tokens.shape, dtype=object)
    layers, width = tokens.shape
    for cell in product(range(layers), range(width)):
        enough = tokens[cell] >= least.fewest_tokens
        rare = tokens[cell] < RARE * even_tokens[cell[0]]
        expected = even_tokens[cell[0]] * RARE >= least.fewest_tokens
        if not enough:
            roles[cell] = "rarely used" if rare and expected else TOO_LITTLE
            names[cell] = f"{roles[cell]} ({int(tokens[cell])} tokens)"
        elif fit[cell]:
            roles[cell] = _role(int(topic[cell]), found.labels)
            names[cell] = _fitting_name(found, int(topic[cell]), leaning[:, cell[0], cell[1]], cell)
        else:
            roles[cell] = "rarely used" if rare else "generalist"
            names[cell] = (
                _leaning_name(found, leaning[:, cell[0], cell[1]], cell) or like[cell] or "mixed"
            )
    return Naming(topic, fit, roles, names)


def _role(topic: int, labels: int) -> str:
    return "specialist" if topic < labels else KINDS[topic - labels].role


def _best(values: NDArray[np.floating], among: NDArray[np.bool_], part: slice) -> int | None:
    """Place of the highest value of a part of the topics, or None if none is among them."""
    held = np.where(among, values, -1.0)[part]
    if len(held) == 0 or held.max() <= 0:
        return None
    return int(held.argmax()) + (part.start or 0)


def _fitting_name(found: Evidence, topic: int, leaning: NDArray[np.bool_], cell: Cell) -> str:
    """``json``, or ``json · JSON keys`` where a kind of token makes up much of it."""
    name = found.names[topic]
    if topic >= found.labels:
        return name
    much = leaning & (found.measures.purity[:, cell[0], cell[1]] >= MENTIONED_PURITY)
    kind = _best(found.measures.explained[:, cell[0], cell[1]], much, slice(found.labels, None))
    return name if kind is None else f"{name} · {found.names[kind]}"


def _leaning_name(found: Evidence, leaning: NDArray[np.bool_], cell: Cell) -> str:
    """``partly math, digits``: the label and the kind that explain most, or nothing."""
    explained = found.measures.explained[:, cell[0], cell[1]]
    parts = (slice(0, found.labels), slice(found.labels, None))
    best = [place for part in parts if (place := _best(explained, leaning, part)) is not None]
    best.sort(key=lambda place: -explained[place])
    return f"partly {', '.join(found.names[place] for place in best)}" if best else ""
