"""What a plan remembers for people is checked when it is read, not when a model is written."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moe_lens.compress import Plan, read_plan
from moe_lens.compress.plan.plan_json import read_plan as read
from moe_lens.errors import UsageError
from moe_lens.json_shape import NUMBER, fits
from test_plan import plan

MEASURE = {"value": 0.1, "low": 0.0, "high": 0.2}
TRIAL = {
    "method": "reap",
    "num_experts": 6,
    "expert_width": 8,
    "experts_per_token": 2,
    "bytes": 10,
    **dict.fromkeys(("kl", "perplexity", "top1_agreement"), MEASURE),
}
EVIDENCE: dict[str, Any] = {
    "choice": {
        "text": "reap is best",
        "definition": "KL",
        "limit_bytes": 10,
        "validation": {"fingerprint": "f", "tokens": 3},
        "trials": [TRIAL],
        "skipped": [{"method": "merge", "reason": "too large"}],
    },
    "merge_tree": {
        "layer": 1,
        "height": "1 - similarity",
        "parts": [
            {"experts": [0, 2, 4], "first": [0, 1], "second": [2, 3], "height": [0.1, 0.2]},
            {"experts": [5], "first": [], "second": [], "height": []},
        ],
    },
    "experts_per_token": {"text": "two"},
    "router_repair": {"text": "better"},
    "kept_importance": {"1": 0.5, "2": None},
    "calibration_prompts": ["0123"],
    "anything": [1, {"else": None}],
}

Edit = Callable[[dict[str, Any]], Any]


def content() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(plan().to_json())
    found["evidence"] = json.loads(json.dumps(EVIDENCE))
    return found


def test_all_that_is_written_is_read() -> None:
    found: Plan = read_plan(content())
    assert found.evidence == EVIDENCE


def tree(found: dict[str, Any]) -> dict[str, Any]:
    part: dict[str, Any] = found["evidence"]["merge_tree"]["parts"][0]
    return part


def trial(found: dict[str, Any]) -> dict[str, Any]:
    each: dict[str, Any] = found["evidence"]["choice"]["trials"][0]
    return each


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (lambda c: c.update(evidence=[1]), '"evidence" of the plan must be an object'),
        (lambda c: c.update(settings="fast"), '"settings" of the plan must be an object'),
        (lambda c: c["settings"].update(threshold="0.8"), '"threshold" in the "settings"'),
        (lambda c: c["settings"].update(grouping=["a"]), '"grouping" in the "settings"'),
        (lambda c: c["evidence"]["choice"].pop("text"), '"choice" in the "evidence"'),
        (lambda c: c["evidence"]["choice"].update(trials=[]), '"choice" in the "evidence"'),
        (lambda c: trial(c).update(bytes="10"), '"choice"'),
        (lambda c: trial(c).update(kl={"value": "0"}), '"choice"'),
        (lambda c: c["evidence"].update(router_repair="yes"), '"router_repair"'),
        (lambda c: c["evidence"].update(kept_importance={"1": "a"}), '"kept_importance"'),
        (lambda c: c["evidence"].update(calibration_prompts=[[]]), '"calibration_prompts"'),
        (lambda c: tree(c).update(first=[0, 0]), '"merge_tree"'),
        (lambda c: tree(c).update(second=[2, 4]), '"merge_tree"'),
        (lambda c: tree(c).update(first=[0, 3]), '"merge_tree"'),
        (lambda c: tree(c).update(height=[0.1]), '"merge_tree"'),
        (lambda c: tree(c).update(experts=[0, 2, 99]), '"merge_tree"'),
        (lambda c: tree(c).update(experts=[]), '"merge_tree"'),
        (lambda c: c["layers"][0].update(saliency=[1, 2]), 'has 2 numbers in "saliency", not one'),
        (lambda c: c["layers"][0].update(saliency="high"), '"saliency" must be a list of numbers'),
        (lambda c: c["layers"][0].update(groups_reached=[]), '"groups_reached"'),
        (lambda c: c["layers"][0]["groups"][0].update(similarity=[]), "similarities must be num"),
        (lambda c: c["model"].update(num_experts=0), "describes no possible model"),
        (lambda c: c["model"].update(group_count=0), "describes no possible model"),
        (lambda c: c["model"].update(num_experts=10**18, router_width=10**18), "no possible mode"),
        (lambda c: c["model"].update(num_experts=9999, router_width=9999), "nothing about exper"),
        (lambda c: c["model"].update(expert_width=10**18), "no possible model"),
        (lambda c: c["model"].update(fingerprint=7), 'has the "fingerprint" 7, which cannot be'),
        (lambda c: c["model"].update(group_score="best"), "has the \"group_score\" 'best'"),
        (lambda c: c["corpus"].update(tokens=-1), 'has the "tokens" -1, which cannot be'),
    ],
)
def test_slips_are_found_before_anything_is_written(edit: Edit, words: str) -> None:
    found = content()
    edit(found)
    with pytest.raises(UsageError, match=words):
        read(found)


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a": NaN}', '{"a": "\\ud800"}', "{", ""])
def test_files_that_are_no_json(text: str, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_text(text)
    with pytest.raises(UsageError, match="cannot be read as a plan"):
        read_plan(path)


def test_shapes() -> None:
    assert fits({"a": 1, "b": 2}, {"a": int})
    assert not fits({"b": 2}, {"a": int})
    assert fits({"x": 1, "y": 2.5}, {"*": NUMBER})
    assert not fits({"x": True}, {"*": NUMBER})
    assert not fits(float("inf"), NUMBER)
    assert fits([1, None], [(int, type(None))])
    assert not fits([1, "a"], [int])
    assert not fits(True, int)


def test_what_a_file_says_moves_no_cursor() -> None:
    found = content()
    found["kind"] = "\x1b[2J\nmerge"
    with pytest.raises(UsageError) as refused:
        read(found)
    assert str(refused.value).isprintable()
