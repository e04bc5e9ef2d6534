"""The way from the residual stream to the logits, and from an expert to the stream, in all types.

What is checked against is the model itself: its logits, to the last bit, and what its own layer
adds to the stream when its experts are made to give a known vector.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from family_cases import Case, open_case
from moe_lens.errors import UnsupportedModelError
from moe_lens.families import MoELayer
from moe_lens.families.class_swap import ClassSwaps, call_original
from moe_lens.router import ExpertRouter
from moe_lens.unembedding import ExpertReading, Unembedding
from tiny_models import CONFIGS, save_checkpoint

NOT_WRITTEN = {"muse_spark"}
"""Types in which it cannot be told what an expert adds to the stream."""


@pytest.fixture(params=sorted(CONFIGS))
def float_case(request: pytest.FixtureRequest) -> Iterator[Case]:
    with open_case(request.param, "float32") as opened:
        yield opened


def classes(model: nn.Module) -> list[type]:
    return [type(module) for _, module in model.named_modules()]


def test_the_models_own_logits_from_its_own_stream(float_case: Case) -> None:
    """Norm and head alone give the logits of the whole model, bit for bit, on other tokens."""
    model, before = float_case.model, classes(float_case.model)
    unembed = Unembedding.of(float_case.router)
    assert classes(model) == before and float_case.is_plain()
    stream, logits = _norm_input(model, unembed.norm_name, float_case.rows[:1])
    assert mx.array_equal(unembed(stream[0]), logits[0])
    assert unembed.vocabulary == logits.shape[-1]
    assert unembed.normed(stream[0]).shape == stream[0].shape
    twice = unembed(2 * stream[0])
    np.testing.assert_allclose(twice, logits[0], rtol=1e-3, atol=1e-3)


def test_what_experts_write_is_what_the_layer_adds(float_case: Case) -> None:
    """Experts that all give v move the stream by a multiple of `written(v)`, and no other way."""
    layer = float_case.layers[-1]
    width = layer.down_projections[0].weight.shape[-2 if not layer.list_experts else 0]
    vectors = mx.random.normal((6, width), key=mx.random.key(1))
    if float_case.model_type in NOT_WRITTEN:
        with pytest.raises(UnsupportedModelError, match="look at their routing"):
            ExpertReading.of(float_case.router)
        return
    nothing = _layer_output(float_case, layer, mx.zeros(vectors.shape))
    moved = _layer_output(float_case, layer, vectors) - nothing
    written = np.array(layer.written(vectors), dtype=np.float64)
    for stream in moved:  # some types keep more than one
        scale = (stream * written).sum(-1) / (written * written).sum(-1)
        # A token that went to LongCat's zero experts only has weight 0 for all others.
        assert (scale > -1e-9).all() and (scale > 1e-4).any()
        np.testing.assert_allclose(
            stream, scale[:, None] * written, atol=2e-3 * np.abs(stream).max()
        )


def _norm_input(model: nn.Module, name: str, rows: np.ndarray) -> tuple[mx.array, mx.array]:
    """[B, L, hidden] what the final norm reads in a forward of the whole model, and its logits."""
    seen: list[mx.array] = []

    def call(module: nn.Module, x: mx.array) -> Any:
        seen.append(x)
        return call_original(module, x)

    swaps = ClassSwaps()
    swaps.swap(dict(model.named_modules())[name], call)
    try:
        logits = model(mx.array(rows))
    finally:
        swaps.undo()
    return seen[-1], logits


def _layer_output(case: Case, layer: MoELayer, given: mx.array) -> np.ndarray:
    """[streams, n, hidden] of the decoder layer, when every expert gives token t the vector t."""
    decoder = next(
        each
        for each in case.model.layers
        if any(module is layer.block for _, module in each.named_modules())
    )
    seen: list[mx.array] = []
    base = type(decoder)

    def watch(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        output = base.__call__(module, *args, **kwargs)
        seen.append(output[0] if isinstance(output, tuple) else output)
        return output

    def experts(module: nn.Module, x: mx.array, ids: mx.array, *rest: Any) -> mx.array:
        rows = given.reshape(*ids.shape[:-1], 1, -1)
        return mx.broadcast_to(rows, (*ids.shape, given.shape[-1])).astype(x.dtype)

    count = iter(range(10**6))

    def listed(module: nn.Module, x: mx.array) -> mx.array:
        """DBRX calls its experts token by token, each of them once for every slot."""
        return given[next(count) // layer.k].reshape(x.shape)

    def shared(module: nn.Module, x: mx.array, *rest: Any) -> mx.array:
        return mx.zeros_like(call_original(module, x, *rest))

    swaps = ClassSwaps()
    swaps.swap(decoder, watch)
    for module in layer.experts if layer.list_experts else [layer.experts_module]:
        swaps.swap(module, listed if layer.list_experts else experts)
    if layer.shared_module is not None:
        swaps.swap(layer.shared_module, shared)
    try:
        case.model(mx.array([[3, 14, 15, 92, 65, 35]]))
        mx.eval(seen)
    finally:
        swaps.undo()
    found = np.array(seen[-1], dtype=np.float64)[0]
    return found[None] if found.ndim == 2 else found.transpose(1, 0, 2)


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss", "gemma4", "phixtral", "hunyuan"])
def test_heads_in_four_bits(name: str) -> None:
    with open_case(name, "4bit") as case:
        unembed = Unembedding.of(case.router)
        stream, logits = _norm_input(case.model, unembed.norm_name, case.rows)
        found = unembed(stream[0])
        assert unembed.dtype == mx.bfloat16
        assert case.within(
            np.array(found.astype(mx.float32)), np.array(logits[0].astype(mx.float32))
        )


def test_biases_are_taken_off() -> None:
    """PhiMoE's norm and head have biases; what a zero vector gives is theirs alone."""
    with open_case("phimoe", "float32") as case:
        unembed = Unembedding.of(case.router)
        vector = mx.random.normal((1, unembed.hidden_size), key=mx.random.key(0))
        zero = mx.zeros_like(vector)
        head, norm = case.model.lm_head, case.model.model.norm
        np.testing.assert_allclose(unembed(zero), head(norm.bias[None]), atol=1e-5)
        centred = np.array(vector - vector.mean())
        plain = centred / np.sqrt((centred**2).mean()) * np.array(norm.weight)
        expected = plain @ np.array(head.weight).T
        np.testing.assert_allclose(unembed.relative(vector), expected, atol=1e-4)
        assert not mx.any(unembed.relative(zero)).item()


def test_inside_a_capture_and_after_an_error() -> None:
    with open_case("mixtral", "float32") as case:
        plain = classes(case.model)
        with case.router.capture("expert_ids"):
            before = classes(case.model)
            unembed = Unembedding.of(case.router)
            found = unembed(mx.ones((3, unembed.hidden_size)))
            assert classes(case.model) == before
            case.router.forward(case.rows)
        assert found.shape == (3, unembed.vocabulary)
        with pytest.raises(ValueError):
            unembed(mx.ones((3, 7)))
        assert classes(case.model) == plain and case.is_plain()


def test_a_streamed_model(tmp_path: Path) -> None:
    folder = save_checkpoint("qwen3_moe", tmp_path / "model")
    vectors = mx.random.normal((4, 64), key=mx.random.key(0))
    with ExpertRouter.from_pretrained(folder, stream=False) as router:
        whole = Unembedding.of(router)(vectors)
    with ExpertRouter.from_pretrained(folder, stream=True) as router:
        assert router.streamed
        assert mx.array_equal(Unembedding.of(router)(vectors), whole)


def test_a_model_whose_head_is_something_else_is_refused() -> None:
    """Here the outer model adds what it learned from the layers' input: no norm explains it."""
    with open_case("mixtral", "float32") as case:
        base = type(case.model)

        def call(module: nn.Module, tokens: mx.array, cache: Any = None) -> mx.array:
            return base.__call__(module, tokens, cache) + tokens[..., None]

        swaps = ClassSwaps()
        swaps.swap(case.model, call)
        with pytest.raises(UnsupportedModelError, match="other logits than the model"):
            Unembedding.of(case.router)
        swaps.undo()
