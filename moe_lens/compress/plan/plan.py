"""The plan of a smaller model: what happens to every expert, layer by layer, as plain values.

A plan is made from a calibration, can be read, edited and stored as JSON, and gives the same bytes
whenever it is applied to the same checkpoint.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Literal

from .identity import CorpusIdentity, ModelIdentity
from .json_text import dump
from .ranges import write_ranges
from .router_row import RouterRow

FORMAT = "moe-lens plan"
VERSION = 1

Kind = Literal["merge", "prune", "channels"]


@dataclass(frozen=True)
class ExpertGroup:
    """The old experts that become one new expert, and the share of each in it.

    A single member is an expert that stays as it is, byte for byte. The evidence is that of the
    least similar pair of the group; None where there is no pair or nothing was measured.
    """

    experts: tuple[int, ...]
    weights: tuple[float, ...]
    similarity: float | None = None
    output_similarity: float | None = None
    activation_overlap: float | None = None
    orders: tuple[tuple[int, ...] | None, ...] | None = None
    """For every member: which of its channels goes where, before the mean; None: as they stand."""
    router_row: RouterRow | int | None = None
    """What answers for the group in the router: a row of its own, that of a member (its id), or,
    with None, the mean of the members' rows with `weights`."""

    @classmethod
    def single(cls, expert: int) -> ExpertGroup:
        """An expert that is kept."""
        return cls((expert,), (1.0,))

    @property
    def merged(self) -> bool:
        """Whether this new expert is made of more than one old one."""
        return len(self.experts) > 1

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; the evidence only where there is some."""
        plain: dict[str, Any] = {"experts": list(self.experts)}
        if self.merged:
            plain["weights"] = list(self.weights)
        for name in ("similarity", "output_similarity", "activation_overlap"):
            value = getattr(self, name)
            if value is not None:
                plain[name] = value
        if self.orders is not None:
            plain["orders"] = [each and write_ranges(each) for each in self.orders]
        if self.router_row is not None:
            row = self.router_row
            plain["router_row"] = row if isinstance(row, int) else row.to_dict()
        return plain


@dataclass(frozen=True)
class LayerPlan:
    """One layer: new expert n is made of ``groups[n]``; `removed` experts are left out.

    `groups_reached` is the number of groups this layer alone would have at the threshold (merge);
    `saliency` holds the value every old expert was judged by, None where unknown (prune).
    `channels[n]` are the channels that new expert n keeps, ascending; None: all.
    """

    layer: int
    groups: tuple[ExpertGroup, ...]
    removed: tuple[int, ...] = ()
    groups_reached: int | None = None
    saliency: tuple[float | None, ...] | None = None
    channels: tuple[tuple[int, ...], ...] | None = None

    @property
    def merges(self) -> int:
        """How many experts disappear by merging."""
        return sum(len(group.experts) - 1 for group in self.groups)

    @property
    def changes_experts(self) -> bool:
        """Whether an expert gets weights that none of the parent's has."""
        return self.channels is not None or any(group.merged for group in self.groups)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        plain: dict[str, Any] = {"layer": self.layer}
        if self.groups_reached is not None:
            plain["groups_reached"] = self.groups_reached
        plain["groups"] = [group.to_dict() for group in self.groups]
        plain["removed"] = list(self.removed)
        if self.saliency is not None:
            plain["saliency"] = list(self.saliency)
        if self.channels is not None:
            plain["channels"] = [write_ranges(kept) for kept in self.channels]
        return plain


@dataclass(frozen=True)
class Plan:
    """What a smaller model is made of.

    `num_experts` and `experts_per_token` are those of the smaller model, the same in all layers,
    since stock mlx-lm takes one number; `per_layer` says that it is not so, and `num_experts` the
    most of any layer. `settings` are what was asked for, `evidence` is what was
    found on the way (for example how similar experts are at best, or the loss with either number
    of experts per token); neither changes what applying the plan does.
    """

    kind: Kind
    model: ModelIdentity
    corpus: CorpusIdentity
    num_experts: int
    experts_per_token: int
    layers: tuple[LayerPlan, ...]
    settings: dict[str, Any] = field(default_factory=dict)
    evidence: dict[str, Any] = field(default_factory=dict)
    expert_width: int | None = None
    """Channels in each expert of the smaller model; None: as many as in the parent."""
    per_layer: bool = False
    """Whether layers keep different numbers of experts, for which mlx-lm must be allowed to run
    the model file that is written with the checkpoint."""

    @property
    def definition(self) -> str:
        """What the numbers in this plan mean."""
        from moe_lens.compress.merging.merging import merge_definition
        from moe_lens.compress.pruning.channels import IMPORTANCE
        from moe_lens.compress.statistics.saliency import DEFINITIONS

        if self.kind == "merge":
            return merge_definition(self.settings)
        if self.kind == "channels":
            return IMPORTANCE
        experts = DEFINITIONS.get(str(self.settings.get("method")), "")
        return experts if self.expert_width is None else f"{experts}; {IMPORTANCE}"

    @property
    def changes_experts(self) -> bool:
        """Whether an expert gets weights that none of the parent's has."""
        return any(layer.changes_experts for layer in self.layers)

    @property
    def counts(self) -> dict[int, int]:
        """By layer, how many experts it keeps."""
        return {layer.layer: len(layer.groups) for layer in self.layers}

    @property
    def share_removed(self) -> float:
        """Experts that disappear, merged or removed, as a share of all experts of all layers."""
        return 1 - sum(self.counts.values()) / (self.model.num_experts * len(self.layers))

    @property
    def experts_text(self) -> str:
        """How many experts a layer keeps: a number, or the fewest and the most."""
        fewest = min(self.counts.values())
        return f"{fewest} to {self.num_experts}" if self.per_layer else str(self.num_experts)

    def layer(self, index: int) -> LayerPlan | None:
        """The plan of the layer with this index in the model, or None."""
        return next((layer for layer in self.layers if layer.layer == index), None)

    def with_experts_per_token(self, k: int, **evidence: Any) -> Plan:
        """The same plan with another number of experts per token."""
        return replace(self, experts_per_token=k, evidence={**self.evidence, **evidence})

    def summary(self) -> str:
        """One line for people."""
        before, after = self.model.num_experts, self.experts_text
        how = "merged" if self.kind == "merge" else "removed"
        parts = []
        if self.kind != "channels":
            parts.append(
                f"{before} -> {after} experts in each of {len(self.layers)} layers "
                f"({self.share_removed:.0%} {how})"
            )
        if self.expert_width is not None:
            old = self.model.expert_width
            where = f" of {len(self.layers)} layers" if self.kind == "channels" else ""
            parts.append(
                f"{old} -> {self.expert_width} channels in each expert{where} "
                f"({1 - self.expert_width / old:.0%} removed)"
            )
        parts.append(
            f"{self.model.experts_per_token} -> {self.experts_per_token} experts per token"
        )
        return ", ".join(parts)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON, in reading order."""
        return {
            "format": FORMAT,
            "version": VERSION,
            "kind": self.kind,
            "summary": self.summary(),
            "definition": self.definition,
            "model": self.model.to_dict(),
            "corpus": self.corpus.to_dict(),
            "settings": self.settings,
            "evidence": self.evidence,
            "num_experts": self.num_experts,
            "experts_per_token": self.experts_per_token,
            **({"per_layer": True} if self.per_layer else {}),
            **({} if self.expert_width is None else {"expert_width": self.expert_width}),
            "layers": [layer.to_dict() for layer in self.layers],
        }

    def to_json(self) -> str:
        """JSON that a person can read and edit; `read_plan` checks it on the way back."""
        return dump(self.to_dict())

    def _repr_html_(self) -> str:
        from moe_lens.compress.report.report import plan_html

        return plan_html(self)
