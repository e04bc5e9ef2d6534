"""Routing drift against a calculation token by token, and the map from old experts to new ones."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from moe_lens.compress import Plan, verify, write
from moe_lens.compress.verification.expert_map import map_experts, stored_plan
from moe_lens.compress.verification.routing_drift import token_drift
from moe_lens.corpus import Corpus, read_corpus
from moe_lens.errors import UsageError
from moe_lens.router import ExpertRouter
from tiny_models import save_checkpoint
from twins import merge_plan, prepared, write_words

TOKENS = 40


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A parent of 16 experts, `pruned` to 8 of them, and `merged` to 8 pairs of neighbours."""
    folder = tmp_path_factory.mktemp("routing")
    source, plan = prepared(folder)
    write(plan, source, folder / "pruned")
    router = ExpertRouter.from_pretrained(source)
    pairs = [(e, e + 1) for e in range(0, 16, 2)]
    merged = merge_plan(router, {layer.index: pairs for layer in router.layers})
    write(merged, source, folder / "merged")
    return folder


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    folder = tmp_path_factory.mktemp("words")
    return read_corpus(write_words(folder / "words.jsonl", 3, 5, words=TOKENS))


def by_hand(before: ExpertRouter, after: ExpertRouter, corpus: Corpus) -> dict[int, list[float]]:
    """[mean drift, mean share of removed experts] of each layer, one token after another."""
    plan = stored_plan(after)
    assert plan is not None
    sums: dict[int, list[float]] = {}
    for ids in corpus.tokenize(before.tokenizer, None):
        with before.capture("expert_ids", "expert_weights") as first:
            before.forward([ids])
        with after.capture("expert_ids", "expert_weights") as second:
            after.forward([ids])
        for layer in plan.layers:
            became = {old: n for n, group in enumerate(layer.groups) for old in group.experts}
            one, two = first[layer.layer], second[layer.layer]
            for token in range(len(ids)):
                share: dict[int | None, float] = {}
                weights = one.expert_weights[token].astype(np.float64)
                for old, weight in zip(one.expert_ids[token], weights, strict=True):
                    new = became.get(int(old))
                    share[new] = share.get(new, 0.0) + weight / weights.sum()
                other = two.expert_weights[token].astype(np.float64)
                for new, weight in zip(two.expert_ids[token], other, strict=True):
                    share.setdefault(int(new), 0.0)
                    share[int(new)] -= weight / other.sum()
                total = sums.setdefault(layer.layer, [0.0, 0.0])
                total[0] += sum(map(abs, share.values())) / 2
                total[1] += share.get(None, 0.0)
    return {layer: [each / (3 * TOKENS) for each in total] for layer, total in sums.items()}


@pytest.mark.parametrize("child", ["pruned", "merged"])
def test_drift_equals_a_calculation_by_hand(child: str, place: Path, corpus: Corpus) -> None:
    before = ExpertRouter.from_pretrained(place / "source")
    after = ExpertRouter.from_pretrained(place / child)
    drift = verify(before, after, corpus).drift
    wanted = by_hand(before, after, corpus)
    assert [each.layer for each in drift.layers] == list(wanted)
    for each in drift.layers:
        assert each.drift.value == pytest.approx(wanted[each.layer][0], rel=1e-4)
        assert each.removed == pytest.approx(wanted[each.layer][1], rel=1e-4, abs=1e-9)
        assert each.drift.value >= each.removed
        assert (each.removed > 0.1) == (child == "pruned")
    assert drift.mean is not None
    assert drift.mean.value == pytest.approx(np.mean([drift for drift, _ in wanted.values()]))
    assert drift.mapping == "plan.json of the smaller model"
    assert drift.reason is None


def test_drift_of_single_tokens() -> None:
    parent = np.array([[0, 1], [0, 1], [2, 3], [2, 3]]), np.array([[0.6, 0.4]] * 3 + [[0.0, 0.0]])
    child = np.array([[0, 1], [1, 0], [0, 1], [0, 1]]), np.array([[3.0, 2.0]] * 4)
    # Experts 0 and 1 stay as they are, 2 becomes 0, and 3 is removed.
    drift, removed = token_drift(parent, child, np.array([0, 1, 0, -1]), 2)
    np.testing.assert_allclose(drift, [0.0, 0.2, 0.4, 1.0], atol=1e-12)
    np.testing.assert_allclose(removed, [0.0, 0.0, 0.4, 1.0], atol=1e-12)
    with pytest.raises(UsageError, match="the same tokens"):
        token_drift(parent, (child[0][:2], child[1][:2]), np.array([0, 1, 0, -1]), 2)


def test_a_child_without_a_plan_keeps_its_numbers(place: Path, tmp_path: Path) -> None:
    before = ExpertRouter.from_pretrained(place / "source")
    same = map_experts(before, before, None)
    assert all(np.array_equal(each, np.arange(16)) for each in same.layers.values())
    assert same.text == "experts keep their numbers"
    fewer = ExpertRouter.from_pretrained(save_checkpoint("qwen3_moe", tmp_path / "fewer"))
    unknown = map_experts(before, fewer, None)
    assert unknown.layers == {}
    assert "16 experts became 8" in (unknown.reason or "")


def test_a_plan_of_another_parent_maps_nothing(place: Path, corpus: Corpus, tmp_path: Path) -> None:
    other = save_checkpoint("qwen3_moe", tmp_path / "other", experts=16, seed=1)
    found = verify(other, place / "pruned", corpus)
    assert found.drift.layers == ()
    assert found.drift.mean is None
    assert "another checkpoint" in (found.drift.reason or "")
    assert found.loss.kl.value > 0.0


def test_children_of_one_plan_keep_its_numbers(place: Path, tmp_path: Path) -> None:
    source, plan = place / "source", stored_plan(ExpertRouter.from_pretrained(place / "pruned"))
    assert plan is not None
    write(plan, source, tmp_path / "again")
    routers = [
        ExpertRouter.from_pretrained(each) for each in (place / "pruned", tmp_path / "again")
    ]
    found = map_experts(routers[0], routers[1], stored_plan(routers[1]))
    assert found.text == "experts keep their numbers: both have one plan"
    assert all(np.array_equal(each, np.arange(8)) for each in found.layers.values())


def test_a_broken_plan_costs_the_drift_only(place: Path, corpus: Corpus, tmp_path: Path) -> None:
    router = ExpertRouter.from_pretrained(place / "source")
    child = tmp_path / "child"
    write(stored_plan_of(place), place / "source", child)
    (child / "plan.json").write_text("{")
    found = verify(router, child, corpus)
    assert found.drift.layers == ()
    assert "cannot be used" in (found.drift.reason or "")


def test_text_that_calibrated_the_child_is_refused(
    place: Path, corpus: Corpus, tmp_path: Path
) -> None:
    child = tmp_path / "child"
    write(stored_plan_of(place), place / "source", child)
    plan = json.loads((child / "plan.json").read_text())
    plan["corpus"]["fingerprint"] = corpus.fingerprint
    (child / "plan.json").write_text(json.dumps(plan))
    with pytest.raises(UsageError, match=r"3 of 3 different prompts .* calibrated child"):
        verify(place / "source", child, corpus)


def stored_plan_of(place: Path) -> Plan:
    plan = stored_plan(ExpertRouter.from_pretrained(place / "pruned"))
    assert plan is not None
    return plan
