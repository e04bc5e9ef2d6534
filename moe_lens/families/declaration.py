"""What a family declares about one block class of mlx-lm: where the seams are, and which rule."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import mlx.core as mx
import mlx.nn as nn

from moe_lens.kernels import Groups, Rule

if TYPE_CHECKING:
    from .seams import Attachment

VALUES = (
    "router_logits",
    "expert_ids",
    "expert_weights",
    "expert_outputs",
    "routed_output",
    "shared_output",
    "expert_inputs",
)
"""The values of a block: the six of the public vocabulary, and what the experts read."""

OVERRIDES = ("k", "mask", "force", "bias", "scale", "ids")

Seam = Literal["inline", "router", "special"]


def attribute(owner: Any, path: str) -> Any:
    """The attribute of `owner` at a dotted `path`; ``"."`` is `owner` itself."""
    if path == ".":
        return owner
    for name in path.split("."):
        owner = getattr(owner, name)
    return owner


@dataclass(frozen=True)
class Block:
    """One block class of mlx-lm, and how its routing is seen and changed.

    Paths are dotted attributes of the block. Everything is read from the live module, so a
    quantised or pruned model is described as truly as the original.
    """

    model_type: str
    """The module of ``mlx_lm.models`` that defines the class."""
    name: str
    """The class that holds router and experts."""
    rule: Callable[[Any], Rule]
    logits: str
    """The module that makes the router logits: a Linear, or the holder of a raw `weight`."""
    k: str
    """The attribute that holds the experts per token when the model runs."""
    experts: str = "switch_mlp"
    seam: Seam = "inline"
    """``inline``: the gate is a Linear and the block routes by itself; ``router``: a module
    returns (ids, weights); ``special``: `attach` does all."""
    router: str = ""
    """The module that returns (ids, weights), for the ``router`` seam."""
    raw: bool = False
    """The logits are ``x @ weight.T`` of a module that is no Linear."""
    float32_logits: bool = False
    """The logits are computed in float32."""
    router_input: Callable[[Any, mx.array], mx.array] | None = None
    """What the router does to its input before the projection."""
    selection_bias: str | None = None
    per_expert_scale: str | None = None
    shared: str | None = None
    """The module of the shared expert; its output is captured before any gate or scale."""
    routed: str | None = None
    """A module whose output is the routed output; None: the block sums its experts itself."""
    zero_experts: Callable[[Any], int] | None = None
    """How many identity experts follow the real ones in the router."""
    smallest_k: int = 1
    """The smallest k the block's own combination survives; slots of weight 0 fill it up."""
    written: tuple[str, ...] = ()
    """Modules that the routed output passes, in order, before it is added to the residual stream,
    where there are any: norms after the block, projections out of a latent width. A path may be
    absent from a model."""
    not_written: str = ""
    """Why it cannot be told what the routed output adds to the stream; empty: it can."""
    weights_on_input: bool = False
    """The weights multiply the experts' input (Llama 4), so outputs already carry them."""
    attach: Callable[[Attachment], None] | None = None
    route: Callable[..., tuple[mx.array, mx.array]] | None = None
    """In place of the reference, for a router that no rule describes (sparsemixer)."""
    also: tuple[str, ...] = ()
    """Other model types of mlx-lm whose models are made of this block."""
    experts_key: str = "num_experts"
    """The key of config.json that holds the number of routed experts."""
    k_key: str = "num_experts_per_tok"
    without: Mapping[str, str] = field(default_factory=dict)
    """Values or overrides the block cannot give, each with the reason."""
    note: str = ""

    @property
    def model_types(self) -> tuple[str, ...]:
        return (self.model_type, *self.also)


def top2_groups(gate: Any, *, fill: float = 0.0) -> Groups | None:
    """Groups scored by their two best experts, from `n_group` and `topk_group` of `gate`."""
    if gate.n_group <= 1:
        return None
    return Groups(gate.n_group, gate.topk_group, "top2", fill)


def parameter(module: nn.Module, path: str) -> mx.array | None:
    """The parameter of `module` at a dotted `path`, or None where the model has none."""
    *parents, leaf = path.split(".")
    for name in parents:
        module = getattr(module, name)
    found = module.get(leaf) if isinstance(module, nn.Module) else None
    return found if isinstance(found, mx.array) else None
