"""The routing rule a second time, token by token in numpy, for float32 logits.

Independent of the reference: scores by their formulas in float64, selection by sorting Python
tuples, weights and statistics in float64. Only what decides between experts is rounded to float32.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from moe_lens.kernels import Rule


@dataclass
class Answer:
    """One token: experts in the order of their selection, and what belongs to them."""

    ids: list[int]
    weights: dict[int, float]
    entropy: float
    margin: float
    mass: float


def _softmax(x: np.ndarray) -> np.ndarray:
    with np.errstate(invalid="ignore"):  # rows of infinities are NaN, as they are in MLX
        e = np.exp(x - x.max(-1, keepdims=True))
        return e / e.sum(-1, keepdims=True)


def score(kind: str, x: np.ndarray) -> np.ndarray:
    """Scores in float64 of x [..., n]."""
    x = x.astype(np.float64)
    if kind.startswith("softmax"):
        return _softmax(x)
    if kind.startswith("sigmoid"):
        return 1 / (1 + np.exp(-x))
    if kind.startswith("sqrt"):
        return np.sqrt(np.logaddexp(0, x))
    return x


def scores_of(rule: Rule, logits: np.ndarray, mask: np.ndarray | None, bias: Any) -> np.ndarray:
    """Scores [tokens, E] in float64 of `logits`."""
    x = logits.astype(np.float64) if bias is None else logits.astype(np.float64) + bias
    x = x * rule.multiplier
    if rule.softcap:
        x = np.tanh(x / rule.softcap) * rule.softcap
    x = x / rule.temperature
    if mask is not None:
        x = np.where(mask, -np.inf, x)
    return score(rule.score, x)


def _kept_groups(rule: Rule, choice: np.ndarray) -> np.ndarray:
    """Which experts stand in a group that is kept."""
    groups = rule.groups
    assert groups is not None
    by_group = choice.reshape(groups.count, -1)
    if groups.score == "max":
        best = by_group.max(-1)
    else:
        two = np.sort(by_group, -1)[:, -2:]
        best = two[:, 0] + two[:, 1]
    worst_first = sorted(range(groups.count), key=lambda g: (best[g], g))
    kept = np.ones(groups.count, bool)
    kept[worst_first[: max(0, groups.count - groups.keep)]] = False
    return np.repeat(kept, by_group.shape[1])


def answer(
    rule: Rule,
    scores: np.ndarray,
    k: int,
    *,
    mask: np.ndarray | None = None,
    force: np.ndarray | None = None,
    scale: np.ndarray | None = None,
    ids: list[int] | None = None,
) -> Answer:
    """Routes one token by its `scores` [E], float32 and without NaN."""
    experts = len(scores)
    masked = np.zeros(experts, bool) if mask is None else mask
    forced = np.zeros(experts, bool) if force is None else force
    choice = scores.astype(np.float32)
    if rule.selection_bias is not None:
        choice = choice + np.array(rule.selection_bias)
    choice = np.where(masked, np.float32(-np.inf), choice)
    weight_scores = scores.astype(np.float64)
    if rule.groups is not None:
        kept = _kept_groups(rule, choice)
        fill = np.float32(rule.groups.fill)
        if mask is not None and np.isneginf(fill):
            fill = np.finfo(np.float32).min
        choice = np.where(kept | masked, choice, fill)
        if rule.groups.zero_scores and ids is None:
            weight_scores = np.where(kept | forced, weight_scores, 0.0)
    choice = np.where(forced, np.float32(np.inf), choice)
    sign = -1 if rule.side == "high" else 1
    order = sorted(range(experts), key=lambda e: (-choice[e], sign * e))
    chosen = order[:k] if ids is None else list(ids)
    return Answer(
        chosen,
        _weights(rule, weight_scores, chosen, scale),
        *_statistics(rule, scores.astype(np.float64), choice, order, chosen),
    )


def _weights(
    rule: Rule, scores: np.ndarray, chosen: list[int], scale: np.ndarray | None
) -> dict[int, float]:
    weights = scores[chosen]
    if rule.score_chosen is not None:
        weights = score(rule.score_chosen, weights)
    if rule.normalise != "no" and len(chosen) >= rule.normalise_from_k:
        total = np.abs(weights).sum() if rule.normalise == "l1" else weights.sum()
        if rule.normalise == "sum":
            total = total + rule.epsilon
        if rule.normalise == "sum_floor":
            total = max(total, rule.epsilon)
        with np.errstate(divide="ignore", invalid="ignore"):
            weights = weights / total
    if rule.scale is not None:
        weights = weights * rule.scale
    if rule.per_expert_scale is not None:
        weights = weights * np.array(rule.per_expert_scale)[chosen]
    if scale is not None:
        weights = weights * scale[chosen]
    return dict(zip(chosen, weights.tolist(), strict=True))


def _statistics(
    rule: Rule, scores: np.ndarray, choice: np.ndarray, order: list[int], chosen: list[int]
) -> tuple[float, float, float]:
    share = _softmax(scores) if rule.score == "identity" else scores / scores.sum()
    used = share[share > 0]
    place = {expert: i for i, expert in enumerate(order)}
    left = [e for e in order if e not in set(chosen)]
    margin = np.inf
    if left:
        low = choice[max(chosen, key=lambda e: place[e])]
        high = choice[left[0]]
        margin = 0.0 if low == high else float(low - high)
    return float(-(used * np.log(used)).sum()), float(margin), float(share[chosen].sum())
