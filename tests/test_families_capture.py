"""Every family: watching changes nothing, and what is captured is what happened."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.generate import generate_step

from family_cases import CONTINUATION, PROMPT, Case, Raw, same
from moe_lens.families import MoELayer
from moe_lens.instrument import LayerCapture

TRIPLE = ("expert_ids", "expert_weights", "expert_outputs")


def test_idle_seams_change_no_bit(case: Case) -> None:
    with case.router.recording():
        assert case.is_plain()


def test_capturing_everything_changes_no_bit(case: Case) -> None:
    with case.router.capture(*case.router.info.values, "expert_inputs"):
        assert case.is_plain()


def test_an_empty_override_changes_no_bit(case: Case) -> None:
    with case.router.override(), case.router.capture():
        assert case.is_plain()


def test_shapes_types_and_slot_order(case: Case) -> None:
    with case.router.capture(*case.router.info.values) as seen:
        case.logits()
    length = case.rows.shape[1]
    assert seen.token_ids.tolist() == case.rows.reshape(-1).tolist()
    assert seen.position.tolist() == [*range(length)] * 2
    assert seen.prompt.tolist() == [0] * length + [1] * length
    for layer, got in zip(case.layers, seen, strict=True):
        assert got.expert_ids.shape == got.expert_weights.shape == (2 * length, layer.k)
        assert got.expert_ids.dtype == np.uint8
        assert got.expert_ids.max() < layer.router_width
        assert got.router_logits.shape == (2 * length, layer.router_width)
        assert got.expert_outputs.shape[:2] == (2 * length, layer.k)
        assert got.routed_output.shape[0] == 2 * length
        assert (np.diff(got.expert_weights, axis=-1) <= 0).all()
        assert all(len(set(row)) == layer.k for row in got.expert_ids.tolist())


def test_weights_times_outputs_are_the_routed_output(case: Case) -> None:
    with case.router.capture(*TRIPLE, "routed_output") as seen:
        case.logits()
    for layer, got in zip(case.layers, seen, strict=True):
        assert case.within(weighted_sum(layer, got), got.routed_output)


def weighted_sum(layer: MoELayer, got: LayerCapture) -> np.ndarray:
    """The routed output [tokens, hidden] in numpy, from weights and expert outputs."""
    outputs = got.expert_outputs.astype(np.float64)
    if layer.family.model_type == "llama4":  # the weights are in the outputs already
        return outputs.sum(1)
    if layer.family.model_type == "muse_spark":  # each output is normed before its weight
        norm = layer.experts.post_expert_norm
        outputs = outputs * np.array(norm.weight.astype(mx.float32))
        outputs /= np.sqrt((outputs**2).mean(-1, keepdims=True) + norm.eps)
    return (got.expert_weights[..., None] * outputs).sum(1)


def test_outputs_belong_to_the_experts_named_by_the_ids(case: Case) -> None:
    raw = Raw("expert_inputs")
    with case.router.capture(*TRIPLE) as seen, case.router.recording(raw):
        case.logits()
    for layer, got in zip(case.layers, seen, strict=True):
        inputs = raw.forwards[0]["expert_inputs", layer.index]
        for slot in range(layer.k):
            ids, weights = got.expert_ids[:, slot], got.expert_weights[:, slot]
            wanted = run_expert(layer, inputs, ids, weights)
            assert case.within(got.expert_outputs[:, slot], wanted)


def run_expert(
    layer: MoELayer, inputs: mx.array, ids: np.ndarray, weights: np.ndarray
) -> np.ndarray:
    """What expert ids[t] answers to inputs[t], by the model's own experts, [tokens, hidden]."""
    if layer.list_experts:
        rows = [layer.experts[e](inputs[t]) for t, e in enumerate(ids.tolist())]
        return np.array(mx.stack(rows).astype(mx.float32))
    if layer.family.weights_on_input:
        inputs = inputs * mx.array(weights).astype(inputs.dtype)[:, None]
    real = np.where(ids < layer.num_experts, ids, 0).astype(np.uint32)
    outputs = layer.experts(inputs, mx.array(real)[:, None])[:, 0]
    is_zero = mx.array(ids >= layer.num_experts)[:, None]
    return np.array(mx.where(is_zero, inputs, outputs).astype(mx.float32))


FINISH: dict[str, Any] = {
    "Klear": lambda block, x, routed, shared: (
        routed * (gate := mx.softmax(block.coefficient(x), axis=-1, precise=True))[..., :1]
        + shared * gate[..., 1:]
    ),
    "qwen2_moe": lambda block, x, routed, shared: (
        routed + mx.sigmoid(block.shared_expert_gate(x)) * shared
    ),
    "laguna": lambda block, x, routed, shared: routed * block.routed_scaling_factor + shared,
}
FINISH["qwen3_next"] = FINISH["qwen2_moe"]

NOT_SIMPLE = {
    "gemma4_text": "a decoder layer, not a block, joins router, experts and a dense MLP",
    "granitemoehybrid": "the decoder layer adds the shared expert",
    "kimi_k3": "norm and projection follow the sum",
    "muse_spark": "a projection follows the sum",
}


def test_routed_and_shared_output_make_the_block_output(case: Case) -> None:
    if case.model_type in NOT_SIMPLE or case.name == "nemotron_h":
        pytest.skip(NOT_SIMPLE.get(case.model_type, "a projection follows the sum"))
    raw = Raw("expert_inputs", "routed_output")
    shared = Raw("shared_output")
    has_shared = "shared_output" in case.router.info.values
    with case.router.recording(raw, *([shared] if has_shared else [])):
        case.logits()
    for layer in case.layers:
        inputs = raw.forwards[0]["expert_inputs", layer.index]
        parts = [raw.forwards[0]["routed_output", layer.index], mx.zeros_like(inputs)]
        if has_shared:
            parts[1] = shared.forwards[0]["shared_output", layer.index]
        finish = FINISH.get(case.model_type, lambda block, x, routed, shared: routed + shared)
        native = layer.block(inputs[None])
        wanted = np.array(native.astype(mx.float32)).reshape(inputs.shape[0], -1)
        got = finish(layer.block, inputs, *(part.astype(mx.float32) for part in parts))
        assert case.within(np.array(got.astype(mx.float32)), wanted)


def test_prefill_and_decoding_with_a_cache(case: Case) -> None:
    plain = case.with_cache()
    with case.router.capture(*case.router.info.values) as seen:
        watched = case.with_cache()
    assert all(same(a, b) for a, b in zip(watched, plain, strict=True))
    assert seen.token_ids.tolist() == PROMPT + CONTINUATION
    assert seen.position.tolist() == list(range(20))
    assert not seen.prompt.any()
    assert all(got.expert_ids.shape == (20, case.layers[0].k) for got in seen)


def test_generation_gives_the_same_tokens(case: Case) -> None:
    def generate() -> list[int]:
        steps = generate_step(mx.array(PROMPT), case.model, max_tokens=4)
        return [int(token) for token, _ in steps]

    plain = generate()
    with case.router.capture() as seen:
        assert generate() == plain
    # The generator looks one step ahead, so the last token it yields has been read, too.
    wanted = PROMPT + plain
    assert seen.token_ids.tolist() == wanted[: len(seen)]
    assert len(seen) >= len(wanted) - 1


def test_pads_on_the_right_are_left_out(case: Case) -> None:
    long, short = case.rows.shape[1], 13
    padded = case.rows.copy()
    padded[1, short:] = 0
    with case.router.capture("expert_ids", "routed_output") as together:
        case.router.forward(padded, lengths=[long, short])
    assert together.prompt.tolist() == [0] * long + [1] * short
    assert together.position.tolist() == [*range(long), *range(short)]
    assert together.token_ids.tolist() == [*padded[0].tolist(), *padded[1, :short].tolist()]
    if case.mode != "float32":
        return  # another batch shape rounds differently in half precision, and routes otherwise
    with case.router.capture("expert_ids", "routed_output") as alone:
        case.router.forward(padded[1:, :short])
    for one, two in zip(alone, together, strict=True):
        assert np.array_equal(one.expert_ids, two.expert_ids[long:])
        assert case.within(one.routed_output, two.routed_output[long:])
