"""What the suites of the routing kernel share: rules of every family, logits, and comparisons."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any
from unittest import mock

import mlx.core as mx
import numpy as np
from hypothesis import strategies as st

from moe_lens.families import find_moe_layers
from moe_lens.kernels import Groups, Routed, Rule, fused_route, reference, route, route_statistics
from tiny_models import CONFIGS, build

DTYPES = {"float32": mx.float32, "float16": mx.float16, "bfloat16": mx.bfloat16}

OWN_ROUTE = {"phimoe"}
"""Families whose router no rule describes: the kernel is never asked for them."""


@functools.cache
def family_rules(dtype: str) -> dict[str, tuple[Rule, int, int]]:
    """Rule, experts and k of the first MoE layer of every tiny model built in `dtype`."""
    found = {}
    for name in CONFIGS:
        model, _ = build(name, dtype=DTYPES[dtype])
        layer = find_moe_layers(model)[0]
        if layer.family.route is None:
            found[name] = (layer.rule(), layer.router_width, layer.k)
        else:
            assert layer.family.model_type in OWN_ROUTE
    return found


def widened(rule: Rule, experts: int, seed: int = 0) -> Rule:
    """`rule` for more experts than its tiny model has, with arrays in the dtype it had."""
    random = np.random.default_rng(seed)

    def like(array: mx.array | None, low: float, high: float) -> mx.array | None:
        if array is None:
            return None
        return mx.array(random.uniform(low, high, experts)).astype(array.dtype)

    return replace(
        rule,
        selection_bias=like(rule.selection_bias, -0.3, 0.3),
        per_expert_scale=like(rule.per_expert_scale, 0.5, 1.5),
    )


def tied_logits(shape: tuple[int, ...], seed: int, dtype: mx.Dtype = mx.float32) -> mx.array:
    """Logits in steps of a half, so that most tokens tie at the k-th place."""
    values = np.random.default_rng(seed).normal(size=shape) * 2
    return mx.array((np.round(values * 2) / 2).astype(np.float32)).astype(dtype)


def flags(experts: int, *chosen: int) -> mx.array:
    return mx.array([e in chosen for e in range(experts)])


@dataclass
class Question:
    """A rule, logits and changes, to be answered by kernel and reference."""

    rule: Rule
    logits: mx.array
    k: int
    changes: dict[str, mx.array | None] = field(default_factory=dict)
    input_dtype: mx.Dtype | None = None

    def by_kernel(self, factory: Any, **options: Any) -> Routed:
        return fused_route(
            self.rule,
            self.logits,
            self.k,
            input_dtype=self.input_dtype,
            factory=factory,
            **self.changes,
            **options,
        )

    def by_reference(self) -> tuple[mx.array, mx.array]:
        return route(self.rule, self.logits, self.k, input_dtype=self.input_dtype, **self.changes)

    def statistics(self, ids: mx.array) -> list[np.ndarray]:
        """Entropy, margin and mass by the reference."""
        named = {name: self.changes.get(name) for name in ("mask", "force", "bias")}
        return [np.array(each) for each in route_statistics(self.rule, self.logits, ids, **named)]


INFINITY = float("inf")

SPECIAL = np.array([np.nan, INFINITY, -INFINITY, -0.0, 0.0, 1e30, -1e30])
SCORES = (
    "identity",
    "softmax",
    "softmax_precise",
    "softmax_float32",
    "sigmoid",
    "sigmoid_float32",
    "sqrt_softplus_float32",
)


@st.composite
def questions(draw: st.DrawFn, *, special: bool) -> Question:
    """Any rule with any changes; `special`: logits hold NaN, infinities and masked rows."""
    experts = draw(st.sampled_from([1, 2, 5, 8, 12, 24, 31, 32, 33, 64, 96]))
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    dtypes = st.sampled_from(sorted(DTYPES)).map(DTYPES.__getitem__)
    tokens, k = draw(st.integers(1, 5)), draw(st.integers(1, min(32, experts)))

    def vector(low: float, high: float, *, chance: int = 3) -> mx.array | None:
        if draw(st.integers(0, chance)):
            return None
        values = random.uniform(low, high, experts)
        steps = draw(st.sampled_from([0, 4]))
        return mx.array(np.round(values * steps) / steps if steps else values).astype(draw(dtypes))

    counts = [n for n in range(1, 33) if experts % n == 0 and experts // n >= 2]
    groups = None
    if counts and draw(st.booleans()):
        count = draw(st.sampled_from(counts))
        groups = Groups(
            count,
            draw(st.integers(0, count)),
            draw(st.sampled_from(["top2", "max"])),
            draw(st.sampled_from([0.0, -INFINITY, 0.3])),
            draw(st.booleans()),
        )
    rule = Rule(
        draw(st.sampled_from(SCORES)),
        score_chosen=draw(st.sampled_from([None, None, *SCORES])),
        multiplier=draw(st.sampled_from([1.0, 0.3])),
        softcap=draw(st.sampled_from([0.0, 0.0, 5.0, 0.8])),
        temperature=draw(st.sampled_from([1.0, 1.7])),
        selection_bias=vector(-0.5, 0.5, chance=1),
        bias_dtype=draw(st.sampled_from(["promote", "scores"])),
        groups=groups,
        side=draw(st.sampled_from(["low", "high", "sorted"])),
        normalise=draw(st.sampled_from(["no", "sum", "sum_floor", "l1"])),
        epsilon=draw(st.sampled_from([0.0, 1e-20, 1e-6, 0.3])),
        normalise_from_k=draw(st.sampled_from([1, 2])),
        scale=draw(st.sampled_from([None, 2.5, 0.1])),
        per_expert_scale=vector(0.5, 1.5),
        cast=draw(st.sampled_from(["no", "logits", "input"])),
    )
    logits = random.normal(size=(tokens, experts)) * 2
    if draw(st.booleans()):
        logits = np.round(logits)
    if special:
        where = random.random((tokens, experts)) < draw(st.sampled_from([0.05, 0.5, 1.0]))
        logits = np.where(where, random.choice(SPECIAL, size=logits.shape), logits)
        logits[0] = draw(st.sampled_from([logits[0], -INFINITY, np.nan, INFINITY]))
    masked = random.random(experts) < draw(st.sampled_from([0.0, 0.1, 0.5, 1.0]))
    forced = (random.random(experts) < draw(st.sampled_from([0.0, 0.1, 0.6]))) & ~masked
    changes = {
        "mask": mx.array(masked) if masked.any() else None,
        "force": mx.array(forced) if forced.any() else None,
        "bias": vector(-1, 1),
        "scale": vector(-1, 2),
    }
    if draw(st.integers(0, 5)) == 0:
        rows = np.argsort(random.random((tokens, experts)), axis=-1)[:, :k]
        changes["ids"] = mx.array(rows.astype(np.uint32))
    values = mx.array(logits.astype(np.float32)).astype(draw(dtypes))
    return Question(rule, values, k, changes, draw(st.none() | dtypes))


@contextlib.contextmanager
def slots_as_sorted() -> Iterator[None]:
    """The reference as a GPU runs it: there `argpartition` is a whole stable sort.

    On a CPU the slots come in an order of their own, and a sum of weights over other slots may
    differ in its last bit.
    """

    def best(scores: mx.array, k: int, side: str) -> mx.array:
        if side == "high":
            return mx.argsort(scores, axis=-1)[..., -k:]
        return mx.argsort(-scores, axis=-1)[..., :k]

    with mock.patch.object(reference, "_best", best):
        yield


def as_float(array: mx.array) -> np.ndarray:
    return np.array(array.astype(mx.float32))


def units_apart(a: mx.array, b: mx.array) -> np.ndarray:
    """How many representable numbers of their dtype `a` and `b` lie apart, 0 for two NaNs."""
    assert a.dtype == b.dtype
    integer = mx.int32 if a.dtype == mx.float32 else mx.int16

    def ordered(array: mx.array) -> np.ndarray:
        bits = np.array(array.view(integer)).astype(np.int64)
        smallest = -(2 ** (8 * array.itemsize - 1))
        return np.where(bits < 0, smallest - bits, bits)

    both_nan = np.isnan(as_float(a)) & np.isnan(as_float(b))
    return np.where(both_nan, 0, np.abs(ordered(a) - ordered(b)))


def by_id(ids: mx.array, weights: mx.array) -> tuple[np.ndarray, mx.array]:
    """Ids and weights, slots by rising id."""
    order = mx.argsort(ids, axis=-1)
    return (
        np.array(mx.take_along_axis(ids, order, axis=-1)),
        mx.take_along_axis(weights, order, axis=-1),
    )


def assert_sorted(routed: Routed) -> None:
    """Slots by falling weight, equal weights by rising id, NaN last."""
    ids, weights = np.array(routed.ids).astype(int), as_float(routed.weights)
    is_nan = np.isnan(weights)
    expected = np.lexsort((ids, np.where(is_nan, 0, -weights), is_nan), axis=-1)
    assert (expected == np.arange(ids.shape[-1])).all()


def assert_as_reference(
    question: Question, factory: Any, *, units: int | None = 0, **options: Any
) -> Routed:
    """The kernel gives the reference's ids, weights within `units`, statistics to a rounding."""
    got = question.by_kernel(factory, **options)
    ids, own_weights = question.by_reference()
    with slots_as_sorted():
        sorted_ids, weights = question.by_reference()
    assert got.weights.dtype == own_weights.dtype
    assert got.ids.dtype == mx.uint32
    assert got.ids.shape == ids.shape
    wanted_ids, _ = by_id(ids, own_weights)
    got_ids, got_weights = by_id(got.ids, got.weights)
    sorted_ids, wanted_weights = by_id(sorted_ids, weights)
    np.testing.assert_array_equal(sorted_ids, wanted_ids)
    np.testing.assert_array_equal(got_ids, wanted_ids)
    if units is not None:
        apart = units_apart(got_weights, wanted_weights)
        assert apart.max(initial=0) <= units, (got_weights, wanted_weights)
    assert_sorted(got)
    entropy, margin, mass = question.statistics(ids)
    np.testing.assert_allclose(np.array(got.entropy), entropy, rtol=1e-5, atol=2e-5)
    np.testing.assert_array_equal(np.array(got.margin), margin)
    np.testing.assert_allclose(np.array(got.mass), mass, rtol=1e-5, atol=1e-6)
    return got
