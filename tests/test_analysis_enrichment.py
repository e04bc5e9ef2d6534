"""Enrichment of experts by label: exact moments, honest under the null, finds what is there."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from moe_lens.analysis.enrichment import FEWEST_TOKENS, FEWEST_UNITS, Enrichment, enrichment
from moe_lens.analysis.null import shuffled_moments
from moe_lens.analysis.resampling import FALSE_SHARE, draws, false_discovery, interval, spread
from moe_lens.analysis.units import MOST_UNITS, UnitCounts, Units
from route_cases import random_routes


def units_of(labels: list[str | None], tokens: list[int], most: int = MOST_UNITS) -> Units:
    return Units.of(SimpleNamespace(labels=tuple(labels), prompt_tokens=np.array(tokens)), most)


def in_units(units: Units, by_prompt: np.ndarray) -> np.ndarray:
    """Counts [prompts, layers, R] added up by unit."""
    table = np.zeros((len(units), *by_prompt.shape[1:]), dtype=np.int64)
    for prompt, unit in enumerate(units.of_prompt):
        if unit >= 0:
            table[unit] += by_prompt[prompt]
    return table


def drawn_counts(
    random: np.random.Generator,
    tokens: list[int],
    shares: np.ndarray,
    alike: float,
    k: int = 2,
) -> np.ndarray:
    """[prompts, layers, R]; each prompt has shares of its own, the more so the smaller `alike`."""
    counts = np.zeros((len(tokens), *shares.shape[-2:]), dtype=np.int64)
    shares = np.broadcast_to(shares, (len(tokens), *shares.shape[-2:]))
    for prompt, length in enumerate(tokens):
        for layer, share in enumerate(shares[prompt]):
            own = random.dirichlet(alike * share + 1e-6)
            counts[prompt, layer] = np.minimum(random.multinomial(k * length, own), length)
    return counts


def found_in(random: np.random.Generator, labels: list[str], counts: np.ndarray, tokens: list[int]):
    units = units_of(list(labels), tokens)
    return enrichment(units, in_units(units, counts), seed=int(random.integers(1000)))


def test_moments_against_all_subsets() -> None:
    """Mean 0, variance and skewness of sums over every subset of 3 and of 5 of 7 units."""
    residuals = np.random.default_rng(0).exponential(size=(7, 4))
    residuals -= residuals.mean(axis=0)
    deviation, skewness = shuffled_moments(residuals, np.array([3.0, 5.0]))
    for row, members in enumerate((3, 5)):
        sums = np.array(
            [residuals[list(each)].sum(axis=0) for each in combinations(range(7), members)]
        )
        np.testing.assert_allclose(sums.mean(axis=0), 0, atol=1e-12)
        np.testing.assert_allclose(deviation[row], sums.std(axis=0))
        np.testing.assert_allclose(skewness[row], (sums**3).mean(axis=0) / sums.std(axis=0) ** 3)


def test_rate_and_lift_against_counting() -> None:
    random = np.random.default_rng(1)
    tokens = [int(each) for each in random.integers(20, 60, 30)]
    labels: list[str | None] = [("a", "b", "c", None)[place % 4] for place in range(30)]
    counts = drawn_counts(random, tokens, np.full((2, 6), 1 / 6), 20.0)
    units = units_of(labels, tokens)
    found = enrichment(units, in_units(units, counts))
    rates = []
    for name in ("a", "b", "c"):
        own = [place for place, label in enumerate(labels) if label == name]
        rates.append(counts[own].sum(axis=0) / sum(tokens[place] for place in own))
    np.testing.assert_allclose(found.rate, rates)
    np.testing.assert_allclose(found.lift, rates / np.mean(rates, axis=0))
    assert (found.rate_low <= found.rate).all() and (found.rate <= found.rate_high).all()
    assert (found.low <= found.lift).all() and (found.lift <= found.high).all()


def false_alarms(rounds: int, members: list[int], lengths: list[int], alike: float) -> int:
    """How many of `rounds` corpora without any preference lead to a claim."""
    alarms = 0
    for seed in range(rounds):
        random = np.random.default_rng(seed)
        labels = [f"l{place}" for place, number in enumerate(members) for _ in range(number)]
        tokens = [
            length for length, number in zip(lengths, members, strict=True) for _ in range(number)
        ]
        shares = random.dirichlet(np.full(24, 0.4), size=1)
        found = found_in(random, labels, drawn_counts(random, tokens, shares, alike), tokens)
        alarms += bool((found.q <= FALSE_SHARE).any())
    return alarms


# Of 40 corpora 2 are expected; 7 or more have a chance below 1 %.
@pytest.mark.parametrize(
    ("members", "lengths"),
    [([15] * 4, [100] * 4), ([5, 10, 60], [100] * 3), ([5, 5, 60], [2000, 100, 100])],
    ids=["even", "labels of different size", "a label of long prompts"],
)
def test_no_claims_where_labels_mean_nothing(members: list[int], lengths: list[int]) -> None:
    assert false_alarms(40, members, lengths, alike=3.0) <= 6


def test_experts_of_few_prompts_are_no_specialists() -> None:
    """24 labels of 5 prompts; how likely is it that the few prompts of an expert share a label?

    A normal statistic would give the second one a p of about 1e-11.
    """
    random = np.random.default_rng(0)
    labels = [f"l{place % 24:02}" for place in range(120)]
    counts = drawn_counts(random, [100] * 120, np.full((8, 16), 1 / 16), 200.0)
    chosen_by = {3: [7, 31, 8, 9, 10], 4: [7, 31], 5: [7]}  # prompts 7 and 31 have label l07
    for layer, prompts in chosen_by.items():
        counts[:, layer, 3] = 0
        counts[prompts, layer, 3] = 60
    found = found_in(random, labels, counts, [100] * 120)
    assert found.enough[:, 3:6, 3].all()
    p = found.p[found.names.index("l07"), :, 3]
    for layer, exact in ((5, 5 / 120), (4, 20 / 120 / 119), (3, stats.hypergeom.sf(1, 120, 5, 5))):
        assert exact / 2 < p[layer] < exact * 2
    assert (found.q[:, 3:6, 3] > FALSE_SHARE).all()


def test_a_claim_needs_q_and_interval() -> None:
    random = np.random.default_rng(0)
    counts = np.full((20, 1, 3), 20)
    counts[::2, 0, 0] = 40
    found = found_in(random, ["a", "b"] * 10, counts, [60] * 20)
    assert found.claimed[0, 0, 0] and found.claimed.sum() == 1
    assert not replace(found, low=np.minimum(found.low, 1.0)).claimed.any()
    assert not replace(found, q=np.maximum(found.q, 0.06)).claimed.any()


@pytest.mark.parametrize("members", [6, 20])
def test_finds_a_planted_specialist(members: int) -> None:
    """Four times as often for one label; found nearly always, and nothing else much."""
    right = wrong = 0
    for seed in range(10):
        random = np.random.default_rng(seed)
        labels = [f"l{place}" for place in range(4) for _ in range(members)]
        tokens = [int(each) for each in random.integers(60, 200, len(labels))]
        shares = np.tile(random.dirichlet(np.full(16, 5.0)), (len(labels), 1, 1))
        for prompt, label in enumerate(labels):
            shares[prompt, 0, int(label[1:])] *= 4
        shares /= shares.sum(axis=2, keepdims=True)
        found = found_in(random, labels, drawn_counts(random, tokens, shares, 80.0), tokens)
        planted = np.zeros_like(found.claimed)
        planted[range(4), 0, range(4)] = True
        right += int(found.claimed[planted].sum())
        wrong += int(found.claimed[~planted].sum())
    assert right >= 36, f"{right} of 40 were found"
    assert wrong <= 0.2 * right


def test_nothing_is_claimed_on_too_little() -> None:
    random = np.random.default_rng(0)
    labels = ["a"] * 10 + ["b"] * 10 + ["few"] * (FEWEST_UNITS - 1) + ["one"]
    tokens = [100] * len(labels)
    counts = np.zeros((len(labels), 1, 4), dtype=np.int64)
    counts[:10, 0, 0] = 90  # only a
    counts[10:20, 0, 1] = 90  # only b
    counts[20:24, 0, 2] = 90  # only few
    counts[0, 0, 3] = FEWEST_TOKENS - 1
    found = found_in(random, labels, counts, tokens)
    assert found.names == ("a", "b", "few", "one")
    assert found.claimed[0, 0, 0] and found.claimed[1, 0, 1]
    assert not found.claimed[2:].any() and not found.claimed[:, :, 3].any()
    assert np.isnan(found.p[2:]).all() and np.isnan(found.q[:, :, 3]).all()
    # One prompt says nothing of how sure its rate is.
    assert np.isnan(found.low[3]).all() and np.isnan(found.rate_high[3]).all()
    assert not np.isnan(found.rate[3]).any()


def test_one_label_and_labels_without_tokens() -> None:
    random = np.random.default_rng(0)
    counts = drawn_counts(random, [50] * 12, np.full((1, 4), 0.25), 20.0)
    alone = found_in(random, ["a"] * 12, counts, [50] * 12)
    assert not alone.enough.any() and np.isnan(alone.p).all()
    np.testing.assert_allclose(alone.lift, 1.0)
    tokens = [50] * 12 + [0]
    counts = np.concatenate([counts, np.zeros_like(counts[:1])])
    found = found_in(random, ["a", "b"] * 6 + ["empty"], counts, tokens)
    np.testing.assert_allclose(found.lift[:2].mean(axis=0), 1.0)
    assert np.isnan(found.rate[2]).all() and not found.enough[2].any()


def test_an_expert_that_all_units_use_alike_is_not_claimed() -> None:
    counts = np.full((20, 1, 4), 25)
    found = found_in(np.random.default_rng(0), ["a", "b"] * 10, counts, [50] * 20)
    assert found.enough.all() and not found.claimed.any() and (found.q > 0.5).all()


def test_same_seed_same_table() -> None:
    random = np.random.default_rng(2)
    labels, tokens = ["a", "b"] * 10, [40] * 20
    counts = drawn_counts(random, tokens, np.full((1, 4), 0.25), 5.0)
    units = units_of(list(labels), tokens)
    one, two, other = (enrichment(units, in_units(units, counts), seed=seed) for seed in (0, 0, 1))
    for name in Enrichment.__dataclass_fields__:
        np.testing.assert_array_equal(getattr(one, name), getattr(two, name))
    assert (one.low != other.low).any()


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.integers(0, 400), min_size=1, max_size=12),
    unlabelled=st.integers(0, 50),
    most=st.integers(1, 100),
    seed=st.integers(0, 99),
)
def test_units(sizes: list[int], unlabelled: int, most: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    labels: list[str | None] = [
        f"l{place:02}" for place, size in enumerate(sizes) for _ in range(size)
    ]
    labels += [None] * unlabelled
    random.shuffle(labels)
    tokens = [int(each) for each in random.integers(0, 30, len(labels))]
    units = units_of(labels, tokens, most)
    filled = [place for place, length in enumerate(tokens) if length]
    groups = {labels[place] for place in filled}
    assert len(units) <= max(most, len(groups))
    assert len(filled) > most or len(units) == len(filled)
    for prompt, unit in enumerate(units.of_prompt):
        assert (unit >= 0) == (tokens[prompt] > 0)
        if unit >= 0:
            place = int(units.label[unit])
            assert labels[prompt] == (None if place < 0 else units.names[place])
    for unit in range(len(units)):
        own = [tokens[prompt] for prompt in np.flatnonzero(units.of_prompt == unit)]
        assert len(own) == units.prompts[unit] > 0
        assert sum(own) == units.tokens[unit] and sum(n * n for n in own) == units.squares[unit]


def test_a_small_label_keeps_units_beside_a_large_one() -> None:
    units = units_of(["small"] * 40 + ["large"] * 20_000, [10] * 20_040)
    assert len(units) <= MOST_UNITS
    assert (units.label == units.names.index("small")).sum() >= FEWEST_UNITS
    assert units.prompts_of(units.names.index("small")) == 40


def test_counts_of_the_first_choices() -> None:
    routes = random_routes(4, lengths=(9, 8, 7), k=3, uneven=True)
    units = units_of(["a", "b", "a"], [9, 8, 7])
    for choices in (1, 2, None):
        seen = UnitCounts(units, 3, 8, choices=choices)
        seen.add(routes)
        for prompt, unit in enumerate(units.of_prompt):
            ids = routes.expert_ids[:, routes.prompt == prompt, :choices]
            for layer in range(3):
                for expert in range(8):
                    assert seen.counts[unit, layer, expert] == (ids[layer] == expert).sum()


def test_draws_stay_within_labels() -> None:
    label = np.array([0, 0, 1, 1, 1, -1])
    table = draws(label, seed=3)
    for place in (0, 1, -1):
        np.testing.assert_array_equal(table[:, label == place].sum(axis=1), (label == place).sum())
    np.testing.assert_allclose(table.mean(axis=0), 1, atol=0.12)


def test_intervals_of_few_units_are_wider() -> None:
    """Nominally 95 %: of 5 skewed units plain quantiles cover too seldom."""
    plain = widened = 0
    for seed in range(300):
        units = np.random.default_rng(seed).beta(2, 8, (5, 10))
        means = draws(np.zeros(5, dtype=np.int64), seed=seed) @ units / 5
        for width in (None, 5):
            low, high = interval(means, units=width)
            covered = int(((low <= 0.2) & (high >= 0.2)).sum())
            plain, widened = plain + covered * (width is None), widened + covered * (width == 5)
    assert plain / 3000 < 0.86 < 0.89 < widened / 3000


def test_intervals_of_few_units_are_those_of_student() -> None:
    """Means of 5 have 4/5 of the variance, so t x s / sqrt(5) is t x sqrt(5/4) of their spread."""
    drawn = np.random.default_rng(0).normal(size=400_000)
    low, high = interval(drawn, units=5)
    assert -low == pytest.approx(2.776 * np.sqrt(5 / 4), rel=0.04)
    assert high == pytest.approx(2.776 * np.sqrt(5 / 4), rel=0.04)


def test_spread_contains_its_value() -> None:
    drawn = np.random.default_rng(0).normal(5.0, 1.0, (1000, 3))
    low, high = spread(np.array([1.0, 2.0, 3.0]), drawn)
    np.testing.assert_allclose(low, [-0.96, 0.04, 1.04], atol=0.2)
    np.testing.assert_allclose(high, [2.96, 3.96, 4.96], atol=0.2)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=30))
def test_false_discovery_against_the_definition(values: list[float]) -> None:
    p = np.array([*values, np.nan])
    q = false_discovery(p)
    assert np.isnan(q[-1])
    ordered = sorted(values)
    for each, found in zip(values, q, strict=False):
        steps = [
            min(1.0, other * len(values) / (rank + 1))
            for rank, other in enumerate(ordered)
            if other >= each
        ]
        assert found == pytest.approx(min(steps))
