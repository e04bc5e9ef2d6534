"""The fused kernel against the reference: every rule, dtype and shape, ties, NaN and infinities.

Ids and margins must agree exactly, and weights too, unless a softmax or sigmoid of the chosen
experts is computed in the kernel.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import cycle, islice
from typing import Any
from unittest import mock

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings

import metal_emulator
from moe_lens.kernels import Groups, Routed, Rule, fused_route, unsupported
from moe_lens.kernels.body import BODY, WHOLE, header
from moe_lens.kernels.identity_cache import IdentityCache
from moe_lens.kernels.parameters import Changes, parameters
from routing_cases import (
    DTYPES,
    Question,
    as_float,
    assert_as_reference,
    by_id,
    family_rules,
    flags,
    questions,
    slots_as_sorted,
    tied_logits,
    units_apart,
    widened,
)
from tiny_models import CONFIGS

Factory = Callable[..., Any]
INFINITY = float("inf")
FAMILIES = sorted(set(CONFIGS) - {"phimoe"})

UNITS = {mx.float32: 40, mx.float16: 1, mx.bfloat16: 1}
"""Of a softmax or sigmoid of the chosen against MLX's on a CPU, whose exponential is off by up to
17 units of float32 in a softmax of 8. test_kernels_oracle.py holds the kernel to the formula."""


def units_if_exact(rule: Rule) -> int | None:
    """0 where weights agree bit for bit; a score of the chosen can be off by any rule's scale."""
    return 0 if rule.score_chosen in (None, "identity") else None


def check(question: Question, factory: Factory, **options: Any) -> None:
    units = units_if_exact(question.rule)
    if units is None:
        units = UNITS[question.by_reference()[1].dtype]
    assert_as_reference(question, factory, units=units, **options)


def all_changes(experts: int, tokens: int, k: int, seed: int) -> list[dict[str, mx.array]]:
    """No change; all at once; and given ids."""
    random = np.random.default_rng(seed)
    rows = np.argsort(random.random((tokens, experts)), axis=-1)[:, :k]
    return [
        {},
        {
            "mask": flags(experts, 1, 3),
            "force": flags(experts, 2),
            "bias": mx.array(random.normal(size=experts)).astype(mx.float32),
            "scale": mx.array(random.uniform(0, 2, experts)).astype(mx.float32),
        },
        {"ids": mx.array(rows.astype(np.uint32))},
    ]


@pytest.mark.parametrize("name", FAMILIES)
def test_every_rule_of_the_families(name: str, kernel_factory: Factory) -> None:
    number = FAMILIES.index(name)
    for dtype, wide in itertools.product(DTYPES, (False, True)):
        built = "bfloat16" if dtype == "bfloat16" else "float32"
        rule, experts, k = family_rules(built)[name]
        if wide:
            experts, k = 64, 8
            rule = widened(rule, experts)
        logits = tied_logits((3, experts), number, DTYPES[dtype])
        for changes in all_changes(experts, 3, k, number):
            question = Question(rule, logits, k, changes, mx.bfloat16)
            check(question, kernel_factory)
        check(Question(rule, logits, k + 1, {}, mx.float16), kernel_factory)


@pytest.mark.parametrize("experts", [1, 5, 7, 31, 32, 33, 60, 64, 100, 128, 257, 512, 1024])
def test_widths_and_numbers_of_experts_per_token(experts: int, kernel_factory: Factory) -> None:
    rules = [
        Rule("softmax_precise", normalise="sum"),
        Rule("identity", score_chosen="softmax_precise", side="high"),
        Rule("sigmoid_float32", side="sorted", normalise="sum", cast="input"),
    ]
    for place, k in enumerate(sorted({1, min(2, experts), min(8, experts), min(32, experts)})):
        for rule, dtype in zip(rules, islice(cycle(DTYPES), place, None), strict=False):
            logits = tied_logits((3, experts), experts + k, DTYPES[dtype])
            check(Question(rule, logits, k, {}, DTYPES[dtype]), kernel_factory)


@pytest.mark.parametrize("shape", [(1,), (2,), (3,), (5,), (64,), (2, 3), (1, 1, 4), ()])
def test_numbers_of_tokens(shape: tuple[int, ...], kernel_factory: Factory) -> None:
    rule = Rule("softmax_precise", side="high", normalise="sum")
    check(Question(rule, tied_logits((*shape, 24), 3, mx.bfloat16), 5), kernel_factory)
    ids = mx.broadcast_to(mx.array([7, 3, 11], mx.int32), (*shape, 3))
    check(Question(rule, tied_logits((*shape, 24), 3), 3, {"ids": ids}), kernel_factory)


@pytest.mark.parametrize("shape", [(0,), (2, 0)])
def test_no_tokens_need_no_kernel(shape: tuple[int, ...]) -> None:
    def no_factory(*_: Any, **__: Any) -> None:
        raise AssertionError("a kernel was built")

    rule = Rule("sigmoid_float32", cast="logits")
    logits = mx.zeros((*shape, 8), mx.float16)
    routed = fused_route(rule, logits, 3, factory=no_factory)
    assert routed.ids.shape == routed.weights.shape == (*shape, 3)
    assert (routed.ids.dtype, routed.weights.dtype) == (mx.uint32, mx.float16)
    for each in (routed.entropy, routed.margin, routed.mass):
        assert (each.shape, each.dtype) == (shape, mx.float32)


def test_logits_that_are_a_view(kernel_factory: Factory) -> None:
    logits = tied_logits((40, 6), 1).T
    check(Question(Rule("identity", side="high"), logits, 4), kernel_factory)


@settings(max_examples=400, deadline=None)
@given(question=questions(special=False))
def test_any_rule(question: Question, kernel_factory: Factory) -> None:
    assert_as_reference(question, kernel_factory, units=units_if_exact(question.rule))


@settings(max_examples=400, deadline=None)
@given(question=questions(special=True))
def test_nan_infinities_and_masked_rows(question: Question, kernel_factory: Factory) -> None:
    with np.errstate(all="ignore"):
        assert_as_reference(question, kernel_factory, units=units_if_exact(question.rule))


@pytest.mark.parametrize("side", ["low", "high", "sorted"])
def test_masked_stay_out_and_forced_stay_in_where_logits_are_nan(
    side: str, kernel_factory: Factory
) -> None:
    logits = mx.array([[np.nan] * 8, [np.nan, 1e38] * 4, [-1e38, np.nan] * 4, [0.0] * 8])
    rule = Rule("identity", side=side)
    changes = {"mask": flags(8, 0, 4, 7), "force": flags(8, 2)}
    routed = assert_as_reference(Question(rule, logits, 3, changes), kernel_factory, units=0)
    for row in routed.ids.tolist():
        assert 2 in row
        assert not {0, 4, 7} & set(row)


# Dtypes -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("kind", ["softmax", "softmax_precise"])
def test_a_softmax_of_the_chosen_in_16_bits_agrees_to_the_last_bit(
    kind: str, dtype: str, kernel_factory: Factory
) -> None:
    # `softmax` rounds after every step: it is off by up to 16 units where only the end is rounded.
    rule = Rule("identity", score_chosen=kind, side="high")
    for k in (2, 8, 32):
        logits = mx.array(np.random.default_rng(k).normal(size=(64, 40)) * 2).astype(DTYPES[dtype])
        question = Question(rule, logits, k)
        got = assert_as_reference(question, kernel_factory, units=1)
        with slots_as_sorted():
            wanted = by_id(*question.by_reference())[1]
        apart = units_apart(by_id(got.ids, got.weights)[1], wanted)
        assert (apart == 0).mean() > 0.998


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_partial_sums_are_rounded_where_the_backend_rounds_them(
    dtype: str, kernel_factory: Factory
) -> None:
    # Metal adds rows of 16 bits in 16 bits, the CPU in float32.
    logits = mx.array(np.random.default_rng(4).normal(size=(20, 32))).astype(DTYPES[dtype])
    question = Question(Rule("softmax_precise", side="sorted", normalise="sum"), logits, 16)
    got, other = (
        _with_default_device(device, question, kernel_factory) for device in (mx.gpu, mx.cpu)
    )
    scores = mx.take_along_axis(mx.softmax(logits, axis=-1, precise=True), got.ids, axis=-1)
    total = mx.zeros((20, 1), DTYPES[dtype])
    for slot in range(16):
        total = total + scores[:, slot : slot + 1]
    assert bool(mx.array_equal(got.weights, scores / total))
    assert not bool(mx.array_equal(other.weights, got.weights))


def _with_default_device(kind: mx.DeviceType, question: Question, factory: Factory) -> Routed:
    with mock.patch.object(mx, "default_device", return_value=mx.Device(kind, 0)):
        return question.by_kernel(factory)


@pytest.mark.parametrize("kind", ["softmax", "softmax_precise", "sigmoid_float32"])
def test_a_score_of_the_chosen_is_rounded_before_it_is_scaled(
    kind: str, kernel_factory: Factory
) -> None:
    rule = Rule("identity", score_chosen=kind, side="sorted", scale=1.7, cast="logits")
    logits = mx.array(np.random.default_rng(13).normal(size=(64, 24))).astype(mx.bfloat16)
    question = Question(rule, logits, 6)
    got = assert_as_reference(question, kernel_factory, units=2)
    wanted = by_id(*question.by_reference())[1]
    assert (units_apart(by_id(got.ids, got.weights)[1], wanted) == 0).mean() > 0.99


def test_a_per_expert_scale_rounds_before_the_cast(kernel_factory: Factory) -> None:
    per_expert = mx.array(np.random.default_rng(15).uniform(0.5, 1.5, 24)).astype(mx.bfloat16)
    rule = Rule("softmax_precise", per_expert_scale=per_expert, cast="input")
    question = Question(rule, tied_logits((16, 24), 16, mx.bfloat16), 6, {}, mx.float32)
    check(question, kernel_factory)


# Groups -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_group_scores_are_rounded_so_groups_may_tie(dtype: str, kernel_factory: Factory) -> None:
    logits = mx.array(np.random.default_rng(14).normal(size=(64, 64))).astype(DTYPES[dtype])
    check(Question(Rule("identity", groups=Groups(16, 5)), logits, 4), kernel_factory)


@pytest.mark.parametrize("score", ["top2", "max"])
@pytest.mark.parametrize("zero", [True, False])
def test_up_to_32_groups(score: str, zero: bool, kernel_factory: Factory) -> None:
    for keep in (1, 5, 31):
        rule = Rule("sigmoid_float32", groups=Groups(32, keep, score, 0.9, zero_scores=zero))
        check(Question(rule, tied_logits((16, 96), keep), 7), kernel_factory)


@pytest.mark.parametrize("side", ["low", "high"])
def test_a_group_of_infinities_of_both_signs_is_kept(side: str, kernel_factory: Factory) -> None:
    logits = mx.array([[1.0, 2.0, INFINITY, -INFINITY, 5.0, 6.0, 3.0, 4.0]])
    rule = Rule("identity", side=side, groups=Groups(4, 1, fill=-100.0))
    got = assert_as_reference(Question(rule, logits, 1), kernel_factory, units=0)
    assert got.ids.tolist() == [[2]]


# The machinery ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rule", "experts", "k", "dtype", "part"),
    [
        (Rule("softmax"), 1025, 8, mx.float32, "1025 experts"),
        (Rule("softmax"), 64, 33, mx.float32, "33 experts per token"),
        (Rule("softmax"), 64, 0, mx.float32, "0 experts per token"),
        (Rule("softmax"), 8, 9, mx.float32, "9 experts per token out of 8"),
        (Rule("softmax"), 8, 2, mx.float64, "float64"),
        (Rule("softmax", selection_bias=mx.zeros(7)), 8, 2, mx.float32, "selection bias"),
        (
            Rule("softmax", per_expert_scale=mx.zeros(8, mx.int32)),
            8,
            2,
            mx.float32,
            "per-expert scale",
        ),
        (Rule("softmax", groups=Groups(64, 2)), 128, 2, mx.float32, "64 groups"),
        (Rule("softmax", groups=Groups(3, 2)), 8, 2, mx.float32, "unequal"),
        (Rule("softmax", groups=Groups(8, 2)), 8, 2, mx.float32, "groups of one expert"),
    ],
)
def test_what_the_kernel_does_not_take_is_refused_with_the_reason(
    rule: Rule, experts: int, k: int, dtype: mx.Dtype, part: str
) -> None:
    reason = unsupported(rule, experts, k, dtype)
    assert reason is not None
    assert part in reason
    if dtype != mx.float64:
        with pytest.raises(ValueError, match=r"use the reference, moe_lens\.kernels\.route"):
            fused_route(rule, mx.zeros((2, experts), dtype), k)


def test_what_the_kernel_takes_is_not_refused() -> None:
    assert unsupported(Rule("softmax"), 1024, 32, mx.float16) is None
    assert unsupported(Rule("softmax", groups=Groups(32, 2)), 64, 1, mx.bfloat16) is None
    grouped = Rule("softmax", groups=Groups(8, 2, "max"))
    assert unsupported(grouped, 8, 8, mx.float32) is None


def test_an_expert_both_masked_and_forced_is_refused() -> None:
    changes = Changes(mask=flags(8, 1, 2), force=flags(8, 2))
    with pytest.raises(ValueError, match=r"experts \[2\] are both masked and forced"):
        parameters(Rule("softmax"), changes, 8, mx.float32, given_scores=True)


def test_parameters_have_8_elements_and_are_built_once() -> None:
    rule = Rule("softmax", normalise="sum", normalise_from_k=2)
    build = functools.partial(parameters, rule, experts=1, logits=mx.float32, given_scores=True)
    first = build(changes=Changes())
    whole = first.call(3, 1, rule.normalise_from_k)
    assert min(first.per_expert.size, first.real.size, whole.size) >= 8
    assert build(changes=Changes()) is first
    assert first.call(3, 1, rule.normalise_from_k) is whole
    assert build(changes=Changes(mask=flags(1, 0))) is not first
    assert dict(zip(WHOLE, whole.tolist(), strict=True))["normalise"] == 0
    assert first.call(4, 2, rule.normalise_from_k).tolist() != whole.tolist()


def test_a_cache_by_identity_knows_objects_apart_and_lets_the_oldest_go() -> None:
    cache: IdentityCache[int] = IdentityCache(most=2)
    rules = [Rule("softmax") for _ in range(3)]
    assert [cache.get((rule,), (), lambda i=i: i) for i, rule in enumerate(rules)] == [0, 1, 2]
    assert cache.get((rules[2],), (), lambda: 7) == 2
    assert cache.get((rules[2],), (1,), lambda: 8) == 8
    assert cache.get((rules[1],), (), lambda: 9) == 9


def test_one_program_serves_all_rules_and_overrides(kernel_factory: Factory) -> None:
    programs = set()

    def factory(name: str, inputs: Any, outputs: Any, source: str, header: str) -> Any:
        kernel = kernel_factory(name, inputs, outputs, source, header=header)

        def call(**arguments: Any) -> Any:
            programs.add((source, str(arguments["template"])))
            return kernel(**arguments)

        return call

    logits = tied_logits((2, 16), 0)
    for rule in (
        Rule("softmax_precise", normalise="sum", side="high"),
        Rule("identity", score_chosen="softmax_float32"),
        Rule("sigmoid_float32", selection_bias=mx.ones(16), groups=Groups(4, 2), scale=2.5),
    ):
        for changes in all_changes(16, 2, 3, 0):
            check(Question(rule, logits, 3, changes), factory)
        check(Question(rule, logits, 5), factory)
    assert len(programs) == 1


# The emulator's own detectors, and the other language ------------------------------------------


def some_questions() -> list[Question]:
    """Every step of the body at least once, few launches."""
    bias = mx.array(np.random.default_rng(5).uniform(-0.3, 0.3, 40).astype(np.float32))
    grouped = Rule(
        "sigmoid_float32",
        selection_bias=bias,
        groups=Groups(4, 2),
        normalise="sum",
        epsilon=1e-20,
        scale=2.5,
        cast="input",
    )
    rules = [
        grouped,
        replace(grouped, side="high", groups=Groups(8, 3, "max", -INFINITY, zero_scores=True)),
        Rule("softmax_precise", side="high", normalise="l1"),
        Rule("identity", score_chosen="softmax", per_expert_scale=bias + 1),
    ]
    logits = tied_logits((5, 40), 6, mx.bfloat16)
    return [
        Question(rule, logits, 6, changes, mx.bfloat16)
        for rule in rules
        for changes in all_changes(40, 5, 6, 7)
    ]


@pytest.fixture
def on_cpu() -> Iterator[None]:
    """The emulator is compared with the CPU's reference on a Mac, too."""
    before = mx.default_device()
    mx.set_default_device(mx.cpu)
    yield
    mx.set_default_device(before)


@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize("order", ["reverse", "random"])
def test_any_order_of_the_lanes_gives_the_same(order: str) -> None:
    factory = functools.partial(metal_emulator.metal_kernel, order=order, seed=3)
    for question in some_questions():
        check(question, factory)


@pytest.mark.usefixtures("on_cpu")
def test_nothing_outside_an_array_is_touched() -> None:
    factory = functools.partial(metal_emulator.metal_kernel, sanitize=True)
    for question in some_questions():
        check(question, factory)
    for experts in (64, 66):
        rule = Rule("softmax_float32", groups=Groups(2, 1))
        question = Question(rule, tied_logits((2, experts), 1), 32)
        check(question, factory)
        question.by_kernel(factory, one_launch=True)


@pytest.mark.usefixtures("on_cpu")
def test_the_same_body_as_cuda() -> None:
    for question in some_questions():
        check(question, metal_emulator.cuda_kernel, language="cuda")
    for tokens, experts in ((1, 5), (7, 128), (2, 1024)):
        rule = Rule("softmax_precise", normalise="sum")
        question = Question(rule, tied_logits((tokens, experts), 2), 4)
        check(question, metal_emulator.cuda_kernel, language="cuda")


def test_the_body_names_no_word_of_one_language_only() -> None:
    for word in ("simd_shuffle(", "__shfl", "metal::", "as_type", "threadIdx", "half", "*)"):
        assert word not in BODY
    assert header("metal") != header("cuda")


def test_weights_are_of_the_experts_named(kernel_factory: Factory) -> None:
    # By hand: softmax of ln 1, ln 2, ln 4, ln 1 is 1/8, 1/4, 1/2, 1/8.
    logits = mx.log(mx.array([[1.0, 2.0, 4.0, 1.0]]))
    routed = fused_route(Rule("softmax_float32"), logits, 2, factory=kernel_factory)
    assert routed.ids.tolist() == [[2, 1]]
    np.testing.assert_allclose(as_float(routed.weights), [[0.5, 0.25]], rtol=1e-6)
    np.testing.assert_allclose(np.array(routed.entropy), [1.75 * np.log(2)], rtol=1e-5)
    np.testing.assert_allclose(np.array(routed.margin), [0.125], rtol=1e-6)
    np.testing.assert_allclose(np.array(routed.mass), [0.75], rtol=1e-6)
    given_ids = mx.array([[0, 3]], mx.uint32)
    routed = fused_route(Rule("softmax_float32"), logits, 2, ids=given_ids, factory=kernel_factory)
    assert routed.ids.tolist() == [[0, 3]]
    np.testing.assert_allclose(np.array(routed.margin), [-0.375], rtol=1e-6)
