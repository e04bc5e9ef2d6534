"""How small a model is asked to be, in bytes of its weight files."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from moe_lens.compress.plan.identity import ModelIdentity
from moe_lens.compress.plan.limits import Limits
from moe_lens.compress.pruning.pruning import removed_per_group
from moe_lens.compress.tensors.size_table import Shape, SizeTable
from moe_lens.errors import UsageError

SLACK = 0.001
"""A size that is said by experts is no exact number of bytes: a model with fewer channels may take
this share of the parent more. It has more router rows, which are that small."""


@dataclass(frozen=True)
class AskedSize:
    """One of three ways to say how small.

    Raises:
        UsageError: Not exactly one is given, or it is out of range.
    """

    ratio: float | None = None
    """This share of the experts less, or as many bytes."""
    experts: int | None = None
    """So many experts in each layer, or as many bytes."""
    target_gb: float | None = None
    """All weight files together take at most so many GB (10^9 bytes)."""

    def __post_init__(self) -> None:
        given = [each for each in (self.ratio, self.experts, self.target_gb) if each is not None]
        if len(given) != 1:
            raise UsageError(
                "say in one way how small the model shall be: a ratio of the experts to remove "
                "(--ratio 0.25), the experts to keep (--experts 96) or gigabytes (--target-gb 20)"
            )
        if self.ratio is not None and not 0.0 < self.ratio < 1.0:
            raise UsageError(f"the ratio is {self.ratio:g}; it must lie between 0 and 1")
        if self.experts is not None and self.experts < 1:
            raise UsageError(f"{self.experts} experts cannot be kept; give at least 1")
        size = self.target_gb
        if size is not None and not (math.isfinite(size) and size > 0):
            raise UsageError(f"the target size is {size:g} GB; it must be above 0")

    def limit(self, table: SizeTable, model: ModelIdentity, shapes: Sequence[Shape]) -> int:
        """Bytes of the weight files that the smaller model may take.

        Args:
            table: Of the parent.
            model: The parent.
            shapes: What smaller models are possible.

        Raises:
            UsageError: So small a model is not possible (the message names the smallest), or the
                parent is as small already.
        """
        if self.target_gb is None:
            return self._bytes_of_count(table, model)
        limit = int(self.target_gb * 1e9)
        if limit >= table.bytes(table.full):
            raise UsageError(
                f"the model takes {table.bytes(table.full) / 1e9:.4g} GB, which is no more than "
                f"the target of {self.target_gb:g} GB; nothing has to go"
            )
        if not any(table.bytes(shape) <= limit for shape in shapes):
            raise table.too_small(limit, shapes)
        return limit

    def most_experts(self, table: SizeTable, model: ModelIdentity, width: int, k: int) -> int:
        """The most experts of `width` channels, `k` of them for each token, in the size asked for.

        Raises:
            UsageError: Not even the fewest possible fit; the message names their size.
        """
        least = Limits(model).group_for(k) * model.group_count
        counts = range(least, model.num_experts, model.group_count)
        shapes = [Shape(count, width) for count in counts]
        limit = self.limit(table, model, shapes)
        found = table.most_experts(limit, width, counts)
        if found is None:
            raise table.too_small(limit, shapes)
        return found

    def widest(self, table: SizeTable, model: ModelIdentity, possible: Sequence[int]) -> int:
        """The most channels of all experts, out of the `possible` widths, in the size asked for.

        Raises:
            UsageError: Not even the narrowest fit (the message names their size), or none can be.
        """
        if not possible:
            raise UsageError(
                "no smaller width of the experts can be stored; name another method (--method reap)"
            )
        shapes = [Shape(model.num_experts, width) for width in possible]
        limit = self.limit(table, model, shapes)
        found = table.widest(limit, model.num_experts, possible)
        if found is None:
            raise table.too_small(limit, shapes)
        return found

    def _bytes_of_count(self, table: SizeTable, model: ModelIdentity) -> int:
        fewer = removed_per_group(model, self.ratio, self.experts)
        count = model.num_experts - fewer * model.group_count
        smallest = Limits(model).smallest_group * model.group_count
        if count < smallest:
            raise UsageError(
                f"{count} experts cannot be kept; {model.model_type} needs at least {smallest}"
            )
        slack = int(SLACK * table.bytes(table.full))
        return table.bytes(Shape(count, table.full.expert_width)) + slack

    def to_dict(self) -> dict[str, Any]:
        """Plain values for a plan."""
        return {name: value for name, value in vars(self).items() if value is not None}
