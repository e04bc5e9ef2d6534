"""Overrides: what they change, what they leave, and what is refused before anything runs."""

from __future__ import annotations

from collections.abc import Iterator

import mlx.core as mx
import numpy as np
import pytest

from moe_lens import ExpertRouter, Override, UnsupportedModelError, UsageError
from moe_lens.kernels import Rule
from tiny_models import build

TOKENS = mx.array([[1, 5, 9, 3, 7, 2, 8, 4, 6, 11], [3, 3, 3, 9, 1, 9, 1, 12, 13, 14]])
MOE_LAYERS = (1, 2)


@pytest.fixture
def router() -> Iterator[ExpertRouter]:
    """Qwen3-MoE: layer 0 dense, layers 1 and 2 with 8 experts, k = 2."""
    model, config = build("qwen3_moe")
    with ExpertRouter(model, None, config, name="tiny") as router:
        yield router


def routing(router: ExpertRouter) -> dict[int, tuple[np.ndarray, np.ndarray]]:
    with router.capture() as seen:
        mx.eval(router.model(TOKENS))
    return {each.layer: (each.expert_ids, each.expert_weights) for each in seen}


def test_mask_routes_as_if_the_expert_were_removed(router: ExpertRouter) -> None:
    with router.capture("router_logits") as seen:
        mx.eval(router.model(TOKENS))
    logits = seen[1].router_logits.copy()
    logits[:, [2, 5]] = -np.inf
    order = np.argsort(-logits, axis=-1, kind="stable")[:, :2]
    share = np.exp(np.take_along_axis(logits, order, -1))
    share /= share.sum(-1, keepdims=True)
    with router.override(mask=[2, 5], layers=[1]):
        ids, weights = routing(router)[1]
    np.testing.assert_array_equal(ids, order)
    np.testing.assert_allclose(weights, share, rtol=1e-5)


def test_bias_moves_the_logits_and_scale_the_weights(router: ExpertRouter) -> None:
    with router.capture("router_logits") as seen:
        mx.eval(router.model(TOKENS))
    logits = seen[1].router_logits.copy()
    logits[:, 4] += 3.0
    order = np.argsort(-logits, axis=-1, kind="stable")[:, :2]
    share = np.exp(np.take_along_axis(logits, order, -1))
    share /= share.sum(-1, keepdims=True)
    with router.override({1: Override(bias={4: 3.0})}):
        ids, weights = routing(router)[1]
    np.testing.assert_array_equal(ids, order)
    np.testing.assert_allclose(weights, share, rtol=1e-5)
    with router.override({1: Override(scale=[0.5] * 8)}):
        _, halved = routing(router)[1]
    _, plain = routing(router)[1]
    np.testing.assert_allclose(halved, plain / 2, rtol=1e-6)


def test_scale_zero_silences_but_keeps_the_place(router: ExpertRouter) -> None:
    plain_ids, _ = routing(router)[1]
    expert = int(plain_ids[0, 0])
    with router.override({1: Override(scale={expert: 0.0})}):
        ids, weights = routing(router)[1]
    np.testing.assert_array_equal(np.sort(ids, -1), np.sort(plain_ids, -1))
    assert (weights[ids == expert] == 0).all()
    assert (weights[ids != expert] > 0).all()


def test_ids_for_every_token_are_used_and_weighed_by_the_rule(router: ExpertRouter) -> None:
    asked = np.stack([np.arange(20) % 8, (np.arange(20) + 3) % 8], axis=-1)
    with router.override({2: Override(ids=asked)}):
        ids, weights = routing(router)[2]
    np.testing.assert_array_equal(np.sort(ids, -1), np.sort(asked, -1))
    np.testing.assert_allclose(weights.sum(-1), 1, rtol=1e-6)


def test_layers_that_are_not_named_route_by_themselves(router: ExpertRouter) -> None:
    plain = routing(router)
    with router.override(mask=[0, 1, 2], layers=[2]):
        changed = routing(router)
    np.testing.assert_array_equal(plain[1][0], changed[1][0])
    assert not np.array_equal(plain[2][0], changed[2][0])


def test_inner_override_wins_where_it_is_set(router: ExpertRouter) -> None:
    with router.override(k=3, mask=[0]):
        with router.override(k=1):
            ids, _ = routing(router)[1]
            assert ids.shape == (20, 1)
            assert (ids != 0).all()
        ids, _ = routing(router)[1]
        assert ids.shape == (20, 3)
    ids, _ = routing(router)[1]
    assert ids.shape == (20, 2)


def test_different_k_in_different_layers(router: ExpertRouter) -> None:
    with router.override({1: Override(k=4)}):
        seen = routing(router)
    assert seen[1][0].shape == (20, 4)
    assert seen[2][0].shape == (20, 2)
    assert (np.diff(seen[1][1], axis=-1) <= 0).all()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"k": 0}, "k must be from 1 to 8"),
        ({"k": 9}, "k must be from 1 to 8"),
        ({"k": 2.5}, "whole number"),
        ({"mask": [8]}, "no expert 8, only 0 to 7"),
        ({"mask": [-1]}, "no expert -1"),
        ({"mask": ["3"]}, "whole numbers"),
        ({"mask": [0, 1, 2, 3, 4, 5, 6]}, "leaves 1, fewer than k = 2"),
        ({"mask": [1], "force": [1]}, "both masked and forced"),
        ({"force": [1, 2, 3]}, "3 experts are forced into k = 2"),
        ({"ids": [1, 1]}, "same expert twice"),
        ({"ids": [1, 8]}, "from 0 to 7"),
        ({"ids": [0.5]}, "whole numbers"),
        ({"ids": [1, 2], "k": 2}, "k cannot be given"),
        ({"bias": {9: 1.0}}, "no expert 9"),
        ({"bias": [1.0]}, "1 values were given for 8 experts"),
        ({"bias": {1: float("nan")}}, "finite"),
        ({"scale": {1: float("inf")}}, "finite"),
        ({"bias": {1: "a"}}, "every value must be a number"),
        ({"bias": 2.0}, "one value for each expert"),
        ({"scale": "12345678"}, "one value for each expert"),
        ({"mask": 3}, r"give a list of experts, such as \[3\], not 3"),
        ({"force": "3"}, "give a list of experts"),
        ({"experts": [1]}, "no field"),
    ],
)
def test_impossible_overrides_are_refused(
    router: ExpertRouter, fields: dict[str, object], message: str
) -> None:
    with pytest.raises(UsageError, match=message), router.override(**fields):
        pytest.fail("the block must not run")
    assert not router._instrument.attached


@pytest.mark.parametrize("given", [7, {1: 7}, {1: {"k": 1}}])
def test_what_is_no_override_is_refused(router: ExpertRouter, given: object) -> None:
    with pytest.raises(UsageError, match=r"give a moe_lens\.Override"), router.override(given):
        pytest.fail("the block must not run")


def test_numbers_of_numpy_are_numbers(router: ExpertRouter) -> None:
    with router.override(k=1, mask=[2]):
        plain = routing(router)
    with router.override(k=np.int64(1), mask=np.array([2])):
        again = routing(router)
    for layer in MOE_LAYERS:
        np.testing.assert_array_equal(plain[layer][0], again[layer][0])


def test_an_override_alone_keeps_no_array_of_the_forward(router: ExpertRouter) -> None:
    with router.override(k=1):
        mx.eval(router.model(TOKENS))
        for attachment in router._instrument._attachments.values():
            assert attachment.block_input is None
            assert attachment.logits is None


def test_the_rule_is_read_from_the_live_module(router: ExpertRouter) -> None:
    with router.override(k=2):
        before = routing(router)[1][1]
        router.layers[0].block.norm_topk_prob = False
        after = routing(router)[1][1]
    np.testing.assert_allclose(before.sum(-1), 1, rtol=1e-5)
    assert (after.sum(-1) < 0.999).all()


def test_layers_without_experts_are_refused(router: ExpertRouter) -> None:
    with pytest.raises(UsageError, match="the MoE layers of this model are 1-2"):
        router.override({0: Override(k=1)}).__enter__()
    with pytest.raises(UsageError, match="no routed experts"):
        router.override(k=1, layers=[7]).__enter__()


def test_ids_of_another_length_are_refused_in_the_forward(router: ExpertRouter) -> None:
    with (
        router.override({1: Override(ids=np.zeros((7, 1), dtype=int))}),
        pytest.raises(UsageError, match="ids of 7 tokens were given to a forward of 20"),
    ):
        router.model(TOKENS)
    mx.eval(router.model(TOKENS))


def test_a_rule_that_does_not_verify_refuses_overrides(
    router: ExpertRouter, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong = Rule("softmax_precise", side="high", normalise="no")
    monkeypatch.setattr(type(router.layers[0]), "rule", lambda self: wrong)
    with (
        pytest.raises(UnsupportedModelError, match="does not route by the rule"),
        router.override(k=1),
    ):
        pytest.fail("the block must not run")
    with router.capture() as seen:
        mx.eval(router.model(TOKENS))
    assert len(seen) == 20


def test_classes_come_back_after_an_exception(router: ExpertRouter) -> None:
    before = {path: type(module) for path, module in router.model.named_modules()}
    with pytest.raises(RuntimeError, match="stop"), router.override(k=1), router.capture():
        raise RuntimeError("stop")
    assert before == {path: type(module) for path, module in router.model.named_modules()}
    assert router.overrides == {}
