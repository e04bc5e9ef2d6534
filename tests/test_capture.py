"""Captures: aligned with the tokens, pads left out, and never silently empty."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm import batch_generate
from mlx_lm.models.cache import BatchKVCache

from moe_lens import CaptureError, ExpertRouter, UnsupportedModelError, UsageError
from moe_lens.instrument.padding import valid_tokens
from tiny_models import build, save_checkpoint


@pytest.fixture(scope="module")
def router(tmp_path_factory: pytest.TempPathFactory) -> ExpertRouter:
    folder: Path = tmp_path_factory.mktemp("models") / "qwen3_moe"
    save_checkpoint("qwen3_moe", folder)
    return ExpertRouter.from_pretrained(folder)


def one_by_one(router: ExpertRouter, tokens: list[int]) -> np.ndarray:
    with router.capture() as seen:
        mx.eval(router.forward(tokens))
    return seen[1].expert_ids


def test_generation_is_aligned_with_its_tokens(router: ExpertRouter) -> None:
    prompt = [5, 9, 3, 7, 2]
    with router.capture("expert_ids", "expert_weights") as seen:
        generation = router.generate(prompt, max_tokens=6)
    tokens = [*prompt, *generation.token_ids]
    assert seen.token_ids.tolist() == tokens
    assert seen.position.tolist() == list(range(len(tokens)))
    assert set(seen.prompt.tolist()) == {0}
    # Routing of the whole text in one forward is that of generation, token by token.
    np.testing.assert_array_equal(seen[1].expert_ids, one_by_one(router, tokens))


def test_two_generations_are_two_prompts(router: ExpertRouter) -> None:
    with router.capture() as seen:
        first = router.generate([5, 9, 3], max_tokens=2)
        second = router.generate([7, 2], max_tokens=3)
    expected = [5, 9, 3, *first.token_ids, 7, 2, *second.token_ids]
    assert seen.token_ids.tolist() == expected
    assert seen.prompt.tolist() == [0] * 5 + [1] * 5
    assert seen.position.tolist() == [*range(5), *range(5)]


def test_pads_of_a_batch_are_left_out(router: ExpertRouter) -> None:
    rows = [[5, 9, 3, 7, 2, 8], [4, 1], [6, 6, 2]]
    padded = [row + [0] * (6 - len(row)) for row in rows]
    with router.capture() as seen:
        mx.eval(router.forward(padded, lengths=[len(row) for row in rows]))
    assert seen.token_ids.tolist() == [token for row in rows for token in row]
    for number, row in enumerate(rows):
        np.testing.assert_array_equal(
            seen[1].expert_ids[seen.prompt == number], one_by_one(router, row)
        )


@pytest.mark.parametrize(
    ("name", "step"),
    [
        ("qwen3_moe", 2048),  # key-value caches
        ("qwen3_moe", 3),
        ("gpt_oss", 3),  # rotating caches, prompts in several pieces
        ("lfm2_moe", 3),  # convolution states
    ],
)
def test_pads_of_mlx_lm_batches_are_left_out(tmp_path: Path, name: str, step: int) -> None:
    router = ExpertRouter.from_pretrained(save_checkpoint(name, tmp_path / name))
    prompts = [[5, 9, 3, 7, 2, 8, 11, 12], [4, 1], [6, 6, 2]]
    with router.capture() as seen:
        answer = batch_generate(
            router.model,
            router.tokenizer,
            prompts,
            max_tokens=4,
            return_token_ids=True,
            prefill_step_size=step,
        )
    fed = Counter[int]()
    for prompt, written in zip(prompts, answer.token_ids, strict=True):
        fed.update([*prompt, *written])
    captured = Counter(seen.token_ids.tolist())
    # mlx-lm may or may not run the last token of each answer, and nothing else.
    assert captured <= fed
    assert sum((fed - captured).values()) <= len(prompts)


def test_pads_that_cannot_be_told_are_an_error() -> None:
    cache = BatchKVCache([0, 0])
    cache.prepare(right_padding=[0, 3])
    first = valid_tokens((2, 4), None, [cache], continues=False)
    assert first.tolist() == [[True] * 4, [True, False, False, False]]
    cache.update_and_fetch(mx.zeros((2, 1, 4, 8)), mx.zeros((2, 1, 4, 8)))
    with pytest.raises(CaptureError, match="raise prefill_step_size"):
        valid_tokens((2, 4), None, [cache], continues=True)


def test_layers_and_values_can_be_chosen(router: ExpertRouter) -> None:
    with router.capture("router_logits", layers=[2]) as seen:
        mx.eval(router.forward([1, 2, 3]))
    assert seen.layers == (2,)
    assert seen[2].router_logits.shape == (3, 8)
    assert seen[2].expert_ids is None
    with pytest.raises(UsageError, match="layer 1 was not captured"):
        seen[1]


def test_outputs_follow_the_order_of_the_ids(router: ExpertRouter) -> None:
    values = ("expert_ids", "expert_weights", "expert_outputs", "expert_inputs")
    with router.capture(*values) as seen:
        mx.eval(router.forward([1, 2, 3, 4]))
    layer = router.layers[0]
    read = mx.array(seen[1].expert_inputs)
    again = layer.experts(read, mx.array(seen[1].expert_ids.astype(np.uint32)))
    np.testing.assert_allclose(np.array(again), seen[1].expert_outputs, rtol=1e-4, atol=1e-6)
    assert seen[1].expert_ids.dtype == np.uint8


def test_a_capture_of_nothing_is_an_error(router: ExpertRouter) -> None:
    with pytest.raises(CaptureError, match="nothing was captured"), router.capture():
        pass
    with (
        pytest.raises(CaptureError, match="nothing was captured"),
        router.capture(),
    ):
        # The inner model is not the model that is watched.
        mx.eval(router.model.model(mx.array([[1, 2, 3]])))


def test_one_capture_holds_one_k(router: ExpertRouter) -> None:
    told = r"2 experts per token of layer 1.* runs with 1: open"
    with router.capture() as seen:
        mx.eval(router.forward([1, 2, 3]))
        with router.override(k=1), pytest.raises(CaptureError, match=told):
            router.forward([1, 2, 3])
    assert seen[1].expert_ids.shape == (3, 2)


def test_forwards_of_all_sizes_are_joined_in_their_order(router: ExpertRouter) -> None:
    rng = np.random.default_rng(0)
    pieces = [rng.integers(1, 60, size) for size in (3, 1, 1, 300, 1, 40, 1)]
    with router.capture("router_logits", "expert_ids", "expert_outputs") as seen:
        for piece in pieces:
            mx.eval(router.forward(piece))
    np.testing.assert_array_equal(seen.token_ids, np.concatenate(pieces))
    np.testing.assert_array_equal(seen.prompt, np.repeat(range(7), [len(p) for p in pieces]))
    start = 0
    for piece in pieces:
        with router.capture("router_logits", "expert_ids", "expert_outputs") as one:
            mx.eval(router.forward(piece))
        rows = slice(start, start := start + len(piece))
        for name in ("router_logits", "expert_ids", "expert_outputs"):
            np.testing.assert_array_equal(getattr(seen[2], name)[rows], getattr(one[2], name))


def test_what_a_model_does_not_have_is_refused_with_the_reason(router: ExpertRouter) -> None:
    with (
        pytest.raises(UnsupportedModelError, match="no shared expert"),
        router.capture("shared_output"),
    ):
        pass
    with pytest.raises(UsageError, match="there is no value 'logits'"), router.capture("logits"):
        pass
    with pytest.raises(UsageError, match="layer 0"), router.capture(layers=[0]):
        pass


def test_embeddings_in_place_of_tokens_are_refused(router: ExpertRouter) -> None:
    with (
        pytest.raises(CaptureError, match="without token ids"),
        router.capture(),
    ):
        router.model(mx.zeros((1, 3, 64)))


def test_two_routers_on_one_model_are_refused() -> None:
    model, config = build("qwen3_moe")
    first = ExpertRouter(model, None, config)
    second = ExpertRouter(model, None, config)
    with (
        first.override(k=1),
        pytest.raises(UsageError, match="watched by another ExpertRouter"),
        second.capture(),
    ):
        pass
