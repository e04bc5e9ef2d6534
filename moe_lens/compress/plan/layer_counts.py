"""How many experts each layer of a plan keeps, checked against what loaders and routers take."""

from __future__ import annotations

from moe_lens.errors import UsageError

from .limits import Limits
from .plan import LayerPlan, Plan


def check_equal(layer: LayerPlan, plan: Plan) -> None:
    """Raise UsageError where a layer keeps another number than the rest and may not."""
    if plan.per_layer or len(layer.groups) == plan.num_experts:
        return
    raise UsageError(
        f"layer {layer.layer} of the plan keeps {len(layer.groups)} experts, but "
        f'"num_experts" is {plan.num_experts}: stock mlx-lm takes one number of experts for all '
        'layers; with "per_layer": true layers may differ, and loading needs trust_remote_code'
    )


def check_counts(plan: Plan) -> None:
    """Raise UsageError unless every layer keeps enough experts, and `num_experts` is the most."""
    model, limits = plan.model, Limits(plan.model)
    if plan.per_layer:
        _check_per_layer(plan)
    least = limits.smallest_group * model.group_count
    for layer, count in plan.counts.items():
        if count < least:
            who = f"layer {layer} of the plan" if plan.per_layer else "the plan"
            raise UsageError(
                f"{who} keeps {count} experts; {model.model_type} needs at least {least}"
            )
        who = f"layer {layer}" if plan.per_layer else "a layer"
        limits.check_k(plan.experts_per_token, count, who)


def _check_per_layer(plan: Plan) -> None:
    counts = plan.counts
    layer, most = max(counts.items(), key=lambda each: each[1])
    if most != plan.num_experts:
        raise UsageError(
            f"layer {layer} of the plan keeps {most} experts, the most of all, but "
            f'"num_experts" is {plan.num_experts}; it must be the most'
        )
    if len(set(counts.values())) == 1:
        raise UsageError(
            f'all layers of the plan keep {most} experts: take "per_layer" out, so that stock '
            "mlx-lm loads the result"
        )
