"""What analyses stand on: one pass over a trace, sets of experts as bits, tables."""

from __future__ import annotations

import html.parser
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_lens.analysis.expert_sets import expert_sets, shared_experts
from moe_lens.analysis.passes import fold, successors
from moe_lens.analysis.result import Result
from moe_lens.analysis.table import Table
from moe_lens.trace import NO_EXPERT, Routes
from route_cases import random_routes
from trace_cases import trace_of


class Seen:
    """A fold that keeps what it is given."""

    def __init__(self) -> None:
        self.parts: list[Routes] = []

    def add(self, routes: Routes) -> None:
        self.parts.append(routes)


def test_every_fold_sees_every_shard_once(tmp_path: Path) -> None:
    routes = random_routes(lengths=(30, 20, 0, 25, 30))
    trace = trace_of(tmp_path / "run", routes)
    one, two, told = Seen(), Seen(), []
    fold(trace, one, two, progress=lambda done, total: told.append((done, total)))
    assert len(one.parts) == len(trace.entries) > 1
    assert all(a is b for a, b in zip(one.parts, two.parts, strict=True))
    joined = Routes.concatenate(one.parts)
    np.testing.assert_array_equal(joined.expert_ids, routes.expert_ids)
    np.testing.assert_array_equal(joined.token_ids, routes.token_ids)
    assert told[0] == (0, 105) and told[-1] == (105, 105)
    assert [done for done, _ in told] == sorted(done for done, _ in told)


def test_successors_end_with_the_prompt() -> None:
    routes = random_routes(lengths=(3, 0, 1, 2))
    assert successors(routes).tolist() == [0, 1, 4]
    cut = routes.take(np.array([0, 2, 3, 4, 5]))  # a token left out has no neighbours
    assert successors(cut).tolist() == [3]


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 999), width=st.sampled_from([1, 2, 63, 64, 65, 128, 300]), data=st.data()
)
def test_sets_are_sets(seed: int, width: int, data: st.DataObject) -> None:
    k = data.draw(st.integers(1, min(width, 9)))
    routes = random_routes(
        seed, width=width, k=k, lengths=(12,), layers=(0,), uneven=k > 1 and seed % 2 == 0
    )
    ids = routes.expert_ids[0]
    if width <= 256 and not (ids == NO_EXPERT).any():
        ids = ids.astype(np.uint8)
    found = expert_sets(ids, width)
    shared = shared_experts(found[:-1], found[1:])
    sets = [{int(each) for each in row if each != NO_EXPERT} for row in ids]
    assert shared.tolist() == [len(a & b) for a, b in pairwise(sets)]
    for row, chosen in zip(found, sets, strict=True):
        number = sum(int(word) << 64 * place for place, word in enumerate(row))
        assert {bit for bit in range(number.bit_length()) if number >> bit & 1} == chosen


@dataclass(frozen=True, eq=False)
class Inner:
    values: np.ndarray


@dataclass(frozen=True, eq=False)
class Found(Result):
    kind: ClassVar[str] = "found"
    definition: str
    inner: Inner
    pairs: dict[tuple[int, int], float]

    def findings(self) -> list[str]:
        return ["<one> & two"]

    def tables(self) -> list[Table]:
        return [Table(("name", "value"), (("<b>", 1.23456), ("c", None)), "a & b")]


class Balanced(html.parser.HTMLParser):
    """Fails where a tag is closed that is not open."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: object) -> None:
        if tag != "br":
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data + "|"


def test_a_result_in_json_and_html() -> None:
    found = Found("what <it> is", Inner(np.array([1.0, np.nan])), {(1, 2): 0.5})
    assert found.to_dict() == {
        "kind": "found",
        "definition": "what <it> is",
        "inner": {"values": [1.0, None]},
        "pairs": {"(1, 2)": 0.5},
    }
    page = Balanced()
    page.feed(found._repr_html_())
    assert page.open == []
    for text in ("found", "<one> & two", "a & b", "<b>", "1.23", "what <it> is"):
        assert f"{text}|" in page.text


@pytest.mark.parametrize(
    ("cell", "text"),
    [
        (None, ""), (float("nan"), ""), ("text", "text"), (1234567, "1,234,567"),
        (0.0, "0.00"), (1.23456, "1.23"), (99.95, "100"), (12.34, "12.3"), (999.4, "999"),
        (1234.5, "1,234"), (-0.5, "-0.500"), (1e-7, "1e-07"),
    ],
)  # fmt: skip
def test_cells(cell: object, text: str) -> None:
    found = Table(("one",), ((cell,),))  # type: ignore[arg-type]
    assert found.texts() == [(text,)]


def test_columns_of_numbers() -> None:
    found = Table(("name", "count", "share"), (("a", 1, None), ("b", 2, 0.5)))
    assert found.numbers == ("count", "share")
