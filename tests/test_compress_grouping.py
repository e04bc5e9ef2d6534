"""Groups, thresholds and the plans made of them, from similarities that are known."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from moe_lens.compress import Calibration, NothingToMergeError, plan_merge, plan_prune
from moe_lens.compress.merging.experts_per_token import candidates
from moe_lens.compress.merging.grouping import (
    TOLERANCE,
    dendrogram,
    layer_tree,
    threshold_for_share,
    uniform_count,
)
from moe_lens.compress.plan.identity import CorpusIdentity, ModelIdentity
from moe_lens.compress.plan.limits import Limits
from moe_lens.compress.statistics.routed_sums import RoutedSums
from moe_lens.compress.statistics.similarity import Similarity, similarity
from moe_lens.compress.statistics.statistics import NOT_AN_EXPERT, LayerStatistics
from moe_lens.errors import UsageError

CORPUS = CorpusIdentity("words", "f" * 64, 4, 1000)


def model(experts: int, k: int = 2, **changes: Any) -> ModelIdentity:
    plain = {
        "name": "tiny",
        "model_type": "qwen3_moe",
        "family": "qwen3_moe",
        "fingerprint": "",
        "num_experts": experts,
        "router_width": experts,
        "experts_per_token": k,
    }
    return ModelIdentity(**{**plain, **changes})


def statistics(
    total: np.ndarray, layer: int = 0, counts: np.ndarray | None = None, **changes: Any
) -> LayerStatistics:
    """Statistics whose similarity is `total`: equal outputs, and overlap to match.

    Every expert has 1000 tokens, unless `counts` says otherwise; a pair with Jaccard index j
    shares 2000 j / (1 + j) of them. The REAP saliency of expert e is e + 1 where it has 1000.
    """
    experts = len(total)
    overlap = np.clip(2 * total - 1, 0, 1)
    together = np.rint(2000 * overlap / (1 + overlap)).astype(np.int64)
    np.fill_diagonal(together, 1000)
    outputs = np.clip(2 * total - overlap, 0, 1)
    plain: dict[str, Any] = {
        "layer": layer,
        "labels": {"": sums(np.full(experts, 1000) if counts is None else counts)},
        "together": together,
        "cosine_sums": outputs * 100,
        "cosine_counts": np.full((experts, experts), 100),
        "sampled_ids": np.zeros((0, 2), np.uint16),
    }
    return LayerStatistics(**{**plain, **changes})


def sums(counts: np.ndarray) -> RoutedSums:
    """Of 1000 tokens."""
    weighted = np.arange(1.0, len(counts) + 1) * 1000
    return RoutedSums(
        tokens=1000,
        counts=counts,
        weight_sums=np.full(len(counts), 500.0),
        norm_sums=np.full(len(counts), 1000.0),
        square_sums=np.full(len(counts), 1000.0),
        weighted_norm_sums=weighted,
        weighted_square_sums=weighted,
        max_activations=np.ones(len(counts)),
    )


def pairs(experts: int, inside: float, outside: float = 0.1) -> np.ndarray:
    """Experts 0 and 1, 2 and 3 and so on are alike."""
    total = np.full((experts, experts), outside)
    for e in range(0, experts, 2):
        total[e, e + 1] = total[e + 1, e] = inside
    np.fill_diagonal(total, 1.0)
    return total


def symmetric(matrix: np.ndarray) -> np.ndarray:
    total = (matrix + matrix.T) / 2
    np.fill_diagonal(total, 1.0)
    return total


matrices = st.integers(2, 9).flatmap(
    lambda size: arrays(np.float64, (size, size), elements=st.floats(0, 1)).map(symmetric)
)


@settings(max_examples=150, deadline=None)
@given(total=matrices, threshold=st.floats(0.01, 1.0))
def test_no_pair_of_a_group_is_below_the_threshold(total: np.ndarray, threshold: float) -> None:
    tree = dendrogram(total, tuple(range(len(total))))
    groups = tree.cut(tree.groups_at(threshold))
    assert sorted(e for group in groups for e in group) == list(range(len(total)))
    for group in groups:
        assert all(total[i, j] >= threshold - 2 * TOLERANCE for i, j in combinations(group, 2))
    # and no two groups are left that could have become one
    for one, other in combinations(groups, 2):
        worst = min(total[i, j] for i in one for j in other)
        assert worst < threshold + 2 * TOLERANCE


@settings(max_examples=60, deadline=None)
@given(total=matrices, share=st.sampled_from([0.25, 0.5]))
def test_the_threshold_that_is_shown_saves_what_it_says(total: np.ndarray, share: float) -> None:
    tree = layer_tree(Similarity(0, total, total, total), [tuple(range(len(total)))])
    threshold = threshold_for_share([tree], share, 1)
    if threshold is not None:
        assert uniform_count([tree], threshold) <= len(total) * (1 - share)


def test_a_cut_takes_the_best_joins_first() -> None:
    total = pairs(6, 0.9)
    total[2, 3] = total[3, 2] = 0.95
    tree = dendrogram(total, tuple(range(6)))
    assert tree.cut(5) == ((0,), (1,), (2, 3), (4,), (5,))
    assert tree.cut(3) == ((0, 1), (2, 3), (4, 5))
    assert tree.groups_at(0.95) == 5
    assert tree.groups_at(0.951) == 6
    assert tree.threshold_for(5) == pytest.approx(0.95)


def test_similarity_is_the_mean_of_both_halves() -> None:
    found = similarity(statistics(pairs(4, 0.8)))
    np.testing.assert_allclose(found.total[0, 1], 0.8, atol=1e-3)
    np.testing.assert_allclose(found.total, (found.outputs + found.overlap) / 2)
    np.testing.assert_allclose(found.best_partner(), 0.8, atol=1e-3)


def test_experts_that_nothing_is_known_about_are_not_alike() -> None:
    empty = LayerStatistics.empty(0, 4, 2)
    found = similarity(empty)
    np.testing.assert_array_equal(found.total, np.eye(4))


def test_all_layers_are_cut_to_what_the_least_redundant_can_follow() -> None:
    second = pairs(8, 0.9)
    second[6, 7] = second[7, 6] = 0.2
    calibration = Calibration(
        model(8), CORPUS, (statistics(pairs(8, 0.9)), statistics(second, layer=1))
    )
    plan = plan_merge(calibration, 0.8)
    assert plan.num_experts == 5
    assert [layer.groups_reached for layer in plan.layers] == [4, 5]
    assert [layer.merges for layer in plan.layers] == [3, 3]
    merged = plan.layers[1].groups[0]
    assert merged.experts == (0, 1)
    assert merged.weights == (0.5, 0.5)
    assert merged.similarity == pytest.approx(0.9, abs=1e-3)
    assert merged.output_similarity == pytest.approx(1.0, abs=1e-3)
    assert merged.activation_overlap == pytest.approx(0.8, abs=1e-2)


def test_members_weigh_as_often_as_they_are_chosen() -> None:
    found = statistics(pairs(4, 1.0), counts=np.array([300, 100, 0, 0]))
    plan = plan_merge(Calibration(model(4), CORPUS, (found,)), 0.4)
    weights = {group.experts: group.weights for group in plan.layers[0].groups}
    assert weights[0, 1] == (0.75, 0.25)
    assert weights[2, 3] == (0.5, 0.5)


def test_nothing_to_merge_says_what_would_have_helped() -> None:
    calibration = Calibration(model(8), CORPUS, (statistics(pairs(8, 0.7)),))
    with pytest.raises(NothingToMergeError) as caught:
        plan_merge(calibration, 0.8)
    message = str(caught.value)
    assert "No pair of experts reaches a similarity of 0.8" in message
    assert "50% 0.70" in message
    assert "25% of the experts: --threshold 0.699, 50% of the experts: --threshold 0.699" in message
    assert caught.value.evidence["threshold_that_saves"] == {"25%": 0.699, "50%": 0.699}
    assert "--ratio" not in message
    assert plan_merge(calibration, 0.699).num_experts == 4
    unlike = Calibration(model(8), CORPUS, (statistics(pairs(8, 0.3)),))
    with pytest.raises(NothingToMergeError, match="little in common"):
        plan_merge(unlike, 0.8)


def test_one_layer_that_cannot_follow_is_named() -> None:
    layers = (statistics(pairs(8, 0.9)), statistics(pairs(8, 0.3), layer=5))
    with pytest.raises(NothingToMergeError, match=r"1 of 2 layers .* but layer 5 cannot lose one"):
        plan_merge(Calibration(model(8), CORPUS, layers), 0.8)


@pytest.mark.parametrize("threshold", [0.0, -1.0, 1.01, float("nan")])
def test_thresholds_lie_between_0_and_1(threshold: float) -> None:
    calibration = Calibration(model(8), CORPUS, (statistics(pairs(8, 0.9)),))
    with pytest.raises(UsageError, match="above 0 and at most 1"):
        plan_merge(calibration, threshold)


def test_groups_of_the_router_stay_apart_and_equal() -> None:
    total = np.full((8, 8), 0.9)
    np.fill_diagonal(total, 1.0)
    total[4, 5] = total[5, 4] = 0.95
    grouped = model(8, group_count=2, group_keep=1, group_score="top2")
    plan = plan_merge(Calibration(grouped, CORPUS, (statistics(total),)), 0.8)
    # Two experts must stay in each router group, since it is scored by its two best.
    assert plan.num_experts == 4
    for place, group in enumerate(plan.layers[0].groups):
        assert {expert // 4 for expert in group.experts} == {place // 2}


def test_no_more_experts_per_token_than_the_allowed_groups_hold() -> None:
    limits = Limits(model(16, 4, group_count=4, group_keep=2, group_score="top2"))
    assert limits.largest_k(8) == 4
    assert limits.group_for(6) == 3
    limits.check_k(4, 8)
    with pytest.raises(UsageError, match="a token could use at most 4, but 5"):
        limits.check_k(5, 8)


def test_identity_experts_fill_slots_too() -> None:
    limits = Limits(model(8, 4, router_width=12))
    assert limits.largest_k(2) == 6
    assert limits.group_for(6) == 2


def test_a_forced_number_of_experts_per_token_bounds_the_merge() -> None:
    total = np.full((8, 8), 0.9)
    np.fill_diagonal(total, 1.0)
    calibration = Calibration(model(8), CORPUS, (statistics(total),))
    assert plan_merge(calibration, 0.8).num_experts == 1
    forced = plan_merge(calibration, 0.8, experts_per_token=3)
    assert (forced.num_experts, forced.experts_per_token) == (3, 3)


def test_a_dense_layer_is_avoided() -> None:
    total = np.ones((8, 8))
    calibration = Calibration(
        model(8, model_type="jamba", family="jamba"), CORPUS, (statistics(total),)
    )
    assert plan_merge(calibration, 0.8).num_experts == 2


def test_candidates_are_k_and_the_mean_number_of_different_groups() -> None:
    together = np.array([[0, 1], [2, 3], [4, 5], [0, 1]], np.uint16)
    apart = np.array([[0, 2], [1, 3], [4, 6], [5, 7]], np.uint16)
    found = statistics(pairs(8, 0.9), sampled_ids=together)
    calibration = Calibration(model(8), CORPUS, (found,))
    assert candidates(calibration, plan_merge(calibration, 0.8)) == ((2, 1), 1.0)
    found = statistics(pairs(8, 0.9), sampled_ids=apart)
    calibration = Calibration(model(8), CORPUS, (found,))
    assert candidates(calibration, plan_merge(calibration, 0.8)) == ((2,), 2.0)
    identity = np.array([[0, NOT_AN_EXPERT], [NOT_AN_EXPERT, NOT_AN_EXPERT]], np.uint16)
    found = statistics(pairs(8, 0.9), sampled_ids=identity)
    calibration = Calibration(model(8), CORPUS, (found,))
    assert candidates(calibration, plan_merge(calibration, 0.8))[1] == 2.0


def test_pruning_removes_the_least_salient_and_unreached_first() -> None:
    counts = np.full(8, 1000)
    counts[6] = 0
    found = statistics(pairs(8, 0.5), counts=counts)
    plan = plan_prune(Calibration(model(8), CORPUS, (found,)), 0.4)
    # REAP of expert e is e + 1 here; 0.4 of 8 is rounded down to 3.
    assert plan.layers[0].removed == (0, 1, 6)
    assert plan.layers[0].saliency is not None
    assert plan.layers[0].saliency[6] is None
    assert plan.layers[0].saliency[7] == 8.0
    assert plan.evidence["unreached"] == {"0": [6]}
    assert plan.num_experts == 5


def test_pruning_by_frequency() -> None:
    counts = np.array([5, 1, 7, 3])
    found = statistics(pairs(4, 0.5), counts=counts)
    plan = plan_prune(Calibration(model(4, 1), CORPUS, (found,)), 0.5, "frequency")
    assert plan.layers[0].removed == (1, 3)
    assert plan.layers[0].saliency == (0.005, 0.001, 0.007, 0.003)


def test_pruning_takes_equally_many_of_each_router_group() -> None:
    grouped = model(8, group_count=2, group_keep=1, group_score="top2")
    plan = plan_prune(Calibration(grouped, CORPUS, (statistics(pairs(8, 0.5)),)), 0.5)
    assert plan.layers[0].removed == (0, 1, 4, 5)


@pytest.mark.parametrize(
    ("ratio", "message"),
    [
        (0.0, "between 0 and 1"),
        (1.0, "between 0 and 1"),
        (0.1, "removes none of 8 experts; the smallest that does is 0.125"),
        (0.9, "keep 1 of its experts, of which a token could use at most 1, but 2"),
    ],
)
def test_ratios_that_cannot_be(ratio: float, message: str) -> None:
    calibration = Calibration(model(8), CORPUS, (statistics(pairs(8, 0.5)),))
    with pytest.raises(UsageError, match=message):
        plan_prune(calibration, ratio)
