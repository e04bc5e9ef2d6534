"""Every family: overrides do what they say, and nothing else."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.generate import generate_step

from family_cases import PROMPT, Case, Raw, same
from moe_lens import Override
from moe_lens.instrument import Capture


def captured(case: Case, *values: str, **override: Any) -> tuple[mx.array, Capture]:
    """Logits and capture (ids and weights if nothing is named) under an override of all layers."""
    with case.router.override(**override), case.router.capture(*values) as seen:
        output = case.logits()
    assert bool(mx.isfinite(output).all())
    return output, seen


@contextlib.contextmanager
def native_k(case: Case, k: int) -> Iterator[None]:
    """The model with its own k attribute changed, on whatever object its blocks read it from."""
    owners = {}
    for layer in case.layers:
        *path, name = layer.family.k.split(".")
        owner = layer.block
        for part in path:
            owner = getattr(owner, part)
        owners[id(owner)] = (owner, name, getattr(owner, name))
    # Stock bailing_moe crashes the process on a CPU at k = 1: its combination is compiled.
    if case.model_type == "bailing_moe":
        mx.disable_compile()
    try:
        for owner, name, _ in owners.values():
            setattr(owner, name, k)
        yield
    finally:
        for owner, name, before in owners.values():
            setattr(owner, name, before)
        mx.enable_compile()


@pytest.mark.parametrize("k", [1, 4])
def test_k_equals_the_model_with_its_own_k_changed(case: Case, k: int) -> None:
    output, seen = captured(case, k=k)
    assert all(got.expert_ids.shape[1] == got.expert_weights.shape[1] == k for got in seen)
    if case.model_type == "llama4":
        # The native block holds for one expert only. k = 1 is what it does anyway.
        assert same(output, case.plain) == (k == 1)
        return
    with native_k(case, k):
        assert same(output, case.logits())
    assert case.is_plain()


def test_the_models_own_k_by_our_rule_changes_no_bit(case: Case) -> None:
    output, _ = captured(case, k=case.layers[0].k)
    assert same(output, case.plain)


def test_masked_experts_never_appear(case: Case) -> None:
    with case.router.capture() as before:
        case.logits()
    favourites = {
        got.layer: Override(mask=[int(np.bincount(got.expert_ids.reshape(-1)).argmax())])
        for got in before
    }
    with case.router.override(favourites), case.router.capture() as seen:
        output = case.logits()
    for got in seen:
        assert not np.isin(got.expert_ids, favourites[got.layer].mask).any()
        assert np.isfinite(got.expert_weights).all()
        assert all(len(set(row)) == len(row) for row in got.expert_ids.tolist())
    assert bool(mx.isfinite(output).all())
    assert not same(output, case.plain)


def test_forced_experts_always_appear(case: Case) -> None:
    output, seen = captured(case, force=[5])
    assert all((got.expert_ids == 5).sum(1).min() == 1 for got in seen)
    assert all((got.expert_ids == 5).sum(1).max() == 1 for got in seen)
    assert not same(output, case.plain)


def test_ids_seen_and_given_back_change_no_bit(case: Case) -> None:
    raw = Raw("expert_ids")
    with case.router.recording(raw):
        case.logits()
    again = {layer: Override(ids=np.array(ids)) for (_, layer), ids in raw.forwards[0].items()}
    with case.router.override(again):
        assert case.is_plain()


def test_given_ids_are_used(case: Case) -> None:
    output, seen = captured(case, ids=[6, 1, 3])
    for got in seen:
        assert (np.sort(got.expert_ids, axis=-1) == [1, 3, 6]).all()
    assert not same(output, case.plain)


def test_a_bias_pulls_tokens_to_an_expert(case: Case) -> None:
    layer = case.layers[0].index
    with case.router.capture() as before:
        case.logits()

    def share(seen: Capture) -> np.ndarray:
        """Of each expert, the share of tokens that use it in the first MoE layer."""
        width = case.layers[0].router_width
        return np.array([(seen[layer].expert_ids == e).any(1).mean() for e in range(width)])

    shares = share(before)
    expert = int(np.abs(shares - 0.5).argmin())
    assert 0 < shares[expert] < 1, "the test needs an expert that some tokens use"
    output, _ = captured(case, bias={expert: 0.0})
    assert same(output, case.plain)
    _, towards = captured(case, bias={expert: 30.0})
    _, away = captured(case, bias={expert: -30.0})
    assert share(away)[expert] < shares[expert] < share(towards)[expert]


def test_scale_multiplies_the_weights_at_the_end(case: Case) -> None:
    width = case.layers[0].router_width
    output, _ = captured(case, scale=dict.fromkeys(range(width), 1.0))
    assert same(output, case.plain)
    values = ("expert_ids", "expert_weights", "routed_output")
    with case.router.capture(*values) as before:
        case.logits()
    _, none = captured(case, *values, scale=[0.0] * width)
    assert not any(got.routed_output.any() or got.expert_weights.any() for got in none)
    _, twice = captured(case, *values, scale=[2.0] * width)
    # The layers below the first MoE layer are unchanged, so it routes as before.
    one, two = next(iter(before)), next(iter(twice))
    assert np.array_equal(one.expert_ids, two.expert_ids)
    assert np.array_equal(2 * one.expert_weights, two.expert_weights)
    if case.model_type != "llama4":  # its weights stand before the nonlinearity
        assert np.array_equal(2 * one.routed_output, two.routed_output)


def test_one_layer_can_be_changed_alone(case: Case) -> None:
    *others, last = [layer.index for layer in case.layers]
    width, k = case.layers[0].router_width, case.layers[0].k
    with case.router.capture() as before:
        case.logits()
    with case.router.override({last: Override(k=3, mask=[0])}), case.router.capture() as seen:
        case.logits()
    assert seen[last].expert_ids.shape[1] == 3 != k < width
    assert 0 not in seen[last].expert_ids
    for layer in others:
        assert np.array_equal(seen[layer].expert_ids, before[layer].expert_ids)
        assert np.array_equal(seen[layer].expert_weights, before[layer].expert_weights)


def test_overrides_hold_while_generating(case: Case) -> None:
    with case.router.override(k=1, mask=[0]), case.router.capture() as seen:
        list(generate_step(mx.array(PROMPT), case.model, max_tokens=3))
    assert len(seen) >= len(PROMPT) + 2
    for got in seen:
        assert got.expert_ids.shape == (len(seen), 1)
        assert 0 not in got.expert_ids
    assert case.is_plain()
