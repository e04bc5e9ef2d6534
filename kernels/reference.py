"""The reference: a routing rule in plain MLX operations, with the changes an override asks for.

Every operation stands in the order and dtype in which mlx-lm's blocks have it, because ids must
agree bit for bit: at the k-th place ties hit 4 to 14 % of the tokens in bfloat16.
"""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn

from .rule import Groups, Rule, Score, Side

NEGATIVE_INFINITY = -float("inf")


def _score(kind: Score, logits: mx.array) -> mx.array:
    match kind:
        case "identity":
            return logits
        case "softmax":
            return mx.softmax(logits, axis=-1)
        case "softmax_precise":
            return mx.softmax(logits, axis=-1, precise=True)
        case "softmax_float32":
            return mx.softmax(logits.astype(mx.float32), axis=-1)
        case "sigmoid":
            return mx.sigmoid(logits)
        case "sigmoid_float32":
            return mx.sigmoid(logits.astype(mx.float32))
        case "sqrt_softplus_float32":
            return mx.sqrt(nn.softplus(logits.astype(mx.float32)))
    raise ValueError(f"unknown score {kind!r}")


def _best(scores: mx.array, k: int, side: Side) -> mx.array:
    if side == "low":
        return mx.argpartition(-scores, kth=k - 1, axis=-1)[..., :k]
    if side == "high":
        return mx.argpartition(scores, kth=-k, axis=-1)[..., -k:]
    return mx.argsort(-scores, axis=-1)[..., :k]


def _without_nan(scores: mx.array, number: float) -> mx.array:
    return mx.where(mx.isnan(scores), mx.array(number, scores.dtype), scores)


def _drop_groups(choice: mx.array, groups: Groups, fill: float) -> tuple[mx.array, mx.array | None]:
    """`choice` with the dropped groups filled, and which experts were dropped (None: none)."""
    drop = groups.count - groups.keep
    if drop <= 0:
        return choice, None
    grouped = mx.unflatten(choice, axis=-1, shape=(groups.count, -1))
    if groups.score == "max":
        best = grouped.max(axis=-1, keepdims=True)
    else:
        best = mx.topk(grouped, 2, axis=-1).sum(axis=-1, keepdims=True)
        # inf - inf: MLX sorts NaN last, so such a group is kept.
        best = _without_nan(best, mx.finfo(best.dtype).max)
    worst = mx.argpartition(best, kth=drop - 1, axis=-2)[..., :drop, :]
    filled = mx.put_along_axis(grouped, worst, mx.array(fill, grouped.dtype), axis=-2)
    dropped = mx.zeros(grouped.shape, dtype=mx.bool_)
    dropped = mx.put_along_axis(dropped, worst, mx.array(True), axis=-2)
    return mx.flatten(filled, -2, -1), mx.flatten(dropped, -2, -1)


def expert_scores(rule: Rule, logits: mx.array, mask: mx.array | None = None) -> mx.array:
    """The unbiased scores [..., E] of `logits` [..., E]; masked experts score as logit -inf."""
    if rule.multiplier != 1.0:
        logits = logits * rule.multiplier
    if rule.softcap > 0:
        logits = mx.tanh(logits.astype(mx.float32) / rule.softcap) * rule.softcap
    if rule.temperature != 1.0:
        logits = logits / rule.temperature
    if mask is not None:
        logits = mx.where(mask, mx.array(NEGATIVE_INFINITY, logits.dtype), logits)
    return _score(rule.score, logits)


def changed_logits(logits: mx.array, bias: mx.array | None) -> mx.array:
    """The logits [..., E] with the bias [E] of an override, in their own dtype."""
    return logits if bias is None else logits + bias.astype(logits.dtype)


def selection_scores(
    rule: Rule,
    scores: mx.array,
    *,
    mask: mx.array | None = None,
    force: mx.array | None = None,
) -> tuple[mx.array, mx.array]:
    """What the k best are taken from [..., E], and the scores [..., E] their weights come from.

    The latter are `scores`, except where the rule gives weight 0 to the experts of dropped groups.

    A score that is NaN counts as the lowest finite number for the sides ``low`` and ``sorted``,
    and as the highest for ``high``: as MLX sorts NaN last, a block prefers numbers to it, or it to
    numbers. Which of several NaNs a block takes is the backend's own; here the side decides, a
    masked expert stays out and a forced one in.
    """
    choice = scores
    if rule.selection_bias is not None:
        bias = rule.selection_bias
        choice = choice + (bias.astype(choice.dtype) if rule.bias_dtype == "scores" else bias)
    finite = mx.finfo(choice.dtype)
    choice = _without_nan(choice, finite.max if rule.side == "high" else finite.min)
    if mask is not None:
        # A selection bias could still lift a masked expert, so the mask holds after it, too.
        choice = mx.where(mask, mx.array(NEGATIVE_INFINITY, choice.dtype), choice)
    if rule.groups is not None:
        fill = rule.groups.fill
        if mask is not None and fill == NEGATIVE_INFINITY:
            # Dropped groups stay above masked experts where the kept groups hold fewer than k.
            fill = float(finite.min)
        choice, dropped = _drop_groups(choice, rule.groups, fill)
        if mask is not None:
            choice = mx.where(mask, mx.array(NEGATIVE_INFINITY, choice.dtype), choice)
        if rule.groups.zero_scores and dropped is not None:
            if force is not None:
                dropped = mx.logical_and(dropped, mx.logical_not(force))
            scores = mx.where(dropped, mx.array(0, scores.dtype), scores)
    if force is not None:
        choice = mx.where(force, mx.array(float("inf"), choice.dtype), choice)
    return choice, scores


def select(
    rule: Rule,
    scores: mx.array,
    k: int,
    *,
    mask: mx.array | None = None,
    force: mx.array | None = None,
) -> tuple[mx.array, mx.array]:
    """The ids [..., k] of the chosen experts, and the scores [..., E] their weights come from.

    The k best by [`selection_scores`][moe_lens.kernels.reference.selection_scores].
    """
    choice, scores = selection_scores(rule, scores, mask=mask, force=force)
    return mx.stop_gradient(_best(choice, k, rule.side)), scores


def route(
    rule: Rule,
    logits: mx.array,
    k: int,
    *,
    input_dtype: mx.Dtype | None = None,
    mask: mx.array | None = None,
    force: mx.array | None = None,
    bias: mx.array | None = None,
    scale: mx.array | None = None,
    ids: mx.array | None = None,
) -> tuple[mx.array, mx.array]:
    """Expert ids and expert weights of `logits` under `rule`.

    Args:
        rule: The block's rule.
        logits: [..., E] router logits, any float dtype.
        k: Experts per token.
        input_dtype: The dtype of the block's input, for rules that cast to it.
        mask: [E] bool; True bars an expert. At least `k` must stay.
        force: [E] bool; True puts an expert among the k in every token. At most `k`.
        bias: [E], added to the logits, so it changes selection and weights.
        scale: [E], times the final weight of an expert.
        ids: [..., k] ids to use in place of the selection; weights follow the rule.

    Returns:
        ids uint32 [..., k] and weights [..., k], in the slot order of the block itself (not
        sorted by weight).
    """
    logits = changed_logits(logits, bias)
    scores = expert_scores(rule, logits, mask)
    if ids is None:
        ids, scores = select(rule, scores, k, mask=mask, force=force)
    return ids, _weights(rule, scores, ids, logits.dtype, input_dtype, scale)


def _weights(
    rule: Rule,
    scores: mx.array,
    ids: mx.array,
    logits_dtype: mx.Dtype,
    input_dtype: mx.Dtype | None,
    scale: mx.array | None,
) -> mx.array:
    weights = mx.take_along_axis(scores, ids, axis=-1)
    if rule.score_chosen is not None:
        weights = _score(rule.score_chosen, weights)
    if rule.normalise != "no" and ids.shape[-1] >= rule.normalise_from_k:
        if rule.normalise == "l1":
            weights = weights / mx.linalg.norm(weights, ord=1, axis=-1, keepdims=True)
        else:
            total = mx.sum(weights, axis=-1, keepdims=True)
            if rule.normalise == "sum_floor":
                total = mx.maximum(total, rule.epsilon)
            elif rule.epsilon:
                total = total + rule.epsilon
            weights = weights / total
    if rule.scale is not None:
        weights = weights * rule.scale
    if rule.per_expert_scale is not None:
        weights = weights * rule.per_expert_scale[ids]
    if rule.cast == "logits":
        weights = weights.astype(logits_dtype)
    elif rule.cast == "input" and input_dtype is not None:
        weights = weights.astype(input_dtype)
    if scale is not None:
        weights = weights * scale[ids].astype(weights.dtype)
    return weights


def route_statistics(
    rule: Rule,
    logits: mx.array,
    ids: mx.array,
    *,
    mask: mx.array | None = None,
    force: mx.array | None = None,
    bias: mx.array | None = None,
) -> tuple[mx.array, mx.array, mx.array]:
    """How sure the router was when it chose `ids`: entropy, margin and mass, float32 [...].

    The router distribution p [E] is the scores' share of their sum, or the softmax of the scores
    where they are plain logits (Mixtral). Masked experts have p = 0.

    - *entropy*: ``-sum p ln p`` over all experts, in nats: 0 for one certain expert, ln E for none
      preferred.
    - *margin*: the lowest selection score among the chosen minus the highest among the others,
      that is between the k-th and the (k+1)-th; what the selection sees, so with selection bias,
      groups, mask (-inf) and force (+inf). 0 at a tie, infinite where no expert is left over,
      negative where given `ids` leave out a better one.
    - *mass*: the sum of p over the chosen, from 0 to 1.

    Args:
        rule: The block's rule.
        logits: [..., E] router logits.
        ids: [..., k] the chosen experts.
        mask: As in [`route`][moe_lens.kernels.route], like `force` and `bias`.
    """
    scores = expert_scores(rule, changed_logits(logits, bias), mask)
    choice, _ = selection_scores(rule, scores, mask=mask, force=force)
    scores = scores.astype(mx.float32)
    if rule.score == "identity":
        share = mx.softmax(scores, axis=-1)
    else:
        share = scores / scores.sum(axis=-1, keepdims=True)
    terms = mx.where(share > 0, share * mx.log(share), share)
    mass = mx.take_along_axis(share, ids, axis=-1).sum(axis=-1)
    return -terms.sum(axis=-1), _margin(choice.astype(mx.float32), ids, rule.side), mass


def _margin(choice: mx.array, ids: mx.array, side: Side) -> mx.array:
    """From the selection scores [..., E], in the order of `side`."""
    experts, k = choice.shape[-1], ids.shape[-1]
    if k == experts:
        return mx.full(choice.shape[:-1], float("inf"))
    order = mx.argsort(-choice, axis=-1)
    if side == "high":
        order = mx.argsort(choice, axis=-1)[..., ::-1]
    place = mx.argsort(order, axis=-1)
    last_chosen = mx.take_along_axis(place, ids, axis=-1).max(axis=-1, keepdims=True)
    left_out = mx.put_along_axis(place, ids, mx.array(experts, place.dtype), axis=-1)
    first_left_out = left_out.min(axis=-1, keepdims=True)
    ordered = mx.take_along_axis(choice, order, axis=-1)
    low = mx.take_along_axis(ordered, last_chosen, axis=-1)
    high = mx.take_along_axis(ordered, first_left_out, axis=-1)
    return mx.where(low == high, 0.0, low - high).squeeze(-1)
