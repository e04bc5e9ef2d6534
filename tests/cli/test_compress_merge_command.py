"""``moe-lens compress --merge``: the options of a merge, through the command line."""

from __future__ import annotations

from typing import Any

import pytest

from moe_lens.cli import merge_options
from moe_lens.compress.merging.merging import (
    ALIGNMENTS,
    GROUPINGS,
    ROUTER_ROWS,
    TO_A_NUMBER,
    WEIGHTS,
)


@pytest.fixture
def dry(files: Any) -> list[object]:
    texts = ["--data", files.text, "--eval-data", files.other_text]
    return ["compress", files.moe, *texts, "--dry-run", "--json"]


def test_the_command_line_offers_what_the_api_has() -> None:
    for enum, names in (
        (merge_options.Grouping, GROUPINGS),
        (merge_options.Weights, WEIGHTS),
        (merge_options.Alignment, ALIGNMENTS),
        (merge_options.RouterRows, ROUTER_ROWS),
    ):
        assert [each.value for each in enum] == list(names)


@pytest.mark.parametrize("size", [["--ratio", "0.25"], ["--experts", "6"]])
def test_merging_to_a_number_of_experts(size: list[str], run: Any, dry: list[object]) -> None:
    found = run(*dry, *size, "--merge")
    assert found.code == 0
    plan = found.json["plan"]
    assert (plan["kind"], plan["num_experts"]) == ("merge", 6)
    assert plan["settings"]["grouping"] == TO_A_NUMBER.grouping
    merged = [g for layer in plan["layers"] for g in layer["groups"] if len(g["experts"]) > 1]
    assert all("router_row" in group and "orders" in group for group in merged)


def test_every_choice_reaches_the_plan(run: Any, dry: list[object]) -> None:
    choices = ["--grouping", "m-smoe", "--merge-weights", "equal", "--align", "none"]
    found = run(*dry, "--ratio", "0.5", "--merge", *choices, "--router-rows", "dominant")
    settings = found.json["plan"]["settings"]
    assert (settings["grouping"], settings["weights"]) == ("m-smoe", "equal")
    assert (settings["align"], settings["router_rows"]) == ("none", "dominant")
    groups = [g for layer in found.json["plan"]["layers"] for g in layer["groups"]]
    assert all(g["router_row"] in g["experts"] for g in groups if len(g["experts"]) > 1)
    found = run(*dry, "--ratio", "0.5", "--merge", "--similarity", "weights=0.5,overlap=0.5")
    settings = found.json["plan"]["settings"]
    assert settings["similarity"] == {"weights": 0.5, "overlap": 0.5}
    assert settings["grouping"] == "complete"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--ratio", "0.5", "--align", "both"], "belong to a merge"),
        (["--threshold", "0.1", "--grouping", "ream"], "complete linkage"),
        (["--merge"], "--ratio 0.25"),
        (["--merge", "--threshold", "0.5"], "--ratio 0.5 --merge"),
        (["--ratio", "0.5", "--merge", "--method", "reap"], "it belongs to --ratio"),
        (["--ratio", "0.5", "--merge", "--protect"], "something of every expert"),
        (["--ratio", "0.5", "--merge", "--expert-width", "0.5"], "compress twice"),
        (["--ratio", "0.5", "--merge", "--similarity", "taste"], "no similarity 'taste'"),
    ],
)
def test_choices_that_do_not_fit(
    options: list[str], message: str, run: Any, dry: list[object]
) -> None:
    found = run(*dry, *options)
    assert found.code == 2
    assert message in found.json["error"]
