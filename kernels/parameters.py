"""A rule and the changes of an override, as the run-time arrays that the kernel reads.

Everything that a rule says is a number here, so that one compiled kernel serves every family and
every override. Each array has at least 8 elements: MLX moves smaller ones into another address
space, which would be another program.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import mlx.core as mx
import numpy as np

from .body import NORMALISE_KINDS, PER_EXPERT, REAL, SCORE_KINDS, WHOLE
from .identity_cache import IdentityCache
from .rule import Rule, Score

DTYPES = {mx.float32: 0, mx.float16: 1, mx.bfloat16: 2}
"""The dtypes the kernel knows, and the codes by which it rounds to them."""

NEGATIVE_INFINITY = -float("inf")

_FLOAT32_SCORES = ("softmax_float32", "sigmoid_float32", "sqrt_softplus_float32")
_SOFTMAX = ("softmax", "softmax_precise", "softmax_float32")
_SMALLEST = 8
_KEPT = 512


@dataclass(frozen=True)
class Changes:
    """What an override changes, as [`route`][moe_lens.kernels.route] takes it."""

    mask: mx.array | None = None
    force: mx.array | None = None
    bias: mx.array | None = None
    scale: mx.array | None = None
    ids: mx.array | None = None


@dataclass(frozen=True)
class Dtypes:
    """The dtype of every value on the way from logits to weights, as the reference has it."""

    logits: mx.Dtype
    capped: mx.Dtype
    """After `softcap`, which computes in float32."""
    score: mx.Dtype
    choice: mx.Dtype
    """Of the selection scores, after the selection bias."""
    chosen: mx.Dtype
    """After `score_chosen`; the normalisation and `scale` keep it."""
    scaled: mx.Dtype
    """After `per_expert_scale`."""
    weight: mx.Dtype


def _after(kind: Score | None, dtype: mx.Dtype) -> mx.Dtype:
    return mx.float32 if kind in _FLOAT32_SCORES else dtype


def _wider(dtype: mx.Dtype, other: mx.array | None) -> mx.Dtype:
    return dtype if other is None else mx.result_type(mx.zeros((), dtype), other)


def dtypes(rule: Rule, logits: mx.Dtype, input_dtype: mx.Dtype | None = None) -> Dtypes:
    """The dtypes of `rule` for `logits` of that dtype, in a block whose input is `input_dtype`."""
    capped = mx.float32 if rule.softcap > 0 else logits
    score = _after(rule.score, capped)
    promotes = rule.bias_dtype == "promote"
    choice = _wider(score, rule.selection_bias if promotes else None)
    chosen = _after(rule.score_chosen, score)
    scaled = _wider(chosen, rule.per_expert_scale)
    weight = {"no": scaled, "logits": logits, "input": input_dtype or scaled}[rule.cast]
    return Dtypes(logits, capped, score, choice, chosen, scaled, weight)


def computes_scores(rule: Rule, logits: mx.Dtype) -> bool:
    """Whether the kernel can compute the scores of `rule` itself, to a rounding.

    A softmax or sigmoid in 16 bits rounds every step of itself, in ways that are the backend's
    own, so its scores are always fed in.
    """
    return rule.score not in ("softmax", "sigmoid") or dtypes(rule, logits).capped == mx.float32


def scores_are_exact(rule: Rule) -> bool:
    """Whether the kernel's own scores are the reference's bit for bit: plain logits are."""
    return rule.score == "identity" and rule.softcap <= 0


def _rounded(value: float, dtype: mx.Dtype) -> float:
    rounded: float = mx.array(value, dtype).astype(mx.float32).tolist()  # type: ignore[assignment]
    return rounded


@dataclass
class Parameters:
    """The arrays of one rule with one override.

    Attributes:
        per_expert: [5 * E] float32 (at least 8), the rows of
            [`PER_EXPERT`][moe_lens.kernels.body.PER_EXPERT].
        real: [8] float32, in the order of [`REAL`][moe_lens.kernels.body.REAL].
        dtypes: The dtypes on the way.
    """

    per_expert: mx.array
    real: mx.array
    dtypes: Dtypes
    whole: dict[str, int] = field(repr=False)
    _calls: dict[tuple[int, int, bool], mx.array] = field(default_factory=dict, repr=False)

    def call(self, tokens: int, k: int, normalise_from_k: int) -> mx.array:
        """The array `whole` (int32, in the order of `WHOLE`) for `tokens` tokens and this `k`."""
        normalises = k >= normalise_from_k
        place = (tokens, k, normalises)
        found = self._calls.get(place)
        if found is None:
            if len(self._calls) >= _KEPT:
                self._calls.clear()
            numbers = self.whole | {"tokens": tokens, "k": k}
            if not normalises:
                numbers["normalise"] = 0
            found = self._calls[place] = mx.array([numbers[name] for name in WHOLE], mx.int32)
        return found


def parameters(
    rule: Rule,
    changes: Changes,
    experts: int,
    logits: mx.Dtype,
    input_dtype: mx.Dtype | None = None,
    *,
    given_scores: bool,
    rounds_sums: bool = False,
) -> Parameters:
    """The arrays of `rule` with `changes` for a router of `experts` experts.

    They are kept for the next call with the same objects, so that a layer that decodes builds
    them once; a rule or an override is read when it is first seen.

    Args:
        given_scores: The kernel gets scores, not logits: what comes before them is left out.
        rounds_sums: Whether the reference's backend rounds partial sums to their dtype.
    """
    return _cache.get(
        (rule, changes.mask, changes.force, changes.bias, changes.scale),
        (changes.ids is None, experts, logits, input_dtype, given_scores, rounds_sums),
        lambda: _build(rule, changes, experts, logits, input_dtype, given_scores, rounds_sums),
    )


_cache: IdentityCache[Parameters] = IdentityCache()


def _build(
    rule: Rule,
    changes: Changes,
    experts: int,
    logits: mx.Dtype,
    input_dtype: mx.Dtype | None,
    given_scores: bool,
    rounds_sums: bool,
) -> Parameters:
    on_the_way = dtypes(rule, logits, input_dtype)
    if given_scores:
        # The scores come as they are: every step before them is neutral, and rounds to their dtype.
        score = on_the_way.score
        before = replace(on_the_way, logits=score, capped=score)
        changes = replace(changes, bias=None)
        rule = replace(rule, multiplier=1.0, softcap=0.0, temperature=1.0)
    else:
        before = on_the_way
    return Parameters(
        _per_expert(rule, changes, experts, on_the_way),
        _real(rule, changes, before, given_scores),
        on_the_way,
        _whole(rule, changes, experts, before, given_scores, rounds_sums),
    )


def _per_expert(rule: Rule, changes: Changes, experts: int, on_the_way: Dtypes) -> mx.array:
    bias = rule.selection_bias
    if bias is not None and rule.bias_dtype == "scores":
        bias = bias.astype(on_the_way.score)
    rows = {
        "selection_bias": _row(bias, 0.0, on_the_way.choice),
        "logit_bias": _row(changes.bias, 0.0, on_the_way.logits),
        "expert_scale": _row(rule.per_expert_scale, 1.0, on_the_way.scaled),
        "weight_scale": _row(changes.scale, 1.0, on_the_way.weight),
        "state": _state(changes, experts),
    }
    table = np.zeros(max(_SMALLEST, len(PER_EXPERT) * experts), np.float32)
    for place, name in enumerate(PER_EXPERT):
        table[place * experts : (place + 1) * experts] = rows[name]
    return mx.array(table)


def _state(changes: Changes, experts: int) -> np.ndarray:
    none = np.zeros(experts, bool)
    masked = none if changes.mask is None else np.array(changes.mask).astype(bool)
    forced = none if changes.force is None else np.array(changes.force).astype(bool)
    both = np.flatnonzero(masked & forced).tolist()
    if both:
        raise ValueError(f"experts {both} are both masked and forced: leave them in one of the two")
    return masked + np.float32(2) * forced


def _row(values: mx.array | None, neutral: float, dtype: mx.Dtype) -> np.ndarray | float:
    return neutral if values is None else np.array(values.astype(dtype).astype(mx.float32))


def _real(rule: Rule, changes: Changes, before: Dtypes, given_scores: bool) -> mx.array:
    plain_logits = rule.score == "identity" or not given_scores
    fill = 0.0 if rule.groups is None else rule.groups.fill
    finite = mx.finfo(before.choice)
    if changes.mask is not None and fill == NEGATIVE_INFINITY:
        # As in the reference: dropped groups stay above masked experts.
        fill = float(finite.min)
    numbers = {
        "multiplier": _rounded(rule.multiplier, before.logits),
        "softcap": rule.softcap,
        "temperature": _rounded(rule.temperature, before.capped),
        "masked_score": NEGATIVE_INFINITY if plain_logits else 0.0,
        "group_fill": _rounded(fill, before.choice),
        "epsilon": _rounded(rule.epsilon, before.chosen),
        "scale": 1.0 if rule.scale is None else _rounded(rule.scale, before.chosen),
        "nan_choice": float(finite.max if rule.side == "high" else finite.min),
    }
    return mx.array([numbers[name] for name in REAL], mx.float32)


def _whole(
    rule: Rule,
    changes: Changes,
    experts: int,
    before: Dtypes,
    given_scores: bool,
    rounds_sums: bool,
) -> dict[str, int]:
    groups = rule.groups
    chosen = 0 if rule.score_chosen is None else SCORE_KINDS[rule.score_chosen]
    # A given softmax is masked before it is given.
    masked_is_set = not (given_scores and rule.score in _SOFTMAX)
    return {
        "experts": experts,
        "score_kind": 0 if given_scores else SCORE_KINDS[rule.score],
        "is_logits": int(rule.score == "identity"),
        "chosen_kind": chosen,
        "masked_is_set": int(changes.mask is not None and masked_is_set),
        "tie_high": int(rule.side == "high"),
        "group_count": 0 if groups is None else groups.count,
        "group_drop": 0 if groups is None else max(0, groups.count - groups.keep),
        "group_top2": int(groups is not None and groups.score == "top2"),
        "zero_dropped": int(groups is not None and groups.zero_scores),
        "normalise": NORMALISE_KINDS[rule.normalise],
        "ids_given": int(changes.ids is not None),
        "logits_dtype": DTYPES[before.logits],
        "capped_dtype": DTYPES[before.capped],
        "score_dtype": DTYPES[before.score],
        "choice_dtype": DTYPES[before.choice],
        "chosen_dtype": DTYPES[before.chosen],
        "scaled_dtype": DTYPES[before.scaled],
        "weight_dtype": DTYPES[before.weight],
        "sum_dtype": DTYPES[before.chosen] if rounds_sums else 0,
    }
