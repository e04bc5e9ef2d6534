"""What one layer of a family's routing costs a GPU: by mlx-lm's code, the reference, the kernel."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
from launches import Arrays, launches, traced

from moe_lens.families import Attachment, MoELayer, find_moe_layers
from moe_lens.kernels import Routed, Rule, fused_route, route, route_statistics

sys.path.append(str(Path(__file__).parents[1] / "tests"))
from tiny_models import build

FAMILIES = (
    "qwen3_moe",
    "olmoe",
    "mixtral",
    "gpt_oss",
    "gemma4_text",
    "llama4",
    "longcat_flash",
    "minimax",
    "deepseek_v2",
    "deepseek_v3",
    "glm4_moe",
)
EXPERTS, ACTIVE = 128, 8
DECODE, PREFILL = 1, 2048


@dataclass(frozen=True)
class Cost:
    """What one way of routing costs for one layer.

    Attributes:
        launches: Kernels a GPU starts; None where the way cannot route this family.
        decode_bytes: Bytes through memory for one token.
        prefill_bytes: Bytes through memory for 2048 tokens.
        reason: Why it cannot.
    """

    launches: int | None = None
    decode_bytes: int = 0
    prefill_bytes: int = 0
    reason: str = ""


class Stock:
    """The first MoE layer of a tiny model with many experts: what its own code computes.

    A block that weighs its experts' inputs (Llama 4) can only choose one, and keeps that k.
    """

    def __init__(self, name: str) -> None:
        self.model, _ = build(name, dtype=mx.bfloat16, experts=EXPERTS)
        self.layer: MoELayer = find_moe_layers(self.model)[0]
        if not self.layer.family.weights_on_input:
            *owner, leaf = self.layer.family.k.split(".")
            setattr(self.layer.module(".".join(owner) or "."), leaf, ACTIVE)
        self.attachment = Attachment(self.layer)
        self.attachment.wanted = frozenset({"router_logits", "expert_ids", "expert_weights"})
        self.attachment.attach()

    def __call__(self, tokens: mx.array) -> Arrays:
        """The routing of one forward, lazy and as the block has it."""
        self.attachment.begin()
        self.model(tokens)
        return dict(self.attachment.values)

    def routing(self, tokens: mx.array) -> Arrays:
        """Ids and weights."""
        values = self(tokens)
        return {name: values[name] for name in ("expert_ids", "expert_weights")}

    def with_statistics(self, tokens: mx.array) -> Arrays:
        """Ids and weights and, by plain operations, how sure the router was."""
        values = self(tokens)
        logits = values.pop("router_logits")
        found = route_statistics(self.layer.rule(), logits, values["expert_ids"])
        return values | _named(found)


def family_costs(name: str) -> dict[str, Cost]:
    """Each way of routing one layer of a family, by name.

    An override masks an expert, forces another, adds a bias and multiplies a scale.
    """
    stock = Stock(name)
    tokens = [mx.ones((1, length), mx.int32) for length in (DECODE, PREFILL)]
    dtype = stock(tokens[0])["router_logits"].dtype
    layer = stock.layer
    logits = [mx.zeros((each.size, layer.router_width), dtype) for each in tokens]
    way = partial(_overridden, layer.rule(), layer.router_width, layer.k)
    return {
        "stock": _cost(stock.routing, *tokens),
        "stock, statistics": _cost(stock.with_statistics, *tokens),
        "override, statistics": _cost(way(_by_operations), *logits),
        "kernel": _kernel_cost(way(fused_route), *logits),
        "kernel, one launch": _kernel_cost(way(partial(fused_route, one_launch=True)), *logits),
    }


def _named(found: Iterable[mx.array]) -> Arrays:
    return dict(zip(("entropy", "margin", "mass"), found, strict=True))


def _overridden(
    rule: Rule, width: int, k: int, way: Callable[..., Routed]
) -> Callable[..., Arrays]:
    expert = mx.arange(width)
    changes = {
        "mask": expert == 3,
        "force": expert == 5,
        "bias": mx.zeros(width),
        "scale": mx.ones(width),
    }
    mx.eval(changes)

    def routed(logits: mx.array) -> Arrays:
        found = way(rule, logits, k, input_dtype=mx.bfloat16, **changes)
        return {field.name: getattr(found, field.name) for field in fields(found)}

    return routed


def _by_operations(rule: Rule, logits: mx.array, k: int, **given: Any) -> Routed:
    """The reference in the slot order of the block, as sorting is no part of an override."""
    ids, weights = route(rule, logits, k, **given)
    chosen = {name: given[name] for name in ("mask", "force", "bias")}
    return Routed(ids, weights, **_named(route_statistics(rule, logits, ids, **chosen)))


def _cost(function: Callable[..., Arrays], decode: mx.array, prefill: mx.array) -> Cost:
    decode_bytes, prefill_bytes = (traced(function, given)[1] for given in (decode, prefill))
    return Cost(launches(function, decode), decode_bytes, prefill_bytes)


def _kernel_cost(function: Callable[..., Arrays], decode: mx.array, prefill: mx.array) -> Cost:
    """Only the trace of an export takes a kernel where there is no GPU."""
    try:
        count, decode_bytes = traced(function, decode)
    except ValueError as error:
        return Cost(reason=str(error))
    return Cost(count, decode_bytes, traced(function, prefill)[1])
