"""The fused kernel: a rule, an override and its statistics in one launch, built when first used."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, cast

import mlx.core as mx

from .body import BODY, INPUTS, OUTPUTS, Language, header
from .identity_cache import IdentityCache
from .parameters import (
    DTYPES,
    Changes,
    Parameters,
    computes_scores,
    parameters,
    scores_are_exact,
)
from .reference import changed_logits, expert_scores
from .rule import Rule

KernelFactory = Callable[..., Callable[..., Any]]
"""`mx.fast.metal_kernel` or `mx.fast.cuda_kernel`, or what stands in for them."""

MOST_EXPERTS = 1024
MOST_CHOSEN = 32
MOST_GROUPS = 32
LANES = 32
_GROUPS_OF_LANES = 4
"""SIMD groups, so tokens, of one threadgroup."""


@dataclass(frozen=True)
class Routed:
    """What a router decided for each token, slots by falling weight.

    Slots of equal weight stand by rising id; a weight that is NaN comes last. The statistics are
    those of [`route_statistics`][moe_lens.kernels.route_statistics].

    Attributes:
        ids: [..., k] uint32.
        weights: [..., k], in the dtype of the rule.
        entropy: [...] float32, of the router distribution over all experts, in nats.
        margin: [...] float32, between the k-th and the (k+1)-th selection score.
        mass: [...] float32, the share of the router distribution that the chosen hold.
    """

    ids: mx.array
    weights: mx.array
    entropy: mx.array
    margin: mx.array
    mass: mx.array


def unsupported(rule: Rule, num_experts: int, k: int, dtype: mx.Dtype) -> str | None:
    """Why the kernel cannot route by `rule`, or None where it can.

    Args:
        num_experts: The width of the router.
        k: Experts per token.
        dtype: The dtype of the router logits.
    """
    return _reasons.get(
        (rule,), (num_experts, k, dtype), lambda: _unsupported(rule, num_experts, k, dtype)
    )


_reasons: IdentityCache[str | None] = IdentityCache()


def _unsupported(rule: Rule, num_experts: int, k: int, dtype: mx.Dtype) -> str | None:
    arrays = {
        "selection bias": rule.selection_bias,
        "per-expert scale": rule.per_expert_scale,
    }
    groups = rule.groups
    reasons = [
        (dtype not in DTYPES, f"logits of {dtype} (it takes float32, float16 and bfloat16)"),
        (num_experts > MOST_EXPERTS, f"{num_experts} experts (at most {MOST_EXPERTS})"),
        (not 1 <= k <= MOST_CHOSEN, f"{k} experts per token (1 to {MOST_CHOSEN})"),
        (k > num_experts, f"{k} experts per token out of {num_experts}"),
    ]
    for name, array in arrays.items():
        reasons.append(
            (
                array is not None and (array.dtype not in DTYPES or array.shape != (num_experts,)),
                f"a {name} that is not [{num_experts}] in float32, float16 or bfloat16",
            )
        )
    if groups is not None:
        size, left_over = divmod(num_experts, max(1, groups.count))
        reasons += [
            (not 1 <= groups.count <= MOST_GROUPS, f"{groups.count} groups (1 to {MOST_GROUPS})"),
            (left_over != 0, f"{groups.count} groups of unequal size"),
            (groups.score == "top2" and size < 2, "groups of one expert scored by their two best"),
        ]
    found = next((reason for holds, reason in reasons if holds), None)
    return None if found is None else f"the routing kernel does not take {found}"


def slots(num_experts: int) -> int:
    """Experts of one lane: a power of two, so that few programs serve all models."""
    return 1 << max(0, math.ceil(num_experts / LANES) - 1).bit_length()


def default_factory(language: Language) -> KernelFactory:
    """MLX's own factory for `language`."""
    factory: Any = mx.fast.metal_kernel if language == "metal" else mx.fast.cuda_kernel
    return cast("KernelFactory", factory)


@lru_cache(maxsize=8)
def _kernel(factory: KernelFactory, language: Language) -> Callable[..., list[mx.array]]:
    return factory(
        f"moe_lens_route_{language}",
        list(INPUTS),
        list(OUTPUTS),
        BODY,
        header=header(language),
    )


@lru_cache(maxsize=1)
def _no_ids() -> mx.array:
    # Of values, not mx.zeros, which would be a launch of its own until it is evaluated.
    return mx.array([0] * 8, mx.uint32)


def fused_route(
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
    factory: KernelFactory | None = None,
    language: Language = "metal",
    one_launch: bool = False,
) -> Routed:
    """What [`route`][moe_lens.kernels.route] gives, sorted, and its statistics, by one kernel.

    Scores that are more than the logits are computed by MLX's own operations and fed in, so the
    ids agree with the reference bit for bit. Nothing is evaluated here and, as the kernel has no
    gradient, none flows.

    Args:
        rule: The block's rule.
        logits: [..., E] router logits in float32, float16 or bfloat16.
        k: Experts per token, 1 to 32.
        input_dtype: The dtype of the block's input, for rules that cast to it.
        mask: [E] bool; True bars an expert.
        force: [E] bool; True puts an expert among the k in every token.
        bias: [E], added to the logits.
        scale: [E], times the final weight of an expert.
        ids: [..., k] ids in place of the selection, each below E.
        factory: Makes the kernel; None: MLX's own for `language`.
        language: The language of the kernel.
        one_launch: Compute the scores in the kernel, too. It rounds as the formula says, not as
            MLX's operation does, so where two selection scores lie within a rounding of each
            other, another expert may be chosen.

    Raises:
        ValueError: If the kernel does not take this rule, shape or dtype; it says why.
    """
    experts = logits.shape[-1]
    reason = unsupported(rule, experts, k, logits.dtype)
    if reason is not None:
        raise ValueError(f"{reason}: use the reference, moe_lens.kernels.route")
    changes = Changes(mask, force, bias, scale, ids)
    in_kernel = scores_are_exact(rule) or (one_launch and computes_scores(rule, logits.dtype))
    given = parameters(
        rule,
        changes,
        experts,
        logits.dtype,
        input_dtype,
        given_scores=not in_kernel,
        rounds_sums=language == "metal" and mx.default_device() == mx.gpu,
    )
    shape = logits.shape[:-1]
    if math.prod(shape) == 0:
        return _nothing(shape, k, given.dtypes.weight)
    scores = logits if in_kernel else _scores(rule, logits, changes)
    return _call(rule, scores, k, ids, given, factory or default_factory(language), language)


def _scores(rule: Rule, logits: mx.array, changes: Changes) -> mx.array:
    """The scores [..., E] by MLX's operations.

    Only a softmax needs the mask here: elsewhere a masked expert changes no other score, and the
    kernel puts in what the score of a logit of -inf is.
    """
    mask = changes.mask if rule.score.startswith("softmax") else None
    return expert_scores(rule, changed_logits(logits, changes.bias), mask)


def _call(
    rule: Rule,
    scores: mx.array,
    k: int,
    ids: mx.array | None,
    given: Parameters,
    factory: KernelFactory,
    language: Language,
) -> Routed:
    *shape, experts = scores.shape
    tokens = math.prod(shape)
    weight = given.dtypes.weight
    outputs = _kernel(factory, language)(
        inputs=[
            scores.reshape(tokens, experts),
            given.per_expert,
            _no_ids() if ids is None else ids.astype(mx.uint32).reshape(tokens, k),
            given.call(tokens, k, rule.normalise_from_k),
            given.real,
        ],
        template=[("T", scores.dtype), ("W", weight), ("SLOTS", slots(experts))],
        grid=(LANES, tokens, 1),
        threadgroup=(LANES, _GROUPS_OF_LANES, 1),
        output_shapes=[(tokens, k), (tokens, k), (tokens,), (tokens,), (tokens,)],
        output_dtypes=[mx.uint32, weight, mx.float32, mx.float32, mx.float32],
    )
    chosen, weights, entropy, margin, mass = outputs
    return Routed(
        chosen.reshape(*shape, k),
        weights.reshape(*shape, k),
        entropy.reshape(shape),
        margin.reshape(shape),
        mass.reshape(shape),
    )


def _nothing(shape: tuple[int, ...], k: int, weight: mx.Dtype) -> Routed:
    none = mx.zeros(shape, mx.float32)
    return Routed(mx.zeros((*shape, k), mx.uint32), mx.zeros((*shape, k), weight), none, none, none)
