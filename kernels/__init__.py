"""Routing maths: the rule of a router as data, and the reference that applies it.

Installed as ``moe_lens.kernels``.

- [`Rule`][moe_lens.kernels.Rule] and [`Groups`][moe_lens.kernels.Groups] say how one block
  turns router logits into expert ids and expert weights.
- [`route`][moe_lens.kernels.route] applies a rule in plain MLX operations, with the changes
  an override asks for. It is the specification: in the absence of a change it gives, bit for
  bit, what the model's own block computes.
"""

from .reference import expert_scores, route, select
from .rule import Groups, Rule, Score

__all__ = ["Groups", "Rule", "Score", "expert_scores", "route", "select"]
