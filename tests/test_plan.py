"""Plans travel through JSON, and what was edited wrongly is found."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moe_lens.compress import ExpertGroup, LayerPlan, Plan, read_plan
from moe_lens.compress.plan.identity import CorpusIdentity, ModelIdentity, public_name
from moe_lens.compress.plan.json_text import dump
from moe_lens.errors import UsageError

CORPUS = CorpusIdentity("words", "f" * 64, 4, 1000, 512, 3)


def plan(groups: int = 1) -> Plan:
    model = ModelIdentity(
        name="tiny",
        model_type="deepseek_v3" if groups > 1 else "qwen3_moe",
        family="deepseek_v3" if groups > 1 else "qwen3_moe",
        fingerprint="a" * 64,
        num_experts=8,
        router_width=8,
        experts_per_token=2,
        group_count=groups,
        group_keep=1,
        group_score="top2" if groups > 1 else "none",
    )
    layer = (
        ExpertGroup((0, 2), (0.1 + 0.2, 0.7 - 1e-17), 0.9, 0.95, 0.85),
        ExpertGroup.single(1),
        ExpertGroup((4, 5), (0.5, 0.5)),
        ExpertGroup.single(7),
    )
    layers = (LayerPlan(1, layer, (3, 6), 3, (0.5, None, *[1.0] * 6)), LayerPlan(2, layer, (3, 6)))
    return Plan("merge", model, CORPUS, 4, 2, layers, {"threshold": 0.8}, {"seen": [1, 2]})


@pytest.mark.parametrize("groups", [1, 2])
def test_a_plan_comes_back_from_json_as_it_was(groups: int, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_text(plan(groups).to_json())
    assert read_plan(path) == plan(groups)
    assert read_plan(path).to_json() == plan(groups).to_json()


def test_json_is_short_enough_to_read() -> None:
    text = plan().to_json()
    assert '"experts": [ 0, 2 ]' in text
    assert '"summary": "8 -> 4 experts in each of 2 layers (50% merged), 2 -> 2' in text
    assert json.loads(text)["layers"][0]["saliency"][1] is None


def test_json_has_no_words_that_json_does_not_know() -> None:
    text = dump({"a": float("nan"), "b": [float("inf"), 1.0], "c": "[1,\n 2]"})
    assert json.loads(text) == {"a": None, "b": [None, 1.0], "c": "[1,\n 2]"}


Edit = Callable[[dict[str, Any]], Any]


def layer_0(content: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = content["layers"][0]
    return found


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda c: c.update(format="x"), "this is no plan"),
        (lambda c: c.update(version=99), "version 99"),
        (lambda c: c.update(kind="melt"), '"merge", "prune" or "channels"'),
        (lambda c: c.pop("model"), '"model" is missing'),
        (lambda c: c["model"].pop("num_experts"), '"model" of the plan is incomplete'),
        (lambda c: c["model"].update(colour="red"), '"model" of the plan is incomplete'),
        (lambda c: c.update(num_experts="4"), '"num_experts" is missing in plan'),
        (lambda c: c.update(num_experts=5), "keeps 4 experts, but"),
        (lambda c: c.update(experts_per_token=5), "at most 4, but 5"),
        (lambda c: c.update(experts_per_token=0), "cannot run with 0 experts per token"),
        (lambda c: c.update(layers=[]), "no layers"),
        (lambda c: c.update(layers={}), '"layers" is missing'),
        (lambda c: c["layers"].append(3), r"layers\[2\] of the plan must be an object"),
        (lambda c: c["layers"][1].update(layer=1), "names a layer twice"),
        (lambda c: layer_0(c).pop("layer"), r'"layer" is missing in layers\[0\]'),
        (lambda c: layer_0(c).update(groups=None), '"groups" is missing'),
        (lambda c: layer_0(c).update(removed=[3]), "says nothing about expert 6"),
        (lambda c: layer_0(c).update(removed=[3, 6, 7]), "names expert 7 twice"),
        (lambda c: layer_0(c).update(removed=[3, 6, 8]), "names expert 8; the model has"),
        (lambda c: layer_0(c).update(removed=[3, 6, -1]), "names expert -1"),
        (lambda c: layer_0(c).update(removed=[3, True]), "must be a list of expert ids"),
        (lambda c: layer_0(c).update(removed="3"), "must be a list of expert ids"),
        (lambda c: layer_0(c)["groups"].append([]), "layer 1, group 4 of the plan must be"),
        (lambda c: layer_0(c)["groups"][1].update(experts=[]), "has no experts"),
        (lambda c: layer_0(c)["groups"][0].pop("weights"), 'needs one of "weights"'),
        (lambda c: layer_0(c)["groups"][0].update(weights=[1]), 'needs one of "weights"'),
        (lambda c: layer_0(c)["groups"][0].update(weights=[-1, 2]), "no share of 0 or more"),
        (lambda c: layer_0(c)["groups"][0].update(weights=[None, 1]), "no share of 0 or more"),
        (lambda c: layer_0(c)["groups"][0].update(weights=[1, 1]), "must add up to 1, not 2"),
    ],
)
def test_slips_are_found_and_named(edit: Edit, message: str) -> None:
    content = json.loads(plan().to_json())
    edit(content)
    with pytest.raises(UsageError, match=message):
        read_plan(content)


@pytest.mark.parametrize(
    "groups",
    [
        [[0, 1], [2, 3], [4], [5], [6], [7]],  # two of one group, four of the other
        [[4], [5], [0], [1]],  # the other way round
        [[0, 4], [1], [5], [6]],  # across the groups
    ],
)
def test_router_groups_stay_equal_and_in_order(groups: list[list[int]]) -> None:
    content = json.loads(plan(2).to_json())
    named = {expert for group in groups for expert in group}
    for layer in content["layers"]:
        layer["groups"] = [
            {"experts": group, "weights": [1 / len(group)] * len(group)} for group in groups
        ]
        layer["removed"] = sorted(set(range(8)) - named)
    content["num_experts"] = len(groups)
    with pytest.raises(UsageError, match="the same number of experts in each of the router's 2"):
        read_plan(content)


def test_files_that_are_no_plan(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="there is no plan at"):
        read_plan(tmp_path / "none.json")
    path = tmp_path / "plan.json"
    path.write_text("{")
    with pytest.raises(UsageError, match="cannot be read as a plan"):
        read_plan(path)
    path.write_text("[1]")
    with pytest.raises(UsageError, match="must be a JSON object"):
        read_plan(path)


def test_an_edited_plan_is_taken() -> None:
    content = json.loads(plan().to_json())
    for layer in content["layers"]:
        layer["groups"][0] = {"experts": [0]}
        layer["removed"] = [2, 3, 6]
    edited = read_plan(content)
    assert edited.layers[0].groups[0] == ExpertGroup.single(0)


def test_names_are_published_without_folders(tmp_path: Path) -> None:
    assert public_name("owner/model") == "owner/model"
    assert public_name("demo") == "demo"
    assert public_name(tmp_path / "model") == "model"
    assert public_name("../somewhere/model") == "model"


def test_html_escapes_what_people_wrote() -> None:
    assert "<script>" not in plan()._repr_html_()
    assert "0+2" in plan()._repr_html_()
