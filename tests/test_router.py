"""`ExpertRouter`: generation, info, unknown architectures, and the async face."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx_lm import generate
from mlx_lm.models.switch_layers import SwitchGLU

from moe_lens import ExpertRouter, UnsupportedModelError, UsageError
from tiny_models import save_checkpoint


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint("qwen3_moe", tmp_path_factory.mktemp("models") / "qwen3_moe")


@pytest.fixture(scope="module")
def router(folder: Path) -> ExpertRouter:
    return ExpertRouter.from_pretrained(folder)


def test_info_counts_what_is_there(router: ExpertRouter) -> None:
    info = router.info
    assert (info.num_layers, info.moe_layers) == (3, (1, 2))
    assert (info.num_experts, info.experts_per_token, info.expert_width) == (8, 2, 64)
    one_expert = 3 * 64 * 64
    assert info.expert_parameters == 2 * 8 * one_expert
    assert info.parameters - info.active_parameters == 2 * 6 * one_expert
    assert info.bytes == 4 * info.parameters
    assert info.to_dict()["rule"] == "softmax -> top-k -> / sum"
    assert "shared_output" in info.missing


def test_generation_is_mlx_lms(router: ExpertRouter) -> None:
    text = generate(router.model, router.tokenizer, "w5 w9 w3", max_tokens=8)
    answer = router.generate("w5 w9 w3", max_tokens=8)
    assert str(answer) == text
    assert answer.prompt_token_ids == (5, 9, 3)
    assert len(answer.token_ids) == 8
    assert answer.finish_reason == "length"


def _last_logprobs(router: ExpertRouter, **options: int) -> np.ndarray:
    return np.array(list(router.stream("w5 w9 w3", max_tokens=8, **options))[-1].logprobs)


def test_experts_per_token_is_the_models_own_k(router: ExpertRouter) -> None:
    asked = _last_logprobs(router, experts_per_token=1)
    for layer in router.layers:
        layer.block.top_k = 1
    try:
        own = _last_logprobs(router)
    finally:
        for layer in router.layers:
            layer.block.top_k = 2
    np.testing.assert_array_equal(asked, own)
    assert not np.array_equal(asked, _last_logprobs(router))
    with pytest.raises(UsageError, match="k must be from 1 to 8"):
        router.generate("w5", experts_per_token=9)


def test_a_seed_repeats_a_sample(router: ExpertRouter) -> None:
    options = {"max_tokens": 12, "temp": 1.5}
    first = router.generate("w5 w9", seed=1, **options)
    assert first.token_ids == router.generate("w5 w9", seed=1, **options).token_ids
    assert first.token_ids != router.generate("w5 w9", seed=2, **options).token_ids


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_tokens": 0}, "max_tokens"),
        ({"temp": -1.0}, "temp"),
        ({"temp": float("nan")}, "temp"),
        ({"top_p": 1.5}, "top_p"),
        ({"chat": True}, "no chat template"),
    ],
)
def test_impossible_options(router: ExpertRouter, options: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        router.generate("w5", **options)


@pytest.mark.parametrize(
    ("ids", "lengths", "message"),
    [
        ([[1, 2], [3]], None, "differ in length"),
        ([1.5, 2.0], None, "whole numbers"),
        ([[[1]]], None, r"of shape \[batch, length\]"),
        ([1, 128], None, "there is no token id 128: this model has 0 to 127"),
        ([-1], None, "no token id -1"),
        ([[1, 2], [3, 4]], [2], "2 whole numbers, one for each row"),
        ([[1, 2], [3, 4]], [2, 3], "from 1 to 2"),
        ([[1, 2], [3, 4]], [0, 2], "from 1 to 2"),
    ],
)
def test_impossible_batches(
    router: ExpertRouter, ids: object, lengths: list[int] | None, message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        router.forward(ids, lengths)


def test_an_empty_prompt(router: ExpertRouter) -> None:
    with pytest.raises(UsageError, match="the prompt is empty"):
        router.generate("")
    with pytest.raises(UsageError, match="the batch is empty"):
        router.forward([])


def test_leaving_a_stream_early_detaches(router: ExpertRouter) -> None:
    pieces = router.stream("w5 w9", max_tokens=50, experts_per_token=1)
    next(pieces)
    assert router._instrument.attached
    pieces.close()
    assert not router._instrument.attached


def test_with_closes(folder: Path) -> None:
    with ExpertRouter.from_pretrained(folder) as router:
        entered = router.override(k=1)
        entered.__enter__()
        assert router._instrument.attached
    assert not router._instrument.attached
    assert not any(hasattr(type(module), "_moe_lens_original") for module in router.model.modules())


class _Block(nn.Module):
    """A block no family declares."""

    def __init__(self) -> None:
        super().__init__()
        self.chooser = nn.Linear(16, 4)
        self.switch = SwitchGLU(16, 16, 4)

    def __call__(self, x: mx.array) -> mx.array:
        scores = mx.softmax(self.chooser(x), axis=-1)
        ids = mx.argpartition(-scores, kth=1, axis=-1)[..., :2]
        weights = mx.take_along_axis(scores, ids, axis=-1)
        return (self.switch(x, ids) * weights[..., None]).sum(axis=-2)


class _Unknown(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(32, 16)
        self.layers = [_Block(), _Block()]

    def __call__(self, inputs: mx.array, cache: object = None) -> mx.array:
        x = self.embed(inputs)
        for layer in self.layers:
            x = x + layer(x)
        return self.embed.as_linear(x)


def test_an_unknown_architecture_is_captured_but_not_overridden() -> None:
    mx.random.seed(0)
    model = _Unknown()
    tokens = mx.array([[1, 2, 3, 4, 5]])
    plain = model(tokens)
    router = ExpertRouter(model, None, {"model_type": "unheard_of"})
    with router.capture("expert_ids", "expert_weights", "expert_outputs", "routed_output") as seen:
        watched = model(tokens)
    assert mx.array_equal(plain, watched)
    layer = seen[1]
    summed = (layer.expert_outputs * layer.expert_weights[..., None]).sum(axis=1)
    np.testing.assert_allclose(summed, layer.routed_output, rtol=1e-4, atol=1e-6)
    with pytest.raises(UnsupportedModelError, match="only capture works"), router.override(k=1):
        pass
    with (
        pytest.raises(UnsupportedModelError, match="only capture"),
        router.capture("router_logits"),
    ):
        pass


def test_async(folder: Path) -> None:
    async def run() -> None:
        async with await ExpertRouter.from_pretrained_async(folder) as router:
            plain = await router.generate("w5 w9", max_tokens=4)
            async with router.capture() as seen:
                pieces = [piece async for piece in router.stream("w5 w9", max_tokens=4)]
            assert [piece.token for piece in pieces] == list(plain.token_ids)
            assert seen.token_ids.tolist() == [5, 9, *plain.token_ids]
            async with router.override(k=1), router.capture() as seen:
                await router.generate("w5 w9", max_tokens=4)
            assert seen[1].expert_ids.shape == (6, 1)
            with pytest.raises(UsageError, match="k must be"):
                async with router.override(k=99):
                    pass

    asyncio.run(run())


def test_importing_the_package_loads_no_mlx() -> None:
    code = "import moe_lens, sys; assert 'mlx.core' not in sys.modules; moe_lens.Override"
    subprocess.run([sys.executable, "-c", code], check=True)
