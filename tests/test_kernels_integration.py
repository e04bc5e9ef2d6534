"""Overridden models routed by the fused kernel: the reference's tokens, captured in one launch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models.cache import make_prompt_cache

from moe_lens import ExpertRouter, Override, UnsupportedModelError, UsageError
from moe_lens.kernels import Kernel
from tiny_models import build, save_checkpoint

Factory = Callable[..., Any]

# One model of every kind of seam and of rule: inline and router modules, top-k first and last,
# groups with either fill, selection biases, scales, blocks with code of their own.
MODELS = (
    "qwen3_moe",
    "mixtral",
    "gpt_oss",
    "deepseek_v3",
    "deepseek_v2",
    "gemma4_text",
    "minimax",
    "bailing_moe",
    "llama4",
    "dbrx",
    "longcat_flash",
    "muse_spark",
)
PROMPT = [5, 9, 3, 7, 7, 2, 11, 4]


class Launches:
    """The given factory; counts how often its kernels run."""

    def __init__(self, factory: Factory) -> None:
        self.factory = factory
        self.count = 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        kernel = self.factory(*args, **kwargs)

        def launch(**arguments: Any) -> list[mx.array]:
            self.count += 1
            return kernel(**arguments)

        return launch


def decoded(router: ExpertRouter, steps: int = 4) -> tuple[list[int], np.ndarray]:
    """The likeliest tokens after PROMPT, by prefill and cached steps, and the last logits."""
    cache = make_prompt_cache(router.model)
    piece, tokens = PROMPT, []
    for _ in range(steps):
        logits = router.model(mx.array([piece]), cache=cache)[0, -1]
        tokens.append(int(mx.argmax(logits)))
        piece = tokens[-1:]
    return tokens, np.array(logits.astype(mx.float32))


def changes(router: ExpertRouter) -> dict[int, Override]:
    """Another k, a masked, a forced, a biased and a silenced expert, as far as the model goes."""
    found = {}
    for layer in router.layers:
        k = max(1, layer.k - 1) if layer.reason("k") is None else None
        asked = Override(k=k, mask=[0], bias={1: 0.5}, scale={2: 0.0})
        found[layer.index] = asked if k == 1 else Override(k=k, mask=[0], force=[3])
    return found


@pytest.mark.parametrize("name", MODELS)
def test_the_kernel_gives_the_reference_s_tokens(name: str, kernel_factory: Factory) -> None:
    model, config = build(name)
    launches = Launches(kernel_factory)
    seen = {}
    for which, kernel in {
        "reference": Kernel("never"),
        "kernel": Kernel("always", factory=launches),
    }.items():
        with ExpertRouter(model, None, config, name=name, kernel=kernel) as router:
            asked = changes(router)
            with router.override(asked), router.capture() as captured:
                seen[which] = (*decoded(router), captured)
    tokens, logits, captured = seen["kernel"]
    wanted_tokens, wanted_logits, wanted = seen["reference"]
    assert tokens == wanted_tokens
    np.testing.assert_allclose(logits, wanted_logits, atol=1e-4 * np.abs(wanted_logits).max())
    for layer in captured.layers:
        order, wanted_order = (
            np.argsort(each[layer].expert_ids, axis=-1) for each in (captured, wanted)
        )
        for value in ("expert_ids", "expert_weights"):
            np.testing.assert_allclose(
                np.take_along_axis(getattr(captured[layer], value), order, -1),
                np.take_along_axis(getattr(wanted[layer], value), wanted_order, -1),
                rtol=2e-6,
            )
    # One launch a layer for the prefill and each step, and those of the probes.
    assert launches.count >= 4 * len(captured.layers)


def test_each_overridden_layer_of_a_forward_is_one_launch(kernel_factory: Factory) -> None:
    launches = Launches(kernel_factory)
    model, config = build("qwen3_moe")
    router = ExpertRouter(model, None, config, kernel=Kernel("always", factory=launches))
    with router.override(k=1, layers=[1]), router.capture():
        mx.eval(router.forward(PROMPT))
        before = launches.count
        mx.eval(router.forward(PROMPT))
    assert launches.count - before == 1
    with router.capture():
        mx.eval(router.forward(PROMPT))
    assert launches.count - before == 1
    assert "its probe agreed" in router.kernel.reason


def test_generation_by_the_kernel(kernel_factory: Factory, tmp_path: Path) -> None:
    folder = save_checkpoint("qwen3_moe", tmp_path / "model", 4)
    plain = ExpertRouter.from_pretrained(folder, kernel="never")
    fused = ExpertRouter(
        plain.model,
        plain.tokenizer,
        plain.config,
        kernel=Kernel("always", factory=kernel_factory),
    )
    for asked in ({"k": 1}, {"ids": [6, 1]}):
        with plain.override(**asked):
            wanted = plain.generate(PROMPT, max_tokens=8)
        with fused.override(**asked):
            assert fused.generate(PROMPT, max_tokens=8).token_ids == wanted.token_ids
    # The last of them changes what is written, so the agreement says something.
    assert plain.generate(PROMPT, max_tokens=8).token_ids != wanted.token_ids


def test_a_block_without_a_rule_is_refused_with_the_reason(kernel_factory: Factory) -> None:
    model, config = build("phimoe")
    router = ExpertRouter(model, None, config, kernel=Kernel("always", factory=kernel_factory))
    with (
        pytest.raises(UnsupportedModelError, match=r"kernel 'always' cannot be kept.*no rule"),
        router.override(mask=[0]),
    ):
        pytest.fail("the block must not run")
    by_choice = ExpertRouter(model, None, config, kernel=Kernel("auto", factory=kernel_factory))
    with by_choice.override(mask=[0]), by_choice.capture() as seen:
        mx.eval(by_choice.forward(PROMPT))
    assert not (seen[0].expert_ids == 0).any()


def test_what_the_kernel_does_not_take_is_refused_in_the_forward(
    kernel_factory: Factory, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, config = build("qwen3_moe")
    router = ExpertRouter(model, None, config, kernel=Kernel("always", factory=kernel_factory))
    monkeypatch.setattr("moe_lens.kernels.choice.unsupported", lambda *_: "at most 4 experts")
    with (
        router.override(k=1),
        pytest.raises(UnsupportedModelError, match=r"layer 1: .*at most 4 experts"),
    ):
        router.forward(PROMPT)


def test_always_without_a_gpu_is_a_usage_error() -> None:
    if mx.metal.is_available() or mx.cuda.is_available():
        pytest.skip("this machine has a GPU")
    model, config = build("qwen3_moe")
    with pytest.raises(UsageError, match="kernel 'always' cannot be kept"):
        ExpertRouter(model, None, config, kernel="always")
    with pytest.raises(UsageError, match="must be auto, never or always, not 'yes'"):
        ExpertRouter(model, None, config, kernel="yes")
    assert "MLX has no GPU" in ExpertRouter(model, None, config).kernel.reason
