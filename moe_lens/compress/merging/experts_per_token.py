"""How many experts per token the merged model should use: measured, not guessed.

Where merged partners used to be chosen together, k slots reach fewer than k different groups. With
k kept, the freed slots go to experts the parent would not have chosen; with fewer slots some
tokens lose an expert. Which costs less depends on the model, so both are run on calibration text.

The smaller KL divergence from the parent decides. The difference of two mean next-token losses
says the same in expectation, but with the noise of the text in it: on a random model, whose losses
are all alike, KL still tells 0.0001 from 0.002.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from moe_lens.compress.checkpoint.in_memory import in_memory
from moe_lens.compress.plan.limits import Limits
from moe_lens.compress.plan.plan import LayerPlan, Plan
from moe_lens.compress.statistics.statistics import NOT_AN_EXPERT, Calibration, LayerStatistics
from moe_lens.compress.tensors.unpacked import run_fastest
from moe_lens.compress.verification.losses import Comparison, compare, with_k
from moe_lens.corpus.batches import draw_prompts
from moe_lens.telling import Progress

if TYPE_CHECKING:
    from moe_lens.router import ExpertRouter


TOKENS = 4096
"""Calibration tokens the candidates are compared on."""


def candidates(calibration: Calibration, plan: Plan) -> tuple[tuple[int, ...], float]:
    """Numbers of experts per token worth measuring after a merge, and why.

    Where merged partners are mostly chosen together, a token reaches fewer different groups than
    it has slots; filling the free slots with other experts changes what the block computes.

    Returns:
        The candidates (the parent's k where it is possible, and the rounded mean number of
        different groups that a token's k experts fall into), most first; and that mean.
    """
    limits = Limits(plan.model)
    per_layer = [_distinct_groups(calibration.layer(layer.layer), layer) for layer in plan.layers]
    mean = float(np.mean([value for value in per_layer if not math.isnan(value)] or [math.nan]))
    most = limits.largest_k(min(plan.counts.values()))
    found = {min(plan.model.experts_per_token, most)}
    if not math.isnan(mean):
        found.add(min(max(round(mean), plan.model.smallest_k, 1), most))
    return tuple(sorted(found, reverse=True)), mean


def _distinct_groups(statistics: LayerStatistics, layer: LayerPlan) -> float:
    """Mean number of different groups among the experts of a sampled token."""
    group_of = np.full(NOT_AN_EXPERT + 1, -1)
    for number, group in enumerate(layer.groups):
        group_of[list(group.experts)] = number
    ids = np.sort(group_of[statistics.sampled_ids], axis=1)
    if not len(ids):
        return math.nan
    # An identity expert (-1) is never merged: each of its slots counts as its own.
    fresh = np.concatenate([np.ones((len(ids), 1), bool), np.diff(ids, axis=1) != 0], axis=1)
    return float((fresh | (ids < 0)).sum(axis=1).mean())


def choose_experts_per_token(
    router: ExpertRouter,
    calibration: Calibration,
    plan: Plan,
    tokens: Sequence[Sequence[int]],
    *,
    trust_remote_code: bool = False,
    seed: int = 0,
    progress: Progress | None = None,
) -> Plan:
    """The plan with the number of experts per token that stays closest to the parent.

    The smaller model is built in memory by stock mlx-lm for this; nothing is written.

    Args:
        router: The parent, as it runs.
        calibration: Its statistics.
        plan: A merge.
        tokens: The calibration text; at most `TOKENS` tokens of it are used, whole prompts drawn
            with `seed`.
        progress: Called with tokens done and in all.
    """
    ks, distinct = candidates(calibration, plan)
    if len(ks) == 1:
        return plan.with_experts_per_token(ks[0])
    drawn = draw_prompts(tokens, TOKENS, seed)
    smaller = in_memory(
        router, plan.with_experts_per_token(ks[0]), trust_remote_code=trust_remote_code
    )
    run_fastest(smaller, router.cpu_experts)
    compared = compare(
        router.forwards,
        [with_k(smaller, k) for k in ks],
        drawn,
        router.vocabulary,
        progress,
        wave_tokens=router.wave_tokens,
    )
    found = dict(zip(ks, compared, strict=True))
    best = min(ks, key=lambda k: (float(found[k].kl.mean()), k))
    evidence = _evidence(best, distinct, found, plan)
    return plan.with_experts_per_token(best, experts_per_token=evidence)


def _evidence(
    best: int, distinct: float, found: dict[int, Comparison], plan: Plan
) -> dict[str, Any]:
    """What was measured, as plain values and as a sentence."""
    first = next(iter(found.values()))
    kl = {str(k): float(f"{each.kl.mean():.6g}") for k, each in found.items()}
    nll = {str(k): round(float(each.nll_after.mean()), 6) for k, each in found.items()}
    parent_nll = round(float(first.nll_before.mean()), 6)
    tried = "; ".join(f"{k} experts per token: loss {nll[k]:.4f}, KL {kl[k]:.3g}" for k in kl)
    return {
        "distinct_groups_per_token": round(distinct, 4),
        "kl_by_k": kl,
        "nll_by_k": nll,
        "parent_nll": parent_nll,
        "tokens": len(first.kl),
        "text": (
            f"The {plan.model.experts_per_token} experts of a token fall into {distinct:.2f} "
            f"different groups on average. Measured on {len(first.kl)} calibration tokens, in nats "
            f"per token (the parent's loss is {parent_nll:.4f}): {tried}. {best} is used, which "
            "has the smaller KL divergence from the parent."
        ),
    }
