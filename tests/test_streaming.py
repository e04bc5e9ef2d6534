"""A model that is read layer by layer gives, bit for bit, what it gives as a whole."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.utils import load_model

from moe_lens.compress.verification.losses import compare, with_k
from moe_lens.errors import MoeLensError
from moe_lens.instrument import Forward
from moe_lens.loading import compute_in_float32
from moe_lens.router import ExpertRouter
from moe_lens.streaming import Batch
from tiny_models import CONFIGS, save_checkpoint

NOT_IN_4_BIT = {"muse_spark"}

BATCHES = [
    (np.random.default_rng(seed).integers(1, 126, shape).astype(np.int32), lengths)
    for seed, (shape, lengths) in enumerate(
        [((2, 24), [24, 17]), ((1, 9), [9]), ((3, 12), [12, 12, 5])]
    )
]


class Keep:
    """Keeps copies of what each forward shows, by what was said about it."""

    values = frozenset({"expert_ids", "expert_weights", "expert_outputs"})

    def __init__(self, *, by_layer: bool) -> None:
        self.by_layer = by_layer
        self.found: dict[tuple[Any, int, str], np.ndarray] = {}
        self.calls: list[tuple[Any, tuple[int, ...]]] = []

    def record(self, forward: Forward) -> None:
        self.calls.append((forward.about, forward.layers))
        for layer in forward.layers:
            for name in self.values:
                if forward.reason(name, layer) is None:
                    value = forward.value(name, layer).astype(mx.float32)
                    assert (forward.about, layer, name) not in self.found
                    self.found[forward.about, layer, name] = np.array(value)


def open_router(folder: Path, *, stream: bool) -> ExpertRouter:
    """Without a tokenizer, which some tiny configurations do not have."""

    def fresh() -> Any:
        model, _ = load_model(folder, lazy=True)
        compute_in_float32(model)
        return model

    model, config = load_model(folder, lazy=stream)
    return ExpertRouter(model, None, config, path=folder, fresh=fresh if stream else None)


def batches(sinks: Any = None) -> list[Batch]:
    return [
        Batch(ids, lengths, about=number, sinks=sinks)
        for number, (ids, lengths) in enumerate(BATCHES)
    ]


def run(router: ExpertRouter, sinks: Sequence[Keep]) -> list[np.ndarray]:
    found = []
    with router.recording(*sinks):
        for wave in router.waves(batches()):
            found += [np.array(logits.astype(mx.float32)) for logits in router.forwards(wave)]
    return found


@pytest.mark.parametrize("quantise", [None, 4])
@pytest.mark.parametrize("name", CONFIGS)
def test_every_model_type_streams_bit_for_bit(
    name: str, quantise: int | None, tmp_path: Path
) -> None:
    if quantise and name in NOT_IN_4_BIT:
        pytest.skip("its own rule leaves experts in half precision, which the CPU cannot multiply")
    folder = save_checkpoint(name, tmp_path, quantise)
    whole, streamed = open_router(folder, stream=False), open_router(folder, stream=True)
    expected, layered, together = Keep(by_layer=False), Keep(by_layer=True), Keep(by_layer=False)
    logits = run(whole, [expected])
    assert not whole.streamed and streamed.streamed
    for ours, theirs in zip(run(streamed, [layered, together]), logits, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert expected.found.keys() == layered.found.keys() == together.found.keys()
    for key, value in expected.found.items():
        np.testing.assert_array_equal(layered.found[key], value)
        np.testing.assert_array_equal(together.found[key], value)
    assert [layers for _, layers in together.calls] == [layers for _, layers in expected.calls]
    assert all(len(layers) == 1 for _, layers in layered.calls)
    # All batches run a layer before the first one runs the next.
    first, second = layered.calls[0][1], layered.calls[len(BATCHES)][1]
    assert [about for about, layers in layered.calls if layers == first] == [0, 1, 2]
    assert first != second or len(whole.layers) == 1


@pytest.mark.parametrize("name", ["qwen3_moe", "deepseek_v3", "gemma4", "qwen3_next", "kimi_k3"])
def test_writing_with_a_cache_reads_the_layers_again(name: str, tmp_path: Path) -> None:
    folder = save_checkpoint(name, tmp_path)
    found = []
    for stream in (False, True):
        router = open_router(folder, stream=stream)
        cache = make_prompt_cache(router.model)
        with router.capture() as seen:
            prompt = router.model(mx.array([[5, 3, 9, 4]]), cache=cache)
            following = router.model(mx.array([[7]]), cache=cache)
        layer = router.layers[-1].index
        found.append([np.array(each) for each in (prompt, following, seen[layer].expert_ids)])
    for whole, streamed in zip(*found, strict=True):
        np.testing.assert_array_equal(whole, streamed)


def test_overrides_and_weights_read_outside_of_a_forward(tmp_path: Path) -> None:
    folder = save_checkpoint("qwen3_moe", tmp_path)
    whole, streamed = open_router(folder, stream=False), open_router(folder, stream=True)
    ids = BATCHES[0][0]
    with whole.override(mask=[1, 2], k=1), streamed.override(mask=[1, 2], k=1):
        np.testing.assert_array_equal(whole.forward(ids), streamed.forward(ids))
    with streamed.layers[0].reading():
        read = np.array(streamed.layers[0].experts.up_proj.weight)
    np.testing.assert_array_equal(read, np.array(whole.layers[0].experts.up_proj.weight))
    np.testing.assert_array_equal(whole.forward(ids), streamed.forward(ids))
    streamed.close()
    assert not streamed.streamed
    np.testing.assert_array_equal(whole.forward(ids), streamed.forward(ids))


def test_a_forward_that_fails_ends_the_whole_wave(tmp_path: Path) -> None:
    streamed = open_router(save_checkpoint("qwen3_moe", tmp_path), stream=True)

    class Fails(Keep):
        def record(self, forward: Forward) -> None:
            if forward.about == 1:
                raise RuntimeError("the second batch")

    with (
        pytest.raises(RuntimeError, match="the second batch"),
        streamed.recording(Fails(by_layer=True)),
    ):
        streamed.forwards(batches())
    ids = BATCHES[0][0]
    whole = open_router(streamed.path or tmp_path, stream=False)
    np.testing.assert_array_equal(whole.forward(ids), streamed.forward(ids))


def test_a_checkpoint_that_changes_while_it_is_read_is_refused(tmp_path: Path) -> None:
    folder = save_checkpoint("qwen3_moe", tmp_path)
    router = ExpertRouter.from_pretrained(folder, stream=True)
    router.forward([[1, 2, 3]])
    save_checkpoint("qwen3_moe", tmp_path, seed=1)
    with pytest.raises(MoeLensError, match="changed while it was read"):
        router.forward([[1, 2, 3]])


def test_who_is_streamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save_checkpoint("qwen3_moe", tmp_path, dtype=mx.bfloat16)
    router = ExpertRouter.from_pretrained(folder)
    assert not router.streamed
    size = sum(value.nbytes for _, value in tree_flatten(router.model.parameters()))
    for free, streamed in ((2 * size, False), (size, True), (None, False)):
        monkeypatch.setattr("moe_lens.streaming.memory.free_memory", lambda free=free: free)
        assert ExpertRouter.from_pretrained(folder).streamed is streamed
        assert not ExpertRouter.from_pretrained(folder, stream=False).streamed


def test_a_comparison_of_streamed_models_tells_how_far_it_is(tmp_path: Path) -> None:
    folder = save_checkpoint("qwen3_moe", tmp_path)
    tokens = [[1, 5, 9, 3, 7], [2, 8, 4, 6, 11, 33], [44]]
    found = []
    for stream in (False, True):
        router, told = open_router(folder, stream=stream), []
        other = open_router(folder, stream=stream)
        compared = compare(
            router.forwards,
            [with_k(other, 1)],
            tokens,
            128,
            lambda done, total, told=told: told.append((done, total)),
            wave_tokens=router.wave_tokens,
        )
        found.append((compared[0], told))
    (whole, plain), (streamed, told) = found
    np.testing.assert_array_equal(whole.kl, streamed.kl)
    np.testing.assert_array_equal(whole.nll_after, streamed.nll_after)
    # 11 of 12 tokens are in prompts that predict something; a wave tells of each of 2 x 3 layers.
    assert plain[-1] == told[-1] == (11, 12)
    assert len(told) > len(plain)
    assert [done for done, _ in told] == sorted({done for done, _ in told})
