"""Locality: neighbouring tokens that share experts, against a count by hand."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moe_lens import cli
from moe_lens.analysis.locality import locality
from moe_lens.errors import UsageError
from moe_lens.figures.locality import draw_locality
from moe_lens.figures.picture_file import save_picture
from moe_lens.trace import NO_EXPERT, Routes, Trace
from route_cases import random_routes
from trace_cases import trace_of


def counted(routes: Routes, wanted: set[int]) -> dict[str, list[float]]:
    """By loops over prompts and sets of experts."""
    found: dict[str, list[float]] = {"first": [], "any": [], "overlap": []}
    for layer in routes.expert_ids:
        first, shared, many = [], [], []
        for prompt in sorted(wanted):
            rows = [list(map(int, row)) for row in layer[routes.prompt == prompt]]
            for one, two in pairwise(rows):
                common = set(one) & set(two) - {NO_EXPERT}
                first.append(one[0] == two[0])
                shared.append(bool(common))
                many.append(len(common))
        for name, values in (("first", first), ("any", shared), ("overlap", many)):
            found[name].append(float(np.mean(values)))
    return found


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    seed=st.integers(0, 999),
    lengths=st.lists(st.integers(0, 9), min_size=2, max_size=12).filter(lambda n: max(n) > 1),
    uneven=st.booleans(),
)
def test_against_counting(
    tmp_path_factory: pytest.TempPathFactory, seed: int, lengths: list[int], uneven: bool
) -> None:
    routes = random_routes(seed, lengths=tuple(lengths), uneven=uneven, k=3)
    labels = [("a", "b", None)[place % 3] for place in range(len(lengths))]
    found = locality(trace_of(tmp_path_factory.mktemp("run"), routes, labels))
    groups = {"all": set(range(len(lengths)))}
    groups |= {
        name: {place for place, label in enumerate(labels) if label == name} for name in ("a", "b")
    }
    for row, group in enumerate(found.groups):
        pairs = sum(max(0, lengths[prompt] - 1) for prompt in groups[group])
        assert found.pairs[row] == pairs > 0
        expected = counted(routes, groups[group])
        for name in ("first", "any", "overlap"):
            np.testing.assert_allclose(getattr(found, name).value[row], expected[name])
    left_out = set(groups) - set(found.groups)
    assert all(sum(max(0, lengths[p] - 1) for p in groups[name]) == 0 for name in left_out)


def test_random_expectations(tmp_path: Path) -> None:
    """Mixtral's: 12.5 % and 46.4 % for 2 of 8; random routes come near, in both orders."""
    routes = random_routes(1, width=8, k=2, lengths=(400,) * 12)
    found = locality(trace_of(tmp_path / "run", routes, shard_tokens=1000))
    np.testing.assert_allclose(found.first.random, 0.125)
    np.testing.assert_allclose(found.any.random, 0.464, atol=5e-4)
    np.testing.assert_allclose(found.overlap.random, 0.5)
    for asked in (found.first, found.any, found.overlap):
        np.testing.assert_allclose(asked.value[0], asked.random, rtol=0.08)
        np.testing.assert_allclose(asked.shuffled[0], asked.random, rtol=0.08)
        assert (asked.low <= asked.value).all() and (asked.value <= asked.high).all()


def test_order_alone_is_above_the_shuffled_text(tmp_path: Path) -> None:
    """Runs of 5 tokens on one expert: kept by neighbours, lost when shuffled."""
    routes = random_routes(2, width=8, k=1, layers=(0,), lengths=(100,) * 10)
    runs = np.repeat(np.random.default_rng(0).integers(0, 8, 200), 5)
    routes.expert_ids[0, :, 0] = runs
    found = locality(trace_of(tmp_path / "run", routes, shard_tokens=300))
    assert found.first.value[0, 0] > 0.8
    assert found.first.shuffled[0, 0] < 0.2


def test_uneven_k(tmp_path: Path) -> None:
    """The expectation is that of each layer's own k."""
    routes = random_routes(3, width=8, k=3, uneven=True, lengths=(30, 30))
    found = locality(trace_of(tmp_path / "run", routes))
    np.testing.assert_allclose(found.overlap.random, [2 * 2 / 8, 9 / 8, 9 / 8])


def test_no_neighbours(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="two tokens"):
        locality(trace_of(tmp_path / "run", random_routes(lengths=(1, 1, 0))))


def test_same_seed_same_result(tmp_path: Path) -> None:
    trace = trace_of(tmp_path / "run", random_routes(lengths=(9, 8, 7)), ["a", "b", "a"])
    assert locality(trace).to_json() == locality(trace).to_json()
    other = locality(trace, seed=1)
    np.testing.assert_array_equal(locality(trace).first.value, other.first.value)


@pytest.mark.parametrize("style", ["light", "dark"])
@pytest.mark.parametrize("ending", [".png", ".svg", ".pdf"])
def test_pictures(tmp_path: Path, style: str, ending: str) -> None:
    trace = trace_of(tmp_path / "run", random_routes(lengths=(9, 8, 7)), ["a", "$b$", None])
    found = locality(trace)
    one = save_picture(draw_locality, found, tmp_path / f"one{ending}", style=style, subtitle="m")
    two = save_picture(draw_locality, found, tmp_path / f"two{ending}", style=style, subtitle="m")
    assert one.read_bytes() == two.read_bytes()
    html = found._repr_html_()
    assert "Mixtral" in html and "<table" in html


def test_command(demo_run: Trace, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = tmp_path / "l.png"
    assert cli.main(["locality", str(demo_run.path), "--json", "-o", str(picture)]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["kind"] == "locality" and shown["model"] == "demo" and picture.stat().st_size
    np.testing.assert_allclose(shown["first"]["value"], locality(demo_run).first.value)
    assert cli.main(["locality", str(demo_run.path)]) == 0
    assert "Same first choice" in capsys.readouterr().out
    assert cli.main(["locality", str(demo_run.path), "--data", "demo"]) == 2
    assert "leave out --data" in capsys.readouterr().err
