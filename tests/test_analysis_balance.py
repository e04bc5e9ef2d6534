"""Balance: measures of load and of the router's sureness, against their definitions."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moe_lens import cli
from moe_lens.analysis import distributions
from moe_lens.analysis.balance import balance
from moe_lens.analysis.balance.even import even_counts, even_dead, even_measures
from moe_lens.families import registry
from moe_lens.figures.balance import draw_balance
from moe_lens.figures.picture_file import save_picture
from moe_lens.profile import Profile
from moe_lens.trace import NO_EXPERT, Routes, Trace
from route_cases import random_routes
from tiny_models import save_checkpoint
from trace_cases import trace_of

LOADS = st.lists(st.integers(0, 1000), min_size=2, max_size=40).filter(any)


def plain_measures(loads: list[int]) -> dict[str, float]:
    """By the definitions in words: differences of pairs, logarithms, the largest."""
    experts, mean = len(loads), sum(loads) / len(loads)
    apart = sum(abs(one - two) for one in loads for two in loads) / experts**2
    entropy = -sum(n / sum(loads) * np.log(n / sum(loads)) for n in loads if n)
    return {
        "cv": (sum((n - mean) ** 2 for n in loads) / experts) ** 0.5 / mean,
        "gini": apart / 2 / mean,
        "entropy": entropy / np.log(experts),
        "max_violation": (max(loads) - mean) / mean,
    }


@given(LOADS, st.integers(1, 9))
def test_measures_against_their_definitions(loads: list[int], times: int) -> None:
    expected, counts = plain_measures(loads), times * np.array([loads, loads[::-1]])
    np.testing.assert_allclose(distributions.variation(counts), expected["cv"], atol=1e-9)
    np.testing.assert_allclose(distributions.gini(counts), expected["gini"], atol=1e-9)
    found = distributions.max_violation(counts)
    np.testing.assert_allclose(found, expected["max_violation"], atol=1e-9)
    entropy = distributions.entropy(distributions.shares(counts)) / np.log2(len(loads))
    np.testing.assert_allclose(entropy, expected["entropy"], atol=1e-9)


def test_extremes() -> None:
    even, one = np.full(8, 5), np.array([0, 0, 0, 0, 0, 0, 0, 40])
    assert distributions.gini(even) == distributions.variation(even) == 0
    assert distributions.gini(one) == pytest.approx(7 / 8)
    assert distributions.max_violation(one) == pytest.approx(7)
    assert distributions.entropy(distributions.shares(one)) == 0


def softmax(logits: np.ndarray) -> np.ndarray:
    raised = np.exp(logits - logits.max())
    return raised / raised.sum()


@settings(
    max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    seed=st.integers(0, 999),
    lengths=st.lists(st.integers(0, 9), min_size=2, max_size=10).filter(any),
    k=st.integers(1, 8),
    uneven=st.booleans(),
)
def test_against_counting(
    tmp_path_factory: pytest.TempPathFactory, seed: int, lengths: list[int], k: int, uneven: bool
) -> None:
    routes = random_routes(seed, lengths=tuple(lengths), k=k, uneven=uneven and k > 1, logits=True)
    labels = [("a", "b", None)[place % 3] for place in range(len(lengths))]
    found = balance(trace_of(tmp_path_factory.mktemp("run"), routes, labels))
    for row, group in enumerate(found.groups):
        own = [
            place
            for place, prompt in enumerate(routes.prompt)
            if group in ("all", labels[int(prompt)])
        ]
        assert found.tokens[row] == len(own)
        for layer in range(3):
            check_layer(found, routes, row, layer, own)


def check_layer(found, routes: Routes, row: int, layer: int, own: list[int]) -> None:
    loads = [0] * 8
    mass, lead, sums = [], [], []
    for place in own:
        ids = [int(each) for each in routes.expert_ids[layer, place] if each != NO_EXPERT]
        weights = [float(each) for each in routes.expert_weights[layer, place][: len(ids)]]
        for each in ids:
            loads[each] += 1
        mass.append(sum(weights))
        lead.append(weights[0] - weights[1] if len(weights) > 1 else weights[0])
        logits = routes.router_logits[layer, place].astype(float)
        p = softmax(logits)
        others = [logit for expert, logit in enumerate(logits) if expert not in ids]
        margin = min(logits[ids]) - max(others) if others else 0.0
        sums.append([-(p * np.log(p)).sum(), p[ids].sum(), margin, *p])
    for name, value in plain_measures(loads).items():
        measured = getattr(found, name)
        assert measured.value[row, layer] == pytest.approx(value, abs=1e-9)
        low, high = measured.low[row, layer], measured.high[row, layer]
        assert np.isnan(low) or low - 1e-6 <= value <= high + 1e-6
    np.testing.assert_allclose(found.share[row, layer], np.array(loads) / sum(loads))
    assert found.dead[row, layer] == loads.count(0)
    assert found.weight_mass.value[row, layer] == pytest.approx(np.mean(mass))
    assert found.weight_margin.value[row, layer] == pytest.approx(np.mean(lead), abs=1e-9)
    mean = np.mean(sums, axis=0)
    for place, name in enumerate(("router_entropy", "softmax_mass", "logit_margin")):
        assert getattr(found, name).value[row, layer] == pytest.approx(mean[place], abs=1e-4)
    loss = 8 * (np.array(loads) / sum(loads) * mean[3:]).sum()
    assert found.load_loss.value[row, layer] == pytest.approx(loss, rel=1e-4)


def test_even_router_token_by_token_and_in_closed_form() -> None:
    """Variance of a count is N p (1 - p); never chosen with (1 - p)^N."""
    few = even_counts(40, 2, 8, seed=0)
    assert (few.sum(axis=1) == 80).all() and (few <= 40).all()
    assert few.var() == pytest.approx(40 * 0.25 * 0.75, rel=0.12)
    many = even_counts(4000, 2, 8, seed=0)
    np.testing.assert_allclose(many.sum(axis=1), 8000)
    assert many.var() == pytest.approx(4000 * 0.25 * 0.75, rel=0.12)
    # On both sides of the border the same spread, in the units of chance.
    below, above = (even_measures(tokens, 2, 8, 0)["cv"] for tokens in (399, 401))
    assert below == pytest.approx(above, rel=0.1)
    dead = (even_counts(20, 1, 16, seed=1) == 0).sum(axis=1).mean()
    assert dead == pytest.approx(even_dead(20, 1, 16), rel=0.1)
    assert even_measures(50, 8, 8, 0) == {"cv": 0, "gini": 0, "entropy": 1, "max_violation": 0}


def test_random_routes_look_even(tmp_path: Path) -> None:
    routes = random_routes(5, width=16, k=2, layers=tuple(range(12)), lengths=(60,) * 20)
    found = balance(trace_of(tmp_path / "run", routes, shard_tokens=500))
    for name in ("cv", "gini", "max_violation"):
        measured = getattr(found, name)
        assert measured.value[0].mean() == pytest.approx(measured.even[0].mean(), rel=0.15)
    assert not found.hot.any() and not found.dead.any()


def test_hot_and_dead(tmp_path: Path) -> None:
    routes = random_routes(6, width=8, k=1, layers=(4,), lengths=(50,) * 12)
    ids = np.random.default_rng(0).integers(0, 6, 600)
    ids[::2] = 3
    routes.expert_ids[0, :, 0] = ids
    found = balance(trace_of(tmp_path / "run", routes, ["a", "b"] * 6, shard_tokens=200))
    assert found.hot_experts == ((4, 3),) and found.hot[0, 0] == 1
    assert (found.dead == 2).all() and (found.dead_even < 1e-6).all()
    said = " ".join(found.findings())
    assert "expert 3 gets 4." in said and "2 were never chosen" in said
    assert "1 was surely given" in said


def test_intervals_hold_what_other_corpora_give(tmp_path: Path) -> None:
    """Of 30 corpora of one population, most intervals hold the mean over the corpora."""
    values, ends = [], []
    shares = np.random.default_rng(0).dirichlet(np.full(8, 2.0))
    for seed in range(30):
        random = np.random.default_rng(seed + 1)
        routes = random_routes(seed, layers=(0,), k=1, lengths=(40,) * 25)
        own = np.repeat([random.dirichlet(20 * shares) for _ in range(25)], 40, axis=0)
        chosen = (own.cumsum(axis=1) > random.random((1000, 1))).argmax(axis=1)
        routes.expert_ids[0, :, 0] = chosen
        found = balance(trace_of(tmp_path / f"{seed}", routes, shard_tokens=1000))
        values.append(found.gini.value[0, 0])
        ends.append((found.gini.low[0, 0], found.gini.high[0, 0]))
    held = sum(low <= np.mean(values) <= high for low, high in ends)
    assert held >= 25


def test_a_profile_gives_the_same_loads(tmp_path: Path) -> None:
    routes = random_routes(7, lengths=(9, 8, 7, 6), uneven=True)
    trace = trace_of(tmp_path / "run", routes, ["a", "b", "a", "b"])
    one, two = balance(trace), balance(Profile.from_trace(trace))
    assert one.groups == two.groups
    for name in ("cv", "gini", "entropy", "max_violation"):
        np.testing.assert_allclose(getattr(one, name).value, getattr(two, name).value)
    np.testing.assert_allclose(one.weight_mass.value[0], two.weight_mass.value[0], rtol=1e-6)
    np.testing.assert_array_equal(one.prompts, two.prompts)
    assert two.router_entropy is None and "profile" in (two.missing or "")
    assert not np.isnan(two.gini.low[0]).any() and np.isnan(two.gini.low[1:]).all()
    json.loads(two.to_json())


def with_experts(trace: Trace, number: int) -> Trace:
    header = trace.path / "trace.json"
    content = json.loads(header.read_text())
    header.write_text(json.dumps({**content, "num_experts": number}))
    return Trace.open(trace.path)


def test_zero_experts_are_no_load(tmp_path: Path) -> None:
    """6 experts and 2 zero experts: the loads are those of the 6, the router's those of all 8."""
    routes = random_routes(8, lengths=(30, 30), logits=True)
    found = balance(with_experts(trace_of(tmp_path / "run", routes), 6))
    for layer, ids in enumerate(routes.expert_ids):
        loads = [int((ids == expert).sum()) for expert in range(6)]
        np.testing.assert_allclose(found.share[0, layer], np.array(loads) / sum(loads))
        assert found.gini.value[0, layer] == pytest.approx(plain_measures(loads)["gini"])
        assert found.zero_share[0, layer] == pytest.approx((ids >= 6).mean())
    np.testing.assert_allclose(found.router_entropy.even, np.log(8))
    assert "zero experts" in " ".join(found.findings())


def test_zero_experts_of_layers_that_differ(tmp_path: Path) -> None:
    """The zero experts stand behind the experts that the layer has: 5 of them in layer 1."""
    routes = random_routes(8, lengths=(30, 30), logits=True)
    routes.router_logits[1, :, 7] = -np.inf
    routes.expert_ids[1] = np.argsort(-routes.router_logits[1].astype(float), axis=1)[:, :2]
    found = balance(with_experts(trace_of(tmp_path / "run", routes), 6))
    assert found.experts.tolist() == [6, 5, 6]
    assert found.zero_share[0, 1] == pytest.approx((routes.expert_ids[1] >= 5).mean())
    assert found.router_entropy.even[0, 1] == pytest.approx(np.log(7))


def test_experts_that_a_layer_has_not(tmp_path: Path) -> None:
    """Their logits are -inf, so they are neither dead nor part of any mean."""
    routes = random_routes(9, lengths=(40, 40), logits=True)
    routes.router_logits[1, :, 5:] = -np.inf
    routes.expert_ids[1] = np.argsort(-routes.router_logits[1].astype(float), axis=1)[:, :2]
    found = balance(trace_of(tmp_path / "run", routes))
    assert found.experts.tolist() == [8, 5, 8]
    assert found.dead[0, 1] == 0 and np.isnan(found.share[0, 1, 5:]).all()
    loads = [int((routes.expert_ids[1] == expert).sum()) for expert in range(5)]
    assert found.max_violation.value[0, 1] == pytest.approx(plain_measures(loads)["max_violation"])
    assert found.logit_margin.value[0, 1] > 0
    assert found.router_entropy.even[0, 1] == pytest.approx(np.log(5))
    routes.router_logits[1, :, 2:] = -np.inf
    routes.expert_ids[1] = [[0, 1]]
    all_chosen = balance(trace_of(tmp_path / "two", routes))
    assert all_chosen.logit_margin.value[0, 1] == 0
    assert all_chosen.softmax_mass.value[0, 1] == pytest.approx(1)


def test_margin_below_zero_where_a_higher_logit_was_passed_over(tmp_path: Path) -> None:
    routes = random_routes(3, layers=(0,), k=1, width=3, lengths=(2,), logits=True)
    routes.router_logits[0] = [[3.0, 1.0, 0.0], [0.0, 2.0, 1.5]]
    routes.expert_ids[0] = [[1], [1]]
    found = balance(trace_of(tmp_path / "run", routes))
    assert found.logit_margin.value[0, 0] == pytest.approx((-2.0 + 0.5) / 2, abs=1e-3)
    assert np.isnan(found.gini.low).all()  # one prompt


def test_without_logits(tmp_path: Path) -> None:
    found = balance(trace_of(tmp_path / "run", random_routes(lengths=(9, 8))))
    for name in ("router_entropy", "softmax_mass", "logit_margin", "load_loss"):
        assert getattr(found, name) is None
    assert "--router-logits" in (found.missing or "")
    assert "--router-logits" in found.findings()[-1]
    assert found.weight_margin is not None


def test_same_seed_same_result(tmp_path: Path) -> None:
    trace = trace_of(tmp_path / "run", random_routes(lengths=(9, 8, 7)), ["a", "b", "a"])
    assert balance(trace).to_json() == balance(trace).to_json() != balance(trace, seed=1).to_json()


@pytest.mark.parametrize("layers", [(1, 2), tuple(range(12))], ids=["curves", "map"])
def test_pictures(tmp_path: Path, layers: tuple[int, ...]) -> None:
    routes = random_routes(3, layers=layers, lengths=(9, 8, 7), logits=len(layers) == 2)
    found = balance(trace_of(tmp_path / "run", routes))
    one = save_picture(draw_balance, found, tmp_path / "one.png", subtitle="m", dpi=60)
    two = save_picture(draw_balance, found, tmp_path / "two.png", subtitle="m", dpi=60)
    assert one.read_bytes() == two.read_bytes()
    dark = save_picture(draw_balance, found, tmp_path / "dark.svg", style="dark")
    assert b"<svg" in dark.read_bytes()
    html = found._repr_html_()
    assert "MaxVio" in html and "<table" in html


def test_command(demo_run: Trace, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = tmp_path / "b.png"
    run = str(demo_run.path)
    assert cli.main(["balance", run, "--json", "-o", str(picture)]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["kind"] == "balance" and shown["model"] == "demo" and picture.stat().st_size
    np.testing.assert_allclose(np.sum(shown["share"], axis=2), 1.0)
    # The demo's weights are the softmax itself, so the chosen have the mass of their weights.
    mass, weights = shown["softmax_mass"]["value"], shown["weight_mass"]["value"]
    np.testing.assert_allclose(mass, weights, atol=2e-3)
    assert cli.main(["balance", run]) == 0
    assert "Load of the experts" in capsys.readouterr().out
    assert cli.main(["balance", str(tmp_path / "none")]) == 2


def test_a_live_model_gives_its_logits_and_one_that_cannot_is_measured_without(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = str(save_checkpoint("qwen3_moe", tmp_path / "model"))
    text = tmp_path / "text.txt"
    text.write_text("w1 w2 w3 w4\nw5 w6 w7\n")
    assert cli.main(["balance", model, "--data", str(text), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["router_entropy"]["value"]
    monkeypatch.setattr(registry, "_BY_CLASS", {})  # an architecture that nobody declared
    assert cli.main(["balance", model, "--data", str(text), "--json"]) == 0
    shown = capsys.readouterr()
    assert "router logits are left out" in shown.err
    found = json.loads(shown.out)
    assert found["router_entropy"] is None and "the model gives none" in found["missing"]
    assert found["weight_mass"]["value"]
