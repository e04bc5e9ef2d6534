"""The fused kernel against the formulas in numpy, token by token, in float32."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import assume, given, settings

from moe_lens.kernels import Groups, Routed, Rule, expert_scores
from routing_cases import DTYPES, Question, as_float, questions, tied_logits
from routing_oracle import Answer, answer, score, scores_of

Factory = Callable[..., Any]

NEAR = 1e-4
"""Selection scores this close may be told apart the other way round after a rounding."""


def plain(array: mx.array | None) -> np.ndarray | None:
    return None if array is None else np.array(array.astype(mx.float32)).astype(np.float64)


def in_float32(question: Question) -> Question:
    """`question` with every array in float32."""

    def cast(array: mx.array | None) -> mx.array | None:
        return None if array is None else array.astype(mx.float32)

    rule = replace(
        question.rule,
        selection_bias=cast(question.rule.selection_bias),
        per_expert_scale=cast(question.rule.per_expert_scale),
        cast="no",
    )
    changes = question.changes | {name: cast(question.changes[name]) for name in ("bias", "scale")}
    return Question(rule, question.logits.astype(mx.float32), question.k, changes)


def answers(question: Question, scores: np.ndarray) -> list[Answer]:
    named = {
        name: None if array is None else np.array(array)
        for name, array in question.changes.items()
        if name in ("mask", "force")
    }
    ids = question.changes.get("ids")
    scale = plain(question.changes.get("scale"))
    rows = [None] * len(scores) if ids is None else ids.tolist()
    with np.errstate(invalid="ignore"):
        return [
            answer(question.rule, row, question.k, **named, scale=scale, ids=given_ids)
            for row, given_ids in zip(scores, rows, strict=True)
        ]


def assert_as_answered(got: Routed, expected: list[Answer], *, rtol: float, margins: bool) -> None:
    ids, weights = np.array(got.ids), as_float(got.weights)
    for token, wanted in enumerate(expected):
        assert sorted(ids[token]) == sorted(wanted.ids)
        by_formula = [wanted.weights[e] for e in ids[token].tolist()]
        np.testing.assert_allclose(weights[token], by_formula, rtol=rtol, atol=1e-30)
        np.testing.assert_allclose(got.entropy[token].item(), wanted.entropy, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(got.mass[token].item(), wanted.mass, rtol=1e-5, atol=1e-6)
        if margins:
            assert got.margin[token].item() == wanted.margin


def some_expert_is_left(rule: Rule, scores: np.ndarray) -> bool:
    """Whether every token has a router distribution: not all of its experts are masked."""
    left = np.isfinite(scores) if rule.score == "identity" else scores > 0
    return bool(left.any(-1).all())


def rounding_of(question: Question) -> float:
    """How far float32 may take a weight: further where its terms may cancel in a sum."""
    signed = question.rule.score == "identity" and question.rule.score_chosen is None
    return 1e-2 if signed and question.rule.normalise != "no" else 5e-6


@settings(max_examples=300, deadline=None)
@given(question=questions(special=False))
def test_given_scores_are_routed_by_the_formulas(
    question: Question, kernel_factory: Factory
) -> None:
    question = in_float32(question)
    bias = question.changes.get("bias")
    logits = question.logits if bias is None else question.logits + bias
    scores = np.array(expert_scores(question.rule, logits, question.changes.get("mask")))
    assume(some_expert_is_left(question.rule, scores))
    expected = answers(question, scores)
    assume(all(np.isfinite(list(each.weights.values())).all() for each in expected))
    assert_as_answered(
        question.by_kernel(kernel_factory), expected, rtol=rounding_of(question), margins=True
    )


@settings(max_examples=300, deadline=None)
@given(question=questions(special=False))
def test_scores_computed_in_the_kernel_follow_the_formulas(
    question: Question, kernel_factory: Factory
) -> None:
    question = in_float32(question)
    scores = scores_of(
        question.rule,
        np.array(question.logits),
        question.changes.get("mask")
        if question.changes.get("mask") is None
        else np.array(question.changes["mask"]),
        plain(question.changes.get("bias")),
    )
    assume(some_expert_is_left(question.rule, scores))
    expected = answers(question, scores)
    assume(all(np.isfinite(list(each.weights.values())).all() for each in expected))
    given_ids = question.changes.get("ids") is not None
    assume(all(each.margin > NEAR or given_ids for each in expected))
    got = question.by_kernel(kernel_factory, one_launch=True)
    assert_as_answered(got, expected, rtol=max(2e-5, rounding_of(question)), margins=False)


KINDS = ("softmax_precise", "softmax_float32", "sigmoid", "sigmoid_float32")


@pytest.mark.parametrize("kind", [*KINDS, "sqrt_softplus_float32"])
def test_the_kernel_s_own_scores_in_float32_are_within_a_few_units(
    kind: str, kernel_factory: Factory
) -> None:
    logits = np.random.default_rng(8).normal(size=(64, 32)).astype(np.float32) * 6
    question = Question(Rule(kind), mx.array(logits), 32)
    got = question.by_kernel(kernel_factory, one_launch=True)
    wanted = np.take_along_axis(score(kind, logits), np.array(got.ids).astype(int), -1)
    ordered = np.take_along_axis(logits, np.array(got.ids).astype(int), -1)
    # A softmax takes the exponential of a rounded difference from the largest logit.
    rounded = np.abs(ordered - ordered.max(-1, keepdims=True)) if "softmax" in kind else 0
    assert (np.abs(as_float(got.weights) / wanted - 1) <= (8 + rounded) * 2**-23).all()


@pytest.mark.parametrize("kind", [*KINDS, "softmax"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_the_kernel_s_own_scores_in_16_bits_are_rounded_once(
    kind: str, dtype: str, kernel_factory: Factory
) -> None:
    values = mx.array(np.random.default_rng(9).normal(size=(64, 32)) * 3).astype(DTYPES[dtype])
    got = Question(Rule(kind), values, 32).by_kernel(kernel_factory, one_launch=True)
    if kind in ("softmax", "sigmoid"):
        # Every step of it is rounded, in the backend's own way: fed in, so MLX's.
        own = mx.take_along_axis(expert_scores(Rule(kind), values), got.ids, axis=-1)
        assert bool(mx.array_equal(got.weights, own))
        return
    exact = np.take_along_axis(score(kind, as_float(values)), np.array(got.ids).astype(int), -1)
    rounded = mx.array(exact.astype(np.float32)).astype(got.weights.dtype)
    share = (as_float(got.weights) == as_float(rounded)).mean()
    assert share > (0.995 if got.weights.dtype != mx.float32 else 0.2)
    np.testing.assert_allclose(as_float(got.weights), exact, rtol=2**-8, atol=2**-24)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_scores_in_16_bits_are_rounded_before_they_are_summed(
    dtype: str, kernel_factory: Factory
) -> None:
    values = mx.array(np.random.default_rng(10).normal(size=(64, 32))).astype(DTYPES[dtype])
    question = Question(Rule("softmax_precise", side="sorted", normalise="sum"), values, 8)
    got = question.by_kernel(kernel_factory, one_launch=True)
    ids, weights = question.by_reference()
    place = np.argsort(np.array(got.ids), axis=-1)
    wanted = np.argsort(np.array(ids), axis=-1)
    mine = np.take_along_axis(as_float(got.weights), place, -1)
    theirs = np.take_along_axis(as_float(weights), wanted, -1)
    assert (mine == theirs).mean() > 0.97


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_sigmoid_of_the_chosen_in_16_bits_is_rounded_before_it_is_scaled(
    dtype: str, kernel_factory: Factory
) -> None:
    kind = DTYPES[dtype]
    values = mx.array(np.random.default_rng(11).normal(size=(64, 32))).astype(kind)
    rule = Rule("identity", score_chosen="sigmoid", scale=1.7)
    got = Question(rule, values, 32).by_kernel(kernel_factory)
    chosen = np.take_along_axis(as_float(values), np.array(got.ids).astype(int), -1)
    own = as_float(mx.array(score("sigmoid", chosen).astype(np.float32)).astype(kind))
    scale = as_float(mx.array(1.7).astype(kind))  # a number takes the dtype it is times with
    wanted = as_float(mx.array((own * scale).astype(np.float32)).astype(kind))
    assert (as_float(got.weights) == wanted).mean() > 0.99


@pytest.mark.parametrize("shift", [-500.0, 500.0])
@pytest.mark.parametrize("kind", ["identity", "softmax_float32"])
def test_logits_far_from_0_neither_vanish_nor_overflow(
    kind: str, shift: float, kernel_factory: Factory
) -> None:
    question = Question(
        Rule(kind, score_chosen="softmax_precise" if kind == "identity" else None),
        tied_logits((4, 40), 11) + shift,
        5,
    )
    scores = scores_of(question.rule, np.array(question.logits), None, None)
    got = question.by_kernel(kernel_factory, one_launch=True)
    assert_as_answered(got, answers(question, scores), rtol=1e-5, margins=False)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_scores_that_only_rounding_makes_equal_tie(dtype: str, kernel_factory: Factory) -> None:
    # Neighbouring logits in 16 bits, so that many a pair has one softmax in 16 bits.
    steps = np.arange(64) * {"float16": 2.0**-12, "bfloat16": 2.0**-9}[dtype]
    random = np.random.default_rng(12)
    logits = mx.array(np.stack([0.25 + random.permutation(steps) for _ in range(64)]))
    question = Question(Rule("softmax_precise"), logits.astype(DTYPES[dtype]), 8)
    got = np.sort(np.array(question.by_kernel(kernel_factory, one_launch=True).ids), -1)
    wanted = np.sort(np.array(question.by_reference()[0]), -1)
    assert (got == wanted).all(-1).mean() > 0.95
    without_ties = np.sort(np.array(mx.argsort(-question.logits, axis=-1)[:, :8]), -1)
    assert (without_ties == wanted).all(-1).mean() < 0.8


def test_groups_that_tie_drop_the_lower_index(kernel_factory: Factory) -> None:
    # Four equal groups of two, two are kept: the last two. Ties inside them go by the side.
    logits = mx.array([[1.0, 0.0] * 4, [0.5] * 8])
    for side, expected in (("low", [[4, 6], [4, 5]]), ("high", [[4, 6], [6, 7]])):
        rule = Rule("sigmoid_float32", groups=Groups(4, 2), side=side)
        got = Question(rule, logits, 2).by_kernel(kernel_factory)
        assert np.sort(np.array(got.ids), -1).tolist() == expected


def test_a_tie_has_margin_0_and_no_expert_left_over_an_infinite_one(
    kernel_factory: Factory,
) -> None:
    rule = Rule("softmax_precise")
    assert Question(rule, mx.zeros((1, 8)), 3).by_kernel(kernel_factory).margin.tolist() == [0.0]
    full = Question(rule, tied_logits((1, 8), 0), 8).by_kernel(kernel_factory)
    assert full.margin.tolist() == [float("inf")]
    np.testing.assert_allclose(np.array(full.mass), [1.0], rtol=1e-6)
    even = Question(rule, mx.zeros((1, 8)), 3).by_kernel(kernel_factory)
    np.testing.assert_allclose(np.array(even.entropy), [np.log(8)], rtol=1e-6)
