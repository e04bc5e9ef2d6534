"""The reference router against formulas in numpy, written down here a second time.

Scores: softmax(z)_e = exp(z_e) / sum exp(z), sigmoid(z) = 1 / (1 + exp(-z)), sqrt(softplus(z)) =
sqrt(log(1 + exp(z))). Selection: the k largest of score + bias, experts of all but the best groups
(sum of the two best, or the best) counted as `fill`, masked ones as -inf, forced ones as +inf.
Weights: the scores without the bias, normalised, scaled.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from moe_lens.kernels import Groups, Rule, route, select

EXPERTS, TOKENS = 8, 5
SCORES = {
    "identity": lambda z: z,
    "softmax": lambda z: np.exp(z) / np.exp(z).sum(-1, keepdims=True),
    "sigmoid": lambda z: 1 / (1 + np.exp(-z)),
    "sqrt": lambda z: np.sqrt(np.log1p(np.exp(z))),
}
KINDS = {
    "softmax": "softmax",
    "softmax_precise": "softmax",
    "softmax_float32": "softmax",
    "sigmoid": "sigmoid",
    "sigmoid_float32": "sigmoid",
    "sqrt_softplus_float32": "sqrt",
}


@dataclass(frozen=True)
class Case:
    """A rule, the changes of an override, and the logits they meet."""

    rule: Rule
    logits: np.ndarray
    k: int
    mask: frozenset[int] = frozenset()
    force: frozenset[int] = frozenset()
    bias: np.ndarray | None = None
    scale: np.ndarray | None = None

    def routed(self) -> tuple[np.ndarray, np.ndarray]:
        """Ids and weights [tokens, k] by the reference, as numpy."""
        ids, weights = route(
            self.rule,
            mx.array(self.logits, mx.float32),
            self.k,
            mask=_flags(self.mask),
            force=_flags(self.force),
            bias=None if self.bias is None else mx.array(self.bias, mx.float32),
            scale=None if self.scale is None else mx.array(self.scale, mx.float32),
        )
        return np.array(ids), np.array(weights)


def _flags(experts: frozenset[int]) -> mx.array | None:
    return mx.array([e in experts for e in range(EXPERTS)]) if experts else None


def scores_of(case: Case) -> np.ndarray:
    rule, logits = case.rule, case.logits.astype(np.float64)
    if case.bias is not None:
        logits = logits + case.bias
    logits = logits * rule.multiplier
    if rule.softcap:
        logits = rule.softcap * np.tanh(logits / rule.softcap)
    logits = logits / rule.temperature
    logits[:, sorted(case.mask)] = -np.inf
    return SCORES["identity" if rule.score == "identity" else KINDS[rule.score]](logits)


def selection_of(case: Case, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What the k best are taken from, and the experts whose group was dropped."""
    rule, choice = case.rule, scores.copy()
    dropped = np.zeros(choice.shape, bool)
    if rule.selection_bias is not None:
        choice = choice + np.array(rule.selection_bias)
    choice[:, sorted(case.mask)] = -np.inf
    if rule.groups is not None:
        grouped = np.sort(choice.reshape(TOKENS, rule.groups.count, -1), axis=-1)
        best = 2 if rule.groups.score == "top2" else 1
        group_scores = grouped[..., -best:].sum(-1)
        order = np.argsort(-group_scores, axis=-1)
        _assume_gap(group_scores, rule.groups.keep)
        for token, rank in itertools.product(range(TOKENS), range(rule.groups.count)):
            if rank >= rule.groups.keep:
                size = EXPERTS // rule.groups.count
                start = order[token, rank] * size
                dropped[token, start : start + size] = True
        choice = np.where(dropped, rule.groups.fill, choice)
        choice[:, sorted(case.mask)] = -np.inf
    choice[:, sorted(case.force)] = np.inf
    return choice, dropped


def _assume_gap(values: np.ndarray, k: int) -> None:
    """Leaves out cases where the k-th and the next are so close that rounding may decide."""
    ordered = -np.sort(-values, axis=-1)
    if k < values.shape[-1]:
        with np.errstate(invalid="ignore"):
            gap = ordered[:, k - 1] - ordered[:, k]
        assume(bool((gap > 1e-5).all()))


def expected(case: Case) -> list[dict[int, float]]:
    """For each token its experts and their weights, by the formulas."""
    rule, scores = case.rule, scores_of(case)
    choice, dropped = selection_of(case, scores)
    _assume_gap(choice, case.k)
    ids = np.argsort(-choice, axis=-1)[:, : case.k]
    if rule.groups is not None and rule.groups.zero_scores:
        forced = np.isin(np.arange(EXPERTS), sorted(case.force))
        scores = np.where(dropped & ~forced, 0.0, scores)
    weights = np.take_along_axis(scores, ids, -1)
    if rule.score_chosen is not None:
        weights = SCORES[KINDS[rule.score_chosen]](weights)
    if case.k >= rule.normalise_from_k:
        total = np.abs(weights).sum(-1, keepdims=True)
        if rule.normalise == "sum_floor":
            weights = weights / np.maximum(total, rule.epsilon)
        elif rule.normalise != "no":
            weights = weights / (total + rule.epsilon * (rule.normalise == "sum"))
    weights = weights * (1.0 if rule.scale is None else rule.scale)
    if rule.per_expert_scale is not None:
        weights = weights * np.array(rule.per_expert_scale)[ids]
    if case.scale is not None:
        weights = weights * case.scale[ids]
    return [
        dict(zip(i.tolist(), w.tolist(), strict=True)) for i, w in zip(ids, weights, strict=True)
    ]


def _vector(low: float, high: float, shape: tuple[int, ...] = (EXPERTS,)) -> st.SearchStrategy:
    seeds = st.integers(0, 2**32 - 1)
    return seeds.map(lambda seed: np.random.default_rng(seed).uniform(low, high, shape))


@st.composite
def rules(draw: st.DrawFn) -> Rule:
    top_k_first = draw(st.booleans())
    optional = draw(_vector(-0.5, 0.5))
    return Rule(
        score="identity" if top_k_first else draw(st.sampled_from(sorted(KINDS))),
        score_chosen=draw(st.sampled_from(["softmax_precise", "softmax_float32"]))
        if top_k_first
        else None,
        multiplier=draw(st.sampled_from([1.0, 0.5])),
        softcap=draw(st.sampled_from([0.0, 5.0])),
        temperature=draw(st.sampled_from([1.0, 1.7])),
        selection_bias=draw(st.sampled_from([None, mx.array(optional, mx.float32)])),
        groups=None if top_k_first else draw(st.sampled_from([None, *GROUPS])),
        side=draw(st.sampled_from(["low", "high", "sorted"])),
        normalise="no" if top_k_first else draw(st.sampled_from(["no", "sum", "sum_floor", "l1"])),
        epsilon=draw(st.sampled_from([0.0, 1e-6, 3.0])),
        normalise_from_k=draw(st.sampled_from([1, 2])),
        scale=draw(st.sampled_from([None, 2.5])),
        per_expert_scale=draw(st.sampled_from([None, mx.array(optional + 1, mx.float32)])),
    )


GROUPS = (
    Groups(4, 2),
    Groups(4, 2, zero_scores=True),
    Groups(4, 3, score="max"),
    Groups(2, 1, fill=-float("inf")),
)


@st.composite
def cases(draw: st.DrawFn, *, changed: bool) -> Case:
    rule = draw(rules())
    # Two groups of four keep one: no more than four experts can then be chosen.
    k = draw(st.integers(1, 4))
    case = Case(rule, draw(_vector(-4, 4, (TOKENS, EXPERTS))), k)
    if not changed:
        return case
    experts = draw(st.permutations(range(EXPERTS)))
    # Groups fill dropped experts with a finite value, so with a mask some of them may be chosen.
    masked = draw(st.integers(0, 2 if rule.groups is None else 1))
    forced = draw(st.integers(0, k))
    return replace(
        case,
        mask=frozenset(experts[:masked]),
        force=frozenset(experts[masked : masked + forced]),
        bias=draw(st.none() | _vector(-1, 1)),
        scale=draw(st.none() | _vector(0, 2)),
    )


def assert_as_expected(case: Case) -> None:
    ids, weights = case.routed()
    for token, by_formula in enumerate(expected(case)):
        assert set(ids[token]) == set(by_formula)
        wanted = [by_formula[e] for e in ids[token].tolist()]
        np.testing.assert_allclose(weights[token], wanted, rtol=2e-5, atol=1e-6)


@settings(max_examples=150, deadline=None)
@given(cases(changed=False))
def test_a_rule_without_changes_follows_the_formulas(case: Case) -> None:
    assert_as_expected(case)


@settings(max_examples=250, deadline=None)
@given(cases(changed=True))
def test_masks_forces_biases_and_scales_follow_the_formulas(case: Case) -> None:
    assert_as_expected(case)


@settings(max_examples=100, deadline=None)
@given(cases(changed=True))
def test_masked_never_and_forced_always(case: Case) -> None:
    # No gap is assumed here: it must hold at ties too.
    logits = np.round(case.logits)
    ids, weights = replace(case, logits=logits).routed()
    assert not np.isin(ids, sorted(case.mask)).any()
    assert all(set(case.force) <= set(row) for row in ids.tolist())
    assert all(len(set(row)) == case.k for row in ids.tolist())
    assert np.isfinite(weights).all()


@settings(max_examples=50, deadline=None)
@given(cases(changed=False), st.data())
def test_given_ids_are_taken_as_they_are(case: Case, data: st.DataObject) -> None:
    rows = [data.draw(st.permutations(range(EXPERTS)))[: case.k] for _ in range(TOKENS)]
    rule = replace(case.rule, groups=None)
    ids, weights = route(
        rule, mx.array(case.logits, mx.float32), case.k, ids=mx.array(rows, mx.uint32)
    )
    assert np.array(ids).tolist() == rows
    for token, row in enumerate(rows):
        # Forcing exactly these experts must give the same weights.
        forced = replace(case, rule=rule, force=frozenset(row))
        by_formula = expected(forced)[token]
        wanted = [by_formula[e] for e in row]
        np.testing.assert_allclose(np.array(weights)[token], wanted, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("side", ["low", "high", "sorted"])
def test_the_side_decides_between_equal_experts(side: str) -> None:
    rng = np.random.default_rng(0)
    scores = mx.sigmoid(mx.array(rng.integers(0, 3, (200, 16)).astype(np.float32)))
    selections = {
        "low": mx.argpartition(-scores, kth=4, axis=-1)[..., :5],
        "high": mx.argpartition(scores, kth=-5, axis=-1)[..., -5:],
        "sorted": mx.argsort(-scores, axis=-1)[..., :5],
    }
    rows = {name: str(ids.tolist()) for name, ids in selections.items()}
    assert len(set(rows.values())) == 3, "the ties must tell the sides apart"
    ids, _ = select(Rule("sigmoid", side=side), scores, 5)
    assert str(ids.tolist()) == rows[side]


@pytest.mark.parametrize("fill", [0.0, -float("inf")])
def test_a_masked_expert_stays_out_when_kept_groups_hold_fewer_than_k(fill: float) -> None:
    logits = np.random.default_rng(1).normal(size=(TOKENS, EXPERTS))
    rule = Rule("sigmoid_float32", groups=Groups(2, 1, fill=fill))
    for masked in range(EXPERTS):
        ids, _ = Case(rule, logits, 4, mask=frozenset({masked})).routed()
        assert masked not in ids


@pytest.mark.parametrize("zero", [True, False])
def test_chosen_experts_of_dropped_groups_weigh_nothing_only_where_the_rule_says_so(
    zero: bool,
) -> None:
    logits = np.random.default_rng(2).normal(size=(TOKENS, EXPERTS))
    rule = Rule("sigmoid_float32", groups=Groups(4, 1, zero_scores=zero))
    ids, weights = Case(rule, logits, 4).routed()
    scores = SCORES["sigmoid"](logits)
    best_group = scores.reshape(TOKENS, 4, 2).sum(-1).argmax(-1)
    kept = ids // 2 == best_group[:, None]
    assert kept.sum() == 2 * TOKENS
    own = np.take_along_axis(scores, ids.astype(int), -1)
    np.testing.assert_allclose(weights, np.where(kept | (not zero), own, 0.0), rtol=1e-6)


def test_weights_take_the_dtype_the_rule_asks_for() -> None:
    logits = mx.array([[1.0, 2.0, 3.0, 4.0]], mx.bfloat16)
    by_cast = {
        cast: route(Rule("sigmoid_float32", cast=cast), logits, 2, input_dtype=mx.float16)[1].dtype
        for cast in ("no", "logits", "input")
    }
    assert by_cast == {"no": mx.float32, "logits": mx.bfloat16, "input": mx.float16}
