"""Which numbers of experts, and of experts per token, the stock loader and the router take.

Measured on mlx-lm 0.32: it takes one number of experts for all layers; a group-limited router
needs equal groups of neighbours, two experts in each where a group is scored by its two best;
hunyuan and jamba build a dense layer when there is one expert; no router can choose more experts
than its allowed groups hold.
"""

from __future__ import annotations

from dataclasses import dataclass

from moe_lens.errors import UsageError

from .identity import ModelIdentity

DENSE_WITH_ONE_EXPERT = frozenset({"hunyuan", "jamba"})


@dataclass(frozen=True)
class Limits:
    """What a smaller version of a model may look like."""

    model: ModelIdentity

    @property
    def smallest_group(self) -> int:
        """The fewest experts one router group may keep, for the smallest k this block can run."""
        model = self.model
        fewest = 2 if model.group_score == "top2" and model.group_count > 1 else 1
        if model.family in DENSE_WITH_ONE_EXPERT:
            fewest = max(fewest, 2)
        return max(fewest, -(-model.smallest_k // model.group_keep))

    def largest_k(self, num_experts: int) -> int:
        """The most experts a token can use when `num_experts` stay in each layer.

        Identity experts stay, so they can fill slots too; a token must still find its k among
        the groups its router allows.
        """
        model = self.model
        if model.group_count > 1:
            return num_experts // model.group_count * model.group_keep
        return num_experts + model.router_width - model.num_experts

    def group_for(self, k: int) -> int:
        """The fewest experts of a router group with which `k` per token are possible."""
        model = self.model
        if model.group_count > 1:
            return max(self.smallest_group, -(-k // model.group_keep))
        return max(self.smallest_group, k - (model.router_width - model.num_experts))

    def check_k(self, k: int, num_experts: int, who: str = "a layer") -> None:
        """Raise UsageError unless `who` can use `k` experts per token of `num_experts` left."""
        if k < self.model.smallest_k:
            raise UsageError(
                f"{self.model.model_type} cannot run with {k} experts per token; "
                f"give at least {self.model.smallest_k}"
            )
        if k > self.largest_k(num_experts):
            raise UsageError(
                f"{who} would keep {num_experts} of its experts, of which a token could use at "
                f"most {self.largest_k(num_experts)}, but {k} are used per token; remove fewer "
                "experts or ask for fewer experts per token"
            )
