"""The sums over many tokens against plain loops over every slot, written down here once more."""

from __future__ import annotations

import itertools
from fractions import Fraction

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from moe_lens.kernels import lazy_statistics, statistics
from moe_lens.kernels.lazy_statistics import lazy_route_sums
from moe_lens.kernels.statistics import (
    NO_EXPERT,
    coactivation,
    expert_counts,
    route_sums,
    transitions,
    weight_sums,
)


def counted(ids: np.ndarray, experts: int) -> np.ndarray:
    """[layers, E] by a loop over every slot."""
    table = np.zeros((len(ids), experts), np.int64)
    for place, expert in np.ndenumerate(ids):
        if expert != NO_EXPERT:
            table[place[0], int(expert)] += 1
    return table


def summed(ids: np.ndarray, weights: np.ndarray, experts: int) -> list[list[Fraction]]:
    """[layers, E] exact sums of the weights."""
    table = [[Fraction(0)] * experts for _ in ids]
    for place, expert in np.ndenumerate(ids):
        if expert != NO_EXPERT:
            table[place[0]][int(expert)] += Fraction(float(weights[place]))
    return table


def paired(first: np.ndarray, second: np.ndarray, experts: int) -> np.ndarray:
    """[layers, E, E] by a loop over every pair of slots of a token."""
    table = np.zeros((len(first), experts, experts), np.int64)
    for layer, (one, two) in enumerate(zip(first, second, strict=True)):
        for here, there in zip(one.tolist(), two.tolist(), strict=True):
            for i, j in itertools.product(here, there):
                if NO_EXPERT not in (i, j):
                    table[layer, i, j] += 1
    return table


@st.composite
def stacks(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, int]:
    """Ids, weights and E: empty slots, repeated ids, no tokens and single layers among them."""
    experts = draw(st.sampled_from([1, 2, 3, 8, 31]))
    shape = tuple(draw(st.integers(low, 5)) for low in (1, 0, 1))
    allowed = st.sampled_from([*range(experts), NO_EXPERT])
    ids = draw(
        hnp.arrays(draw(st.sampled_from([np.uint16, np.uint32, np.int64])), shape, elements=allowed)
    )
    weights = draw(hnp.arrays(np.float16, shape, elements=st.floats(0, 1, width=16)))
    return ids, weights, experts


def distinct(layers: int, tokens: int, experts: int, k: int) -> np.ndarray:
    """Random ids as a router gives them, no id twice in a token."""
    order = np.random.default_rng(tokens + experts).random((layers, tokens, experts)).argsort(-1)
    return order[..., :k].astype(np.uint16)


def exactly(got: np.ndarray, wanted: np.ndarray, dtype: type = np.int64) -> None:
    assert got.dtype == dtype
    assert got.flags.c_contiguous
    np.testing.assert_array_equal(got, wanted)


@settings(max_examples=120, deadline=None)
@given(stacks())
def test_sums_are_those_of_a_loop(stack):
    ids, weights, experts = stack
    sums = route_sums(ids, weights, experts)
    exactly(sums.counts, counted(ids, experts))
    exactly(sums.coactivation, paired(ids, ids, experts))
    exactly(sums.weight_sums, np.array(summed(ids, weights, experts), float), np.float64)
    exactly(transitions(ids, experts), paired(ids[:-1], ids[1:], experts))


@settings(max_examples=60, deadline=None)
@given(stacks())
def test_lazy_sums_are_the_same_integers(stack):
    ids, weights, experts = stack
    sums = lazy_route_sums(mx.array(ids), mx.array(weights), experts)
    assert (sums.counts.dtype, sums.coactivation.dtype) == (mx.int32, mx.int32)
    np.testing.assert_array_equal(np.array(sums.counts), counted(ids, experts))
    np.testing.assert_array_equal(np.array(sums.coactivation), paired(ids, ids, experts))
    wanted = np.array(summed(ids, weights, experts), float)
    # Each of at most 25 additions rounds by half a unit in the last place of float32.
    np.testing.assert_allclose(np.array(sums.weight_sums), wanted, rtol=25 * 2.0**-24)


@pytest.mark.parametrize("tokens", [15, 16, 17, 100], ids=lambda tokens: f"{tokens}_tokens")
def test_few_and_many_pairs_count_alike(tokens):
    """16 tokens with k = 4 are as many pairs as the 16 x 16 table has cells."""
    ids = distinct(3, tokens, 16, 4)
    ids[1, ::3, 2] = NO_EXPERT
    exactly(coactivation(ids, 16), paired(ids, ids, 16))
    exactly(transitions(ids, 16), paired(ids[:-1], ids[1:], 16))


@pytest.mark.parametrize("layers", [0, 2], ids=["too_large_to_join", "two_at_once"])
def test_layers_are_joined_in_groups(monkeypatch, layers):
    """Of 5 layers of 3 tokens with 2 slots, so 4 pairs, the fifth stands alone either way."""
    monkeypatch.setattr(statistics, "_PAIRS_AT_ONCE", layers * 3 * 4)
    monkeypatch.setattr(statistics, "_SLOTS_AT_ONCE", layers * 3 * 2)
    ids = distinct(5, 3, 16, 2)
    ids[3, 1, 1] = NO_EXPERT
    weights = np.random.default_rng(0).random(ids.shape).astype(np.float16)
    exactly(expert_counts(ids, 16), counted(ids, 16))
    wanted = np.array(summed(ids, weights, 16), float)
    exactly(weight_sums(ids, weights, 16), wanted, np.float64)
    exactly(coactivation(ids, 16), paired(ids, ids, 16))
    exactly(transitions(ids, 16), paired(ids[:-1], ids[1:], 16))


def test_chunks_of_tokens_add_up(monkeypatch):
    ids = distinct(2, 50, 8, 3)
    weights = np.random.default_rng(0).random(ids.shape).astype(np.float16)
    monkeypatch.setattr(statistics, "_CHUNK", 7)
    monkeypatch.setattr(lazy_statistics, "_ONE_HOT_BYTES", 7 * 4 * 2 * 9)
    exactly(coactivation(ids, 8), paired(ids, ids, 8))
    exactly(transitions(ids, 8), paired(ids[:-1], ids[1:], 8))
    sums = lazy_route_sums(mx.array(ids), mx.array(weights), 8)
    np.testing.assert_array_equal(np.array(sums.counts), counted(ids, 8))
    np.testing.assert_array_equal(np.array(sums.coactivation), paired(ids, ids, 8))
    wanted = np.array(summed(ids, weights, 8), float)
    np.testing.assert_allclose(np.array(sums.weight_sums), wanted, rtol=50 * 2.0**-24)


@pytest.mark.parametrize("experts", [255, 256], ids=lambda experts: f"{experts}_experts")
def test_bytes_hold_ids_up_to_255(experts):
    ids = np.array([[[0, 7], [254, experts - 1]]], np.uint8)
    exactly(expert_counts(ids, experts), counted(ids, experts))
    exactly(coactivation(ids, experts), paired(ids, ids, experts))


def test_layers_of_another_memory_order():
    ids = distinct(2, 40, 8, 3)
    turned = np.asfortranarray(ids)
    weights = np.asfortranarray(np.random.default_rng(1).random(ids.shape).astype(np.float16))
    exactly(expert_counts(turned, 8), counted(ids, 8))
    exactly(coactivation(turned, 8), paired(ids, ids, 8))
    wanted = np.array(summed(ids, weights, 8), float)
    exactly(weight_sums(turned, weights, 8), wanted, np.float64)


def test_empty_slots_keep_their_weights_to_themselves():
    ids = np.array([[[0, NO_EXPERT]]], np.uint16)
    weights = np.array([[[0.5, np.nan]]], np.float32)
    exactly(weight_sums(ids, weights, 2), np.array([[0.5, 0]]), np.float64)
    lazy = lazy_route_sums(mx.array(ids), mx.array(weights), 2)
    assert lazy.weight_sums.tolist() == [[0.5, 0]]


def test_float32_weights_are_not_rounded_first():
    ids = np.zeros((1, 2, 1), np.uint16)
    weights = np.full(ids.shape, 1 / 3, np.float32)
    wanted = np.array([[2 * float(np.float32(1 / 3))]])
    exactly(weight_sums(ids, weights, 1), wanted, np.float64)
    lazy = lazy_route_sums(mx.array(ids), mx.array(weights), 1)
    assert lazy.weight_sums.tolist() == wanted.tolist()


def test_half_precision_weights_sum_exactly_in_any_order():
    """The smallest float16 beside many large ones: float32 would lose it."""
    weights = np.full((1, 4096, 1), 1.0, np.float16)
    weights[0, 0] = 2.0**-24
    ids = np.zeros((1, 4096, 1), np.uint16)
    exact = 4095 + 2.0**-24
    assert float(np.float32(exact)) != exact
    for order in (slice(None), slice(None, None, -1)):
        exactly(weight_sums(ids, weights[:, order], 1), np.array([[exact]]), np.float64)


def test_nothing_is_evaluated():
    """While MLX traces a compiled function, evaluating an array is an error."""
    ids, weights = mx.array(distinct(2, 6, 8, 3)), mx.ones((2, 6, 3))

    def sums(ids: mx.array, weights: mx.array) -> tuple[mx.array, mx.array]:
        found = lazy_route_sums(ids, weights, 8)
        return found.counts, found.coactivation

    def evaluated(ids: mx.array, weights: mx.array) -> tuple[mx.array, mx.array]:
        mx.eval(found := sums(ids, weights))
        return found

    counts, _ = mx.compile(sums)(ids, weights)
    np.testing.assert_array_equal(np.array(counts), counted(np.array(ids), 8))
    with pytest.raises(ValueError, match="during function transformations"):
        mx.compile(evaluated)(ids, weights)


@pytest.mark.slow
def test_more_tokens_than_float32_can_count():
    tokens = 2**24 + 3
    ids = mx.zeros((1, tokens, 1), mx.uint8)
    sums = lazy_route_sums(ids, mx.zeros(ids.shape), 1)
    assert sums.counts.tolist() == [[tokens]]
    assert sums.coactivation.tolist() == [[[tokens]]]


def test_refusals_say_what_to_do():
    ids, weights = np.zeros((1, 2, 2), np.uint16), np.zeros((1, 2, 2))
    with pytest.raises(ValueError, match=r"not \[layers, tokens, k\].*ids\[None\]"):
        expert_counts(ids[0], 4)
    with pytest.raises(ValueError, match="0 experts cannot be counted: give 1 to 65535"):
        coactivation(ids, 0)
    with pytest.raises(ValueError, match="one weight for each id"):
        route_sums(ids, weights[:, :1], 4)
    for wrong in (4, 65534, -1):
        bad = ids.astype(np.int32)
        bad[0, 1, 1] = wrong
        for count in (expert_counts, coactivation, transitions):
            with pytest.raises(ValueError, match=f"id {wrong} is no expert of 4: .* width"):
                count(bad, 4)
    with pytest.raises(ValueError, match="do not fit: both are"):
        lazy_route_sums(mx.array(ids), mx.array(weights[:, :1]), 4)
    with pytest.raises(ValueError, match="do not fit: both are"):
        lazy_route_sums(mx.array(ids[0]), mx.array(weights[0]), 4)
    many = mx.broadcast_to(mx.array(0), (1, 2**31 // 64, 8))
    with pytest.raises(ValueError, match="several calls"):
        lazy_route_sums(many, many, 4)
