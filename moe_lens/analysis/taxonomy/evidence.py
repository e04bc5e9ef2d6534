"""What speaks for naming an expert after a topic: a label of the corpus, or a kind of token.

For a topic c and an expert e of a layer, with tokens as the unit (each label weighing the same in
what is said of labels):

* rate(c, e) = tokens of c routed to e / tokens of c;
* lift = rate(c, e) / rate(all, e); purity = share of the tokens of e that are of c = lift x base,
  base the share of c in the text;
* focus = (purity - base) / (1 - base): 0 where e does not care, 1 where it takes nothing else.
  (Purity alone would be high for whatever is frequent in the text.);
* reach = odds of rate(c, e) / odds of k / E, the odds of p being p / (1 - p): against a router that
  treats all experts alike. (Odds, since a rate cannot be twice a k / E of a half.);
* own lift, of labels: rate(c, e) / sum over classes w of P(w | c) P(e | w), P(e | w) over all
  labels: against what the classes of its tokens would give (indirect standardisation, Fleiss, Levin
  and Paik 2003, chapter 19). It is 1 for an expert of digits that a label full of numbers seems to
  attract, and for a class of token that no other label has. Own focus is focus with it as the lift;
* explained = I(e; c) / H(e): share of the uncertainty whether a token goes to e that knowing c
  takes away (Theil 1970). It chooses between topics that fit, since it weighs purity and rate.

Labels are tested as in `enrichment`. A kind varies inside prompts, so it is tested there: with x_u
the tokens of the kind in unit u that e took, n_u those of the kind, and r_u the share of all tokens
of u that e took, the residuals d_u = x_u - n_u r_u are as often negative as positive if e does not
care for the kind. z = sum d_u / sqrt(sum d_u^2), compared with the z of random signs (a sign-flip
test, Fisher 1935, section 21), pooled over cells; q as everywhere.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moe_lens.analysis.enrichment import FEWEST_TOKENS, FEWEST_UNITS, Enrichment
from moe_lens.analysis.resampling import false_discovery
from moe_lens.analysis.units import Units

from .counting import ClassCounts
from .kinds import KINDS, PARTITIONS, membership

__all__ = ["Evidence", "Measures", "all_q", "blocks", "evidence", "labels_there", "measures"]

Floats = NDArray[np.floating[Any]]

_WHAT = slice(0, PARTITIONS[0])
"""Columns of the partition by what a token is, in which every token is once."""

_FLIPPED = 2_000_000
"""Statistics of random signs kept at most."""

_CERTAIN = 1e-6
"""The odds of a rate are at most its inverse."""

_AT_ONCE = 8_000_000
"""Numbers of an intermediate table."""


@dataclass(frozen=True, eq=False)
class Measures:
    """What was measured of topics and experts: [topics, layers, R], or [draws, topics, experts].

    Attributes:
        rate: Share of the topic's tokens that went to the expert.
        lift: Rate over that of the whole text; NaN for an expert without tokens.
        purity: Share of the expert's tokens that are of the topic.
        focus: Purity beyond the topic's share of the text, of what is possible.
        reach: Odds of the rate over those of k / E.
        own_lift: Rate over what the classes of the label's tokens would give; NaN for kinds.
        own_focus: Focus with the own lift in place of the lift; NaN for kinds.
        explained: Share of the expert's uncertainty; 0 where the lift is at most 1.
    """

    rate: Floats
    lift: Floats
    purity: Floats
    focus: Floats
    reach: Floats
    own_lift: Floats
    own_focus: Floats
    explained: Floats


@dataclass(frozen=True, eq=False)
class Evidence:
    """All that speaks for topics: the labels of the corpus, then the kinds of token.

    Attributes:
        names: [topics]
        labels: How many of them are labels.
        base: [topics] float64, share of the text; of labels 1 / labels.
        tokens: [topics] int64, tokens of each in the trace.
        measures: [topics, layers, R].
        low: [topics, layers, R] float64, lower end of the 95 % interval of the lift over prompts.
        high: [topics, layers, R] float64, upper end.
        low_focus: [topics, layers, R] float64, lower end of the interval of the focus.
        q: [topics, layers, R] float64; NaN on too little data.
    """

    names: tuple[str, ...]
    labels: int
    base: Floats
    tokens: NDArray[np.int64]
    measures: Measures
    low: Floats
    high: Floats
    low_focus: Floats
    q: Floats


def labels_there(units: Units) -> NDArray[np.int64]:
    """Places of the labels that have tokens."""
    return np.unique(units.label[units.label >= 0])


def blocks(width: int, draws: int, labels: int) -> list[slice]:
    """Experts that are measured together, so that intermediate tables stay small."""
    step = max(1, _AT_ONCE // (draws * (labels + 1) * PARTITIONS[0] * 2))
    return [slice(start, min(start + step, width)) for start in range(0, width, step)]


def measures(
    seen: ClassCounts, layer: int, experts: slice, drawn: Floats, even: float
) -> tuple[Measures, Floats]:
    """Measures of some experts of a layer, for each drawing of units.

    Args:
        seen: Counts by class.
        layer: Place of the layer.
        experts: Which experts.
        drawn: [draws, units] how often each unit counts; float32 is enough for draws.
        even: k / E.

    Returns:
        Measures [draws, topics, experts], and [draws, topics] the base of each topic.
    """
    united, units = membership().astype(drawn.dtype), seen.units
    part = seen.counts[:, :, layer, experts].astype(drawn.dtype)
    wide, width = part.shape[1:]
    counts = (drawn @ part.reshape(len(part), -1)).reshape(len(drawn), wide, width)
    tokens = drawn @ seen.tokens.astype(drawn.dtype)
    total = np.maximum(tokens[:, _WHAT].sum(axis=1), 1e-9)[:, None]
    sizes = tokens @ united.T
    rate = (united @ counts) / np.maximum(sizes, 1e-9)[..., None]
    share = (counts[:, _WHAT].sum(axis=1) / total)[:, None]
    found = [_measured(rate, share, sizes / total, even, np.full_like(rate, np.nan))]
    bases = [sizes / total]
    if len(there := labels_there(units)):
        base = np.full((len(drawn), len(there)), 1.0 / len(there), drawn.dtype)
        found.insert(0, _label_measures(seen, part[:, _WHAT], drawn, base, even))
        bases.insert(0, base)
    names = [field.name for field in fields(Measures)]
    joined = {
        name: np.concatenate([getattr(each, name) for each in found], axis=1) for name in names
    }
    return Measures(**joined), np.concatenate(bases, axis=1)


def _label_measures(
    seen: ClassCounts, part: Floats, drawn: Floats, base: Floats, even: float
) -> Measures:
    """``part`` [units, classes, experts] counts; the labels all weigh the same."""
    units = seen.units
    occurring = np.flatnonzero(seen.tokens[:, _WHAT].any(axis=0))
    part, sizes = part[:, occurring], seen.tokens[:, occurring].astype(drawn.dtype)
    wide, width = part.shape[1:]
    there = labels_there(units)
    counts = np.zeros((len(drawn), len(there), wide, width), drawn.dtype)
    tokens = np.zeros((len(drawn), len(there), wide), drawn.dtype)
    for place, label in enumerate(there):
        members = np.flatnonzero(units.label == label)
        chosen = drawn[:, members]
        flat = chosen @ part[members].reshape(len(members), -1)
        counts[:, place] = flat.reshape(len(drawn), wide, width)
        tokens[:, place] = chosen @ sizes[members]
    size = np.maximum(tokens.sum(axis=2), 1e-9)[..., None]
    within = tokens / size  # P(class | label)
    counts /= size[..., None]
    by_class = counts.sum(axis=1) / np.maximum(within.sum(axis=1), 1e-9)[..., None]
    expected = within @ by_class
    rate = counts.sum(axis=2)
    own_lift = np.divide(rate, expected, out=np.full_like(rate, np.nan), where=expected > 0)
    return _measured(rate, rate.mean(axis=1, keepdims=True), base, even, own_lift)


def _measured(rate: Floats, share: Floats, base: Floats, even: float, own: Floats) -> Measures:
    """``rate`` and ``own`` [draws, topics, experts], ``share`` [draws, 1, experts]."""
    base = base[..., None]
    lift = np.divide(rate, share, out=np.full_like(rate, np.nan), where=share > 0)
    purity = lift * base
    possible = np.where(base < 1.0, 1.0 - base, np.inf)
    focus, own_focus = (purity - base) / possible, (own * base - base) / possible
    rest = np.clip((share - base * rate) / np.maximum(1.0 - base, 1e-9), 0.0, 1.0)
    unsure = _entropy(share)
    left = base * _entropy(rate) + (1.0 - base) * _entropy(rest)
    unsure = np.broadcast_to(unsure, rate.shape)
    some = (unsure > 1e-6) & (lift > 1.0) & (base < 1.0)
    explained = np.divide(unsure - left, unsure, out=np.zeros_like(rate), where=some)
    explained = np.maximum(explained, 0.0)
    reach = rate * (1.0 - even) / (np.maximum(1.0 - rate, _CERTAIN) * max(even, 1e-9))
    return Measures(rate, lift, purity, focus, reach, own, own_focus, explained)


def _entropy(share: Floats) -> Floats:
    """Of yes or no, in bits."""
    tiny = np.finfo(share.dtype).eps / 4
    share = np.clip(share, tiny, 1.0 - 2 * tiny)
    return -(share * np.log2(share) + (1.0 - share) * np.log2(1.0 - share))


def evidence(
    seen: ClassCounts,
    labelled: Enrichment | None,
    even: Floats,
    intervals: Floats,
    q: Floats,
) -> Evidence:
    """The evidence of the whole text.

    Args:
        seen: Counts by class.
        labelled: The labels' tests, of the same units; None without labels.
        even: [layers] k / E.
        intervals: [3, kinds, layers, R] for the kinds: low and high of the lift, low of the focus.
        q: [topics, layers, R]; see `all_q`.
    """
    width = seen.counts.shape[-1]
    once = np.ones((1, len(seen.units)))
    found = [measures(seen, layer, slice(0, width), once, each) for layer, each in enumerate(even)]
    stacked = {
        field.name: np.stack([getattr(one, field.name)[0] for one, _ in found], axis=1)
        for field in fields(Measures)
    }
    tokens = (membership() @ seen.tokens.sum(axis=0)).astype(np.int64)
    low, high, low_focus = intervals
    names = tuple(kind.name for kind in KINDS)
    if labelled is not None:
        units, there = seen.units, labels_there(seen.units)
        names = (*(labelled.names[place] for place in there), *names)
        base, possible = 1.0 / len(there), max(1.0 - 1.0 / len(there), 1e-9)
        low_focus = np.concatenate([(labelled.low[there] - 1.0) * base / possible, low_focus])
        low = np.concatenate([labelled.low[there], low])
        high = np.concatenate([labelled.high[there], high])
        of_label = np.array([units.tokens[units.label == place].sum() for place in there])
        tokens = np.concatenate([of_label, tokens])
    labels = len(names) - len(KINDS)
    bases = found[0][1][0]
    return Evidence(names, labels, bases, tokens, Measures(**stacked), low, high, low_focus, q)


def all_q(seen: ClassCounts, labelled: Enrichment | None, *, seed: int = 0) -> Floats:
    """[topics, layers, R] q of the labels and of the kinds, those by random signs of units."""
    kinds = _kind_q(seen, seed)
    if labelled is None:
        return kinds
    return np.concatenate([labelled.q[labels_there(seen.units)], kinds])


def _kind_q(seen: ClassCounts, seed: int) -> Floats:
    """[kinds, layers, R] by random signs of units; NaN where there is too little data."""
    united = membership()
    tokens = seen.tokens.astype(np.float64)
    of_kind = tokens @ united.T  # [units, kinds]
    total = tokens[:, _WHAT].sum(axis=1)
    _, _, layers, width = seen.counts.shape
    some = (of_kind > 0) & (of_kind < total[:, None])
    kinds = (some.sum(axis=0) >= FEWEST_UNITS) & (of_kind.sum(axis=0) >= FEWEST_TOKENS)
    observed = np.full((len(united), layers, width), np.nan)
    generator = np.random.default_rng(seed)
    rounds = int(np.clip(_FLIPPED // max(1, kinds.sum() * layers * width), 10, 1000))
    signs = generator.integers(0, 2, (rounds, len(total))) * 2.0 - 1.0
    pool = []
    for layer in range(layers):
        counts = seen.counts[:, :, layer].astype(np.float64)
        taken = counts[:, _WHAT].sum(axis=1)  # [units, R]
        enough = taken.sum(axis=0) >= FEWEST_TOKENS
        if not (enough.any() and kinds.any()):
            continue
        rate = (taken / np.maximum(total, 1)[:, None])[:, enough]
        residual = np.einsum("kc,uce->uke", united[kinds], counts[:, :, enough])
        residual -= of_kind[:, kinds, None] * rate[:, None]
        spread = np.sqrt(np.square(residual).sum(axis=0))
        spread[spread < 1e-9] = np.inf  # an expert that never deviates deviates from nothing
        observed[np.ix_(kinds, [layer], enough)] = (residual.sum(axis=0) / spread)[:, None]
        flipped = signs @ residual.reshape(len(total), -1)
        pool.append((flipped / spread.ravel()).ravel().astype(np.float32))
    p = np.full(observed.shape, np.nan)
    if pool:
        null = np.sort(np.concatenate(pool))
        tested = ~np.isnan(observed)
        reached = len(null) - np.searchsorted(null, observed[tested] - 1e-6, side="left")
        p[tested] = (1 + reached) / (1 + len(null))
    return false_discovery(p)
