"""Routing maths: the rule of a router as data, the reference that applies it, the fused kernel.

Installed as ``moe_lens.kernels``.

- [`Rule`][moe_lens.kernels.Rule] and [`Groups`][moe_lens.kernels.Groups] say how one block
  turns router logits into expert ids and expert weights.
- [`route`][moe_lens.kernels.route] applies a rule in plain MLX operations, with the changes
  an override asks for. It is the specification: in the absence of a change it gives, bit for
  bit, what the model's own block computes.
- [`route_statistics`][moe_lens.kernels.route_statistics] says how sure a router was.
- [`fused_route`][moe_lens.kernels.fused_route] does all of it in one launch on a GPU, and
  [`Kernel`][moe_lens.kernels.Kernel] decides whether that or the reference runs. Nothing is
  compiled before it is used.
- [`route_sums`][moe_lens.kernels.route_sums] counts what many tokens were routed to.
"""

from .choice import Kernel, KernelUnavailableError, kernel_mode, reference_routed
from .fused import Routed, fused_route, unsupported
from .lazy_statistics import LazyRouteSums, lazy_route_sums
from .reference import expert_scores, route, route_statistics, select
from .rule import Groups, Rule, Score
from .statistics import (
    NO_EXPERT,
    RouteSums,
    coactivation,
    expert_counts,
    route_sums,
    transitions,
    weight_sums,
)

__all__ = [
    "NO_EXPERT",
    "Groups",
    "Kernel",
    "KernelUnavailableError",
    "LazyRouteSums",
    "RouteSums",
    "Routed",
    "Rule",
    "Score",
    "coactivation",
    "expert_counts",
    "expert_scores",
    "fused_route",
    "kernel_mode",
    "lazy_route_sums",
    "reference_routed",
    "route",
    "route_statistics",
    "route_sums",
    "select",
    "transitions",
    "unsupported",
    "weight_sums",
]
