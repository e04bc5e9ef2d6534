"""What every expert of a layer answers to the same tokens, whether they chose it or not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx

from moe_lens.families import MoELayer
from moe_lens.families.class_swap import call_original

from .layer_sample import LayerSample

_CHUNK_BYTES = 64 << 20

Evaluate = Callable[[mx.array], mx.array]
"""[tokens, hidden] -> [tokens, E, hidden]: what every expert answers to every token."""


def evaluate_all(experts: Any, num_experts: int) -> Evaluate:
    """A function that runs every expert of a layer on every token.

    Args:
        experts: A ``SwitchGLU`` or ``SwitchMLP``, or a list of experts.
        num_experts: E.
    """
    if isinstance(experts, list):
        return lambda x: mx.stack([call_original(expert, x) for expert in experts], axis=1)

    def run(x: mx.array) -> mx.array:
        ids = mx.broadcast_to(mx.arange(num_experts, dtype=mx.uint32), (len(x), num_experts))
        outputs: mx.array = call_original(experts, x, ids)
        return outputs

    return run


def all_outputs(sample: LayerSample) -> mx.array:
    """[S, E, width] in float32 what every expert answers, evaluated in chunks of 64 MiB."""
    with sample.layer.reading():
        return _all_outputs(sample)


def _all_outputs(sample: LayerSample) -> mx.array:
    layer = sample.layer
    step = max(1, _CHUNK_BYTES // (4 * layer.num_experts * sample.inputs.shape[-1]))
    evaluate = evaluate_all(layer.experts, layer.num_experts)
    parts = []
    for start in range(0, len(sample.inputs), step):
        inputs = sample.inputs[start : start + step]
        if layer.family.weights_on_input:
            found = _weighted_on_input(layer, inputs, sample.logits[start : start + step])
        else:
            found = evaluate(inputs)
        parts.append(found.astype(mx.float32))
        mx.eval(parts[-1])
    return mx.concatenate(parts)


def _weighted_on_input(layer: MoELayer, inputs: mx.array, logits: mx.array) -> mx.array:
    """[S, E, width] of experts whose input carries their weight, which is the expert's own."""
    answers = []
    for expert in range(layer.num_experts):
        ids = mx.full((len(inputs), 1), expert, mx.uint32)
        _, weights = layer.route(logits, inputs.dtype, ids=ids)
        answers.append(call_original(layer.experts, inputs * weights, ids))
    return mx.concatenate(answers, axis=1)
