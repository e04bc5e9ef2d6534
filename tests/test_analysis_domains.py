"""Domains: rates, divergences and claims, against published counts, a plain count and a null."""

from __future__ import annotations

import json
from itertools import combinations
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moe_lens import cli
from moe_lens.analysis import distributions
from moe_lens.analysis.divergence import divergences
from moe_lens.analysis.domains import domains
from moe_lens.analysis.resampling import FALSE_SHARE
from moe_lens.analysis.units import Units
from moe_lens.errors import UsageError
from moe_lens.figures.domains import draw_domains
from moe_lens.figures.picture_file import save_picture
from moe_lens.trace import NO_EXPERT, Routes, Trace
from route_cases import random_routes
from trace_cases import trace_of

PUBLISHED = Path(__file__).parents[2] / "shared" / "data" / "olmoe_domain_specialization.json"
"""Counts of OLMoE-1B-7B-0924 with what was derived of them (MIT; Resource-Efficient-AI-Lab/MoELens
at bc7352a, public/data/OLMoE/domain_specialization.json). Not part of this repository."""


@pytest.fixture(scope="module")
def published() -> dict[str, Any]:
    if not PUBLISHED.is_file():
        pytest.skip("the published counts are not here")
    content: dict[str, Any] = json.loads(PUBLISHED.read_text())
    names = content["domains"]
    arrays = {
        name: np.array([content[name][domain] for domain in names])
        for name in (
            *("expert_token_count", "token_counts", "activation_rate"),
            *("specialization_score", "layer_divergence"),
        )
    }
    return {**arrays, "k": content["top_k_experts"]}


def test_published_columns(published: dict[str, Any]) -> None:
    counts, tokens = published["expert_token_count"], published["token_counts"]
    assert (counts.sum(axis=2) == published["k"] * tokens[:, None]).all()
    rate = counts / tokens[:, None, None]
    np.testing.assert_allclose(rate, published["activation_rate"], atol=5.0e-5)
    score = distributions.specialisation(rate)
    np.testing.assert_allclose(score, published["specialization_score"], atol=5.1e-5)
    p = distributions.shares(counts)
    variation = distributions.total_variation(p)
    np.testing.assert_allclose(variation, published["layer_divergence"], atol=5.0e-6)
    information = distributions.information(p)
    np.testing.assert_allclose(information[[0, 7, 15]], [0.147, 0.258, 0.353], atol=5e-4)
    entropy = distributions.entropy(p.mean(axis=0)) / np.log2(64)
    np.testing.assert_allclose(entropy[[0, 7, 15]], [0.972, 0.960, 0.932], atol=6e-4)


def test_a_few_published_numbers() -> None:
    """Experts 0 to 3 of layer 0 in the six domains of those counts, and what was published."""
    tokens = np.array([1713, 2008, 2100, 2088, 1662, 1587])
    counts = np.array(
        [
            [485, 148, 151, 84],
            [1403, 159, 199, 128],
            [622, 188, 167, 149],
            [291, 151, 199, 137],
            [32, 203, 175, 117],
            [7, 289, 197, 224],
        ]
    )
    rate = counts / tokens[:, None]
    np.testing.assert_allclose(rate[0], [0.28313, 0.0864, 0.08815, 0.04904], atol=5e-6)
    score = distributions.specialisation(rate)[0]
    np.testing.assert_allclose(score, [0.2373, -0.2848, -0.1612, -0.6465], atol=5e-5)


def plain_divergence(one: np.ndarray, two: np.ndarray) -> float:
    total = 0.0
    for a, b in zip(one, two, strict=True):
        middle = (a + b) / 2
        total += a / 2 * np.log2(a / middle) if a else 0.0
        total += b / 2 * np.log2(b / middle) if b else 0.0
    return total


@settings(max_examples=50, deadline=None)
@given(
    st.lists(
        st.lists(st.integers(0, 50), min_size=5, max_size=5).filter(any), min_size=2, max_size=6
    )
)
def test_divergences_against_their_definition(table: list[list[int]]) -> None:
    p = np.array(table, dtype=float)
    p /= p.sum(axis=1, keepdims=True)
    found = distributions.jensen_shannon(distributions.shares(np.array(table)))
    pairs = []
    for one, two in combinations(range(len(p)), 2):
        pairs.append(plain_divergence(p[one], p[two]))
        assert found[one, two] == found[two, one] == pytest.approx(pairs[-1], abs=1e-9)
    assert distributions.mean_jensen_shannon(p) == pytest.approx(np.mean(pairs), abs=1e-9)
    assert (found.diagonal() == 0).all() and (found <= 1 + 1e-9).all()
    # The joint distribution of domain and expert, with its two margins.
    joint = p / len(p)
    by_chance = joint.sum(axis=0)[None] * joint.sum(axis=1)[:, None]
    filled = joint > 0
    information = float((joint[filled] * np.log2(joint[filled] / by_chance[filled])).sum())
    assert distributions.information(p) == pytest.approx(information, abs=1e-9)


@settings(
    max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    seed=st.integers(0, 999),
    lengths=st.lists(st.integers(0, 9), min_size=4, max_size=12).filter(
        lambda n: any(n[::3]) and any(n[1::3])
    ),
    choices=st.sampled_from([None, 1, 2, 3]),
)
def test_against_counting(
    tmp_path_factory: pytest.TempPathFactory, seed: int, lengths: list[int], choices: int | None
) -> None:
    routes = random_routes(seed, lengths=tuple(lengths), uneven=True, k=3)
    labels = [("a", "b", None)[place % 3] for place in range(len(lengths))]
    found = domains(trace_of(tmp_path_factory.mktemp("run"), routes, labels), choices=choices)
    assert found.domains == ("a", "b")
    for row, name in enumerate(found.domains):
        own = [place for place, label in enumerate(labels) if label == name and lengths[place]]
        assert found.prompts[row] == len(own)
        rows = [place for place, prompt in enumerate(routes.prompt) if prompt in own]
        assert found.tokens[row] == len(rows)
        for layer in range(3):
            chosen = [
                int(each)
                for place in rows
                for each in routes.expert_ids[layer, place, :choices]
                if each != NO_EXPERT
            ]
            for expert in range(8):
                assert found.rate[row, layer, expert] * len(rows) == pytest.approx(
                    chosen.count(expert)
                )
    slots = [min(choices or 3, most) for most in (2, 3, 3)]
    np.testing.assert_allclose(found.uniform, np.array(slots) / 8)
    mean = found.rate.mean(axis=0)
    np.testing.assert_allclose(found.score, np.log2((found.rate + 1e-4) / (mean + 1e-4)))
    for measure in (found.divergence, found.information):
        np.testing.assert_allclose(measure.excess, measure.value - measure.shuffled)
        sure = ~np.isnan(measure.low)
        assert (measure.low <= measure.value)[sure].all()
        assert (measure.value <= measure.high)[sure].all()
    json.loads(found.to_json())


def labelled_routes(
    seed: int, prompts: int, *, preference: float, domains: int = 3, length: int = 40
) -> tuple[Routes, list[str | None]]:
    """Prompts with tastes of their own; in the second layer domain d also likes expert d."""
    random = np.random.default_rng(seed)
    labels: list[str | None] = [f"d{place % domains}" for place in range(prompts)]
    routes = random_routes(seed, layers=(1, 2), width=12, k=2, lengths=(length,) * prompts)
    scores = random.gumbel(size=(2, prompts, length, 12))
    scores += random.normal(0, 0.7, (2, prompts, 1, 12))
    for prompt in range(prompts):
        scores[1, prompt, :, prompt % domains] += preference
    ids = np.argsort(-scores.reshape(2, -1, 12), axis=2)[:, :, :2]
    routes.expert_ids[:] = ids
    return routes, labels


def test_nothing_is_found_where_labels_mean_nothing(tmp_path: Path) -> None:
    """Information is above 0 all the same: it is as much as shuffled labels give."""
    alarms, above = 0, []
    for seed in range(20):
        routes, labels = labelled_routes(seed, 30, preference=0.0)
        found = domains(trace_of(tmp_path / f"{seed}", routes, labels, shard_tokens=2000))
        alarms += bool(found.claimed.any()) + bool((found.information.q <= FALSE_SHARE).any())
        above.append(found.information.excess / found.information.shuffled)
        assert (found.information.value > 0).all()
    assert alarms <= 6  # 40 questions at 5 %
    assert abs(np.mean(above)) < 0.1


def test_a_domain_of_short_prompts_is_no_finding() -> None:
    """Its distribution is noisy, so it is far from the others by chance: also in the null."""
    lengths = np.repeat([20, 200, 200, 200], 15)
    labels = tuple(f"d{place}" for place in np.repeat(range(4), 15))
    units = Units.of(SimpleNamespace(labels=labels, prompt_tokens=lengths))
    alarms = 0
    for seed in range(25):
        random = np.random.default_rng(seed)
        share = random.dirichlet(np.full(16, 2.0))
        counts = [random.multinomial(length, random.dirichlet(300 * share)) for length in lengths]
        found = divergences(units, np.array(counts)[:, None])
        alarms += bool(found[0].p[0] <= 0.05)
    assert alarms <= 5


def test_finds_what_is_there(tmp_path: Path) -> None:
    routes, labels = labelled_routes(0, 45, preference=2.5)
    found = domains(trace_of(tmp_path / "run", routes, labels, shard_tokens=2000))
    assert found.claimed[range(3), 1, range(3)].all()
    assert [found.top(domain, 1) for domain in range(3)] == [[(1, each)] for each in range(3)]
    assert found.information.q[1] <= FALSE_SHARE and found.divergence.q[1] <= FALSE_SHARE
    assert found.information.excess[1] > 5 * abs(found.information.excess[0])
    said = " ".join(found.findings())
    assert "Layer 2 tells domains apart most" in said and "The clearest is expert" in said
    assert "prefer a domain" in said


def test_too_few_prompts(tmp_path: Path) -> None:
    routes, labels = labelled_routes(0, 6, preference=3.0)
    found = domains(trace_of(tmp_path / "run", routes, labels, shard_tokens=2000))
    assert not found.claimed.any() and np.isnan(found.information.q).all()
    said = " ".join(found.findings())
    assert "fewer than 5 prompts: d0 (2), d1 (2), d2 (2)" in said and "too few prompts" in said


def test_refusals(tmp_path: Path) -> None:
    routes = random_routes(lengths=(5, 6))
    with pytest.raises(UsageError, match='0 of them with tokens; give JSONL with a "label"'):
        domains(trace_of(tmp_path / "none", routes))
    with pytest.raises(UsageError, match="1 of them"):
        domains(trace_of(tmp_path / "one", routes, ["a", "a"]))
    with pytest.raises(UsageError, match="can be 1 to 2, not 3"):
        domains(trace_of(tmp_path / "k", routes, ["a", "b"]), choices=3)


@pytest.mark.parametrize("layers", [(1,), tuple(range(1, 7))], ids=["rates", "claims"])
def test_pictures(tmp_path: Path, layers: tuple[int, ...]) -> None:
    routes = random_routes(3, layers=layers, lengths=(9, 8, 7, 9))
    found = domains(trace_of(tmp_path / "run", routes, ["a", "$b$", "a", "$b$"]))
    one = save_picture(draw_domains, found, tmp_path / "one.png", subtitle="m", dpi=60)
    two = save_picture(draw_domains, found, tmp_path / "two.png", subtitle="m", dpi=60)
    assert one.read_bytes() == two.read_bytes()
    dark = save_picture(draw_domains, found, tmp_path / "dark.svg", style="dark")
    assert b"<svg" in dark.read_bytes()
    html = found._repr_html_()
    assert "OLMoE" in html and "Clearest experts" in html


def test_command(demo_run: Trace, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = tmp_path / "d.png"
    run = str(demo_run.path)
    assert cli.main(["domains", run, "--json", "-o", str(picture), "--choices", "1"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["kind"] == "domains" and shown["model"] == "demo" and picture.stat().st_size
    assert shown["choices"] == 1
    np.testing.assert_allclose(np.sum(shown["rate"], axis=2), 1.0)
    assert cli.main(["domains", run]) == 0
    assert "Clearest experts of each domain" in capsys.readouterr().out
    assert cli.main(["domains", run, "--choices", "3"]) == 2
    assert "choices can be 1 to 2" in capsys.readouterr().err


def test_demo_knows_its_domains(demo_run: Trace) -> None:
    """Every layer of the trained model tells the six domains apart, far above chance."""
    found = domains(demo_run)
    assert (found.information.q <= FALSE_SHARE).all()
    assert (found.information.value > 10 * found.information.shuffled).all()
    assert found.claimed.any(axis=(1, 2)).all()
