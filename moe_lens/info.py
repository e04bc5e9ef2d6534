"""What a model is: its layers, experts, rule and sizes, read from the loaded modules."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from .families import VALUES, MoELayer


@dataclass(frozen=True)
class ModelInfo:
    """A MoE model in numbers.

    Attributes:
        num_layers: All layers, dense ones too.
        moe_layers: Indices of the layers with routed experts.
        num_experts: Routed experts of a layer (the most, where layers differ).
        router_width: Router logits of a layer: experts and zero experts.
        experts_per_token: k, as the model runs.
        expert_width: Inner width of one expert.
        rule: How the router chooses, in one line.
        values: The values a capture can give.
        missing: What this model cannot give or take, with the reason.
        parameters: Weights of the model, counted unquantised.
        active_parameters: Weights one token uses: all but the experts it is not routed to.
        expert_parameters: Weights of all routed experts.
        bytes: Size of the weights as loaded from the checkpoint.
        dtype: The float dtype most of the weights (or their scales) have in the checkpoint.
    """

    name: str
    model_type: str
    family: str
    block: str
    num_layers: int
    moe_layers: tuple[int, ...]
    num_experts: int
    router_width: int
    experts_per_token: int
    shared_expert: bool
    hidden_size: int | None
    expert_width: int
    vocab_size: int | None
    rule: str
    values: tuple[str, ...]
    missing: dict[str, str]
    parameters: int
    active_parameters: int
    expert_parameters: int
    bytes: int
    dtype: str
    quantization: dict[str, Any] | None
    note: str

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=2)

    def _repr_html_(self) -> str:
        rows = "".join(
            f"<tr><th style='text-align:left'>{name}</th><td>{value}</td></tr>"
            for name, value in self.to_dict().items()
        )
        return f"<table>{rows}</table>"


def describe_model(
    name: str, model: nn.Module, layers: Sequence[MoELayer], config: dict[str, Any]
) -> ModelInfo:
    """Read a `ModelInfo` from a loaded model, before its dtype is changed."""
    first = layers[0]
    total = _parameters(model)
    of_experts = sum(_layer_parameters(layer) for layer in layers)
    idle = sum(
        _layer_parameters(layer) * (1 - min(_k(layer), layer.num_experts) / layer.num_experts)
        for layer in layers
    )
    missing = {name: reason for name in VALUES[:6] if (reason := first.reason(name)) is not None}
    missing |= dict(first.family.without)
    return ModelInfo(
        name=name,
        model_type=str(config.get("model_type")),
        family=first.family.model_type,
        block=first.family.name,
        num_layers=len(getattr(model, "layers", layers)),
        moe_layers=tuple(layer.index for layer in layers),
        num_experts=max(layer.num_experts for layer in layers),
        router_width=max(layer.router_width for layer in layers),
        experts_per_token=max(_k(layer) for layer in layers),
        shared_expert=first.shared_module is not None,
        hidden_size=_find(config, "hidden_size", "d_model", "model_dim"),
        expert_width=_expert_width(first),
        vocab_size=_find(config, "vocab_size", "num_vocab"),
        rule=first.describe_rule(),
        values=tuple(value for value in VALUES[:6] if value not in missing),
        missing=missing,
        parameters=total,
        active_parameters=round(total - idle),
        expert_parameters=of_experts,
        bytes=sum(value.nbytes for _, value in tree_flatten(model.parameters())),
        dtype=_dtype(model),
        quantization=config.get("quantization"),
        note=first.family.note,
    )


def _k(layer: MoELayer) -> int:
    """k, or 0 for an unknown architecture, whose k is not known before it runs."""
    return layer.k if layer.family.k else 0


def _parameters(module: nn.Module) -> int:
    from mlx_lm.utils import get_total_parameters

    return int(get_total_parameters(module))


def _layer_parameters(layer: MoELayer) -> int:
    experts = layer.experts if layer.list_experts else [layer.experts]
    return sum(_parameters(expert) for expert in experts)


def _expert_width(layer: MoELayer) -> int:
    experts = layer.experts
    if layer.list_experts:
        return int(experts[0].w1.weight.shape[0])
    return int((experts.fc1 if "fc1" in experts else experts.up_proj).output_dims)


def _find(config: dict[str, Any], *names: str) -> int | None:
    for part in (config, *(each for each in config.values() if isinstance(each, dict))):
        for name in names:
            if isinstance(part.get(name), int):
                return int(part[name])
    return None


def _dtype(model: nn.Module) -> str:
    sizes: Counter[str] = Counter()
    for _, value in tree_flatten(model.parameters()):
        if mx.issubdtype(value.dtype, mx.floating):
            sizes[str(value.dtype).removeprefix("mlx.core.")] += value.nbytes
    return sizes.most_common(1)[0][0] if sizes else "none"
