"""Co-activation: shares by loops, chance by enumeration, intervals by a bootstrap, known twins."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from pathlib import Path

import networkx
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import moe_lens.demo
from moe_lens import cli
from moe_lens.analysis.coactivation import (
    Coactivation,
    chance_pairs,
    coactivation,
    coactivation_graph,
)
from moe_lens.analysis.coactivation.certainty import certainty
from moe_lens.analysis.coactivation.communities import communities
from moe_lens.analysis.coactivation.louvain import louvain
from moe_lens.analysis.coactivation.pair_counts import PairCounts
from moe_lens.analysis.passes import fold
from moe_lens.errors import CaptureError, UsageError
from moe_lens.figures.coactivation import draw_coactivation
from moe_lens.figures.picture_file import save_picture
from moe_lens.profile import Profile
from moe_lens.trace import NO_EXPERT, Routes, Trace
from route_cases import TEXTS, random_routes
from trace_cases import trace_of

SLOW = (HealthCheck.function_scoped_fixture,)


def routes_of(ids: np.ndarray, width: int, lengths: list[int] | None = None) -> Routes:
    """Routes with the given ids [layers, tokens, k], in prompts of 20 tokens or these lengths."""
    layers, tokens, k = ids.shape
    lengths = lengths or [20] * (tokens // 20) + [tokens % 20] * (tokens % 20 > 0)
    return Routes(
        layers=tuple(range(2, 2 + layers)),
        router_width=width,
        token_ids=np.zeros(tokens, np.int32),
        prompt=np.repeat(np.arange(len(lengths)), lengths).astype(np.int32),
        position=np.concatenate([np.arange(length) for length in lengths]).astype(np.int32),
        expert_ids=ids.astype(np.uint16),
        expert_weights=np.full((layers, tokens, k), 0.5, np.float16),
        texts=TEXTS,
    )


def drawn(odds: np.ndarray, k: int, tokens: int, seed: int) -> np.ndarray:
    """[tokens, k] by the definition: independent draws, kept where exactly k came up."""
    random = np.random.default_rng(seed)
    found: list[np.ndarray] = []
    while sum(map(len, found)) < tokens:
        chosen = random.random((4 * tokens, len(odds))) < odds
        chosen = chosen[chosen.sum(axis=1) == k]
        found.append(np.nonzero(chosen)[1].reshape(-1, k))
    return np.concatenate(found)[:tokens]


def enumerated(weights: np.ndarray, k: int) -> np.ndarray:
    """[E, E] by the probability of every set of k."""
    table = np.zeros((len(weights), len(weights)))
    for chosen in itertools.combinations(range(len(weights)), k):
        table[np.ix_(chosen, chosen)] += np.prod(weights[list(chosen)])
    return table * k / np.trace(table)


class TestChance:
    @settings(max_examples=60, deadline=None)
    @given(
        logs=st.lists(st.floats(-4, 4), min_size=2, max_size=8),
        data=st.data(),
    )
    def test_against_all_sets(self, logs: list[float], data: st.DataObject) -> None:
        weights = np.exp(np.array(logs))
        one, two = (enumerated(weights, data.draw(st.integers(1, len(logs)))) for _ in range(2))
        found = chance_pairs(np.stack([np.diag(one), np.diag(two)]))
        np.testing.assert_allclose(found, np.stack([one, two]), atol=2e-8)

    def test_two_numbers_of_experts(self) -> None:
        """A share of tokens has one expert more."""
        weights = np.array([0.2, 1.0, 3.0, 0.7, 1.5])
        mixed = 0.3 * enumerated(weights, 2) + 0.7 * enumerated(weights, 3)
        found = chance_pairs(np.diag(mixed)[None])[0]
        np.testing.assert_allclose(found, mixed, atol=1e-8)

    def test_even_loads(self) -> None:
        """k (k - 1) / (E (E - 1)), where the product of the shares is k^2 / E^2."""
        found = chance_pairs(np.full((1, 128), 8 / 128))[0]
        np.testing.assert_allclose(found[0, 1], 8 * 7 / (128 * 127), rtol=1e-9)
        assert (8 / 128) ** 2 / found[0, 1] == pytest.approx(1.134, abs=1e-3)

    def test_always_and_never_chosen(self) -> None:
        found = chance_pairs(np.array([[1.0, 0.5, 0.5, 0.0]]))[0]
        expected = np.diag([1, 0.5, 0.5, 0])
        expected[0, 1:3] = expected[1:3, 0] = 0.5
        np.testing.assert_allclose(found, expected, atol=1e-12)

    def test_rows_of_many_experts(self) -> None:
        """Each token with expert i has k - 1 others."""
        share = np.random.default_rng(0).dirichlet(np.ones(128), size=4) * 8
        share = np.minimum(share, 0.9)
        share *= 8 / share.sum(axis=1, keepdims=True)
        found = chance_pairs(share)
        np.testing.assert_allclose(found.sum(axis=2), 8 * share, atol=1e-7)
        np.testing.assert_array_equal(found, found.transpose(0, 2, 1))


@settings(max_examples=20, deadline=None, suppress_health_check=SLOW)
@given(
    seed=st.integers(0, 999),
    lengths=st.lists(st.integers(0, 9), min_size=1, max_size=14).filter(any),
    uneven=st.booleans(),
    shard=st.sampled_from([1, 10, 1000]),
)
def test_shares_against_counting(
    tmp_path_factory: pytest.TempPathFactory,
    seed: int,
    lengths: list[int],
    uneven: bool,
    shard: int,
) -> None:
    """Every way to cut the tokens into shards counts each of them once."""
    routes = random_routes(seed, lengths=tuple(lengths), uneven=uneven, k=3, width=6)
    trace = trace_of(tmp_path_factory.mktemp("run"), routes, shard_tokens=shard)
    found, ranked = coactivation(trace), coactivation(trace, adjacent_ranks=True)
    assert found.tokens == sum(lengths)
    for row, layer in enumerate(routes.expert_ids.tolist()):
        single, pairs, neighbours = Counter(), Counter(), Counter()
        for token in layer:
            chosen = [expert for expert in token if expert != NO_EXPERT]
            single.update(chosen)
            pairs.update(itertools.permutations(chosen, 2))
            neighbours.update(itertools.pairwise(chosen))
            neighbours.update((b, a) for a, b in itertools.pairwise(chosen))
        for one, two in itertools.permutations(range(6), 2):
            expected = pairs[one, two] / single[one] if single[one] else np.nan
            ranks = neighbours[one, two] / single[one] if single[one] else np.nan
            np.testing.assert_allclose(found.share[row, one, two], expected)
            np.testing.assert_allclose(ranked.share[row, one, two], ranks)
    np.testing.assert_array_equal(found.lift, ranked.lift)
    profile = coactivation(Profile.from_trace(trace))
    np.testing.assert_array_equal(profile.together, found.together)
    np.testing.assert_array_equal(profile.lift, found.lift)
    assert not profile.tested and "a profile does not keep pairs" in profile.findings()[-1]


@pytest.fixture(scope="module")
def chance_trace(tmp_path_factory: pytest.TempPathFactory) -> Trace:
    """4 layers of 16 experts, 12,000 tokens, k = 3, unequal loads and nothing else."""
    odds = 1 / (1 + np.exp(-np.random.default_rng(1).normal(-1.8, 1.0, size=16)))
    ids = np.stack([drawn(odds, 3, 12_000, seed) for seed in range(4)])
    return trace_of(tmp_path_factory.mktemp("run"), routes_of(ids, 16), shard_tokens=5000)


@pytest.fixture(scope="module")
def by_chance(chance_trace: Trace) -> Coactivation:
    return coactivation(chance_trace)


class TestChanceInATrace:
    """Tokens drawn by conditional Bernoulli sampling have no pairs to speak of."""

    def test_lifts_are_1(self, by_chance: Coactivation) -> None:
        expected = by_chance.tokens * by_chance.chance
        often = (expected > 400) & ~np.isnan(by_chance.lift)
        assert often.sum() > 200
        spread = (by_chance.lift[often] - 1) * np.sqrt(expected[often])
        assert abs(spread.mean()) < 0.2 and 0.6 < spread.std() < 1.2

    def test_the_plain_product_would_be_far_off(self, by_chance: Coactivation) -> None:
        share = by_chance.counts / by_chance.tokens
        plain = by_chance.together / by_chance.tokens / (share[:, :, None] * share[:, None, :])
        every = np.arange(16)
        plain[:, every, every] = np.nan
        assert np.nanmedian(plain) < 0.85 < 0.97 < np.nanmedian(by_chance.lift)

    def test_intervals_hold_1(self, by_chance: Coactivation) -> None:
        low, high = by_chance.bound
        tested = np.triu(np.isfinite(by_chance.q), 1)
        held = ((low <= 1) & (high >= 1))[tested]
        assert len(held) > 400 and 0.91 < held.mean() <= 1.0

    def test_one_in_twenty_has_a_p_of_0_05(self, chance_trace: Trace) -> None:
        seen = PairCounts(chance_trace)
        fold(chance_trace, seen)
        seen.finish()
        chance = chance_pairs(np.diagonal(seen.together, axis1=1, axis2=2) / seen.tokens)
        _, p = certainty(seen.together, seen.tokens, chance, seen.products, seen.runs)
        tested = p[np.triu(np.isfinite(p), 1)]
        assert len(tested) > 400 and 0.02 < (tested < 0.05).mean() < 0.08
        assert 0.4 < (tested < 0.5).mean() < 0.6

    def test_nothing_is_claimed(self, by_chance: Coactivation) -> None:
        assert by_chance.tested
        assert (by_chance.attracted | by_chance.repelled).sum() / 2 <= 2
        assert not any(each.found for each in by_chance.groups)
        assert by_chance.inseparable == ((), (), (), ())
        assert "No layer has communities" in by_chance.findings()[-1]


def test_intervals_are_those_of_a_bootstrap_over_prompts(tmp_path: Path) -> None:
    """Prompts that prefer experts of their own: intervals of single tokens would be too narrow."""
    random = np.random.default_rng(3)
    prompts, tokens, width = 120, 25, 6
    # Each prompt says five things, five times.
    said = random.gumbel(size=(prompts, 5, width)) + 0.5 * random.normal(size=(prompts, 1, width))
    ids = np.repeat(np.argsort(-said, axis=2)[:, :, :2], 5, axis=1).reshape(1, -1, 2)
    found = coactivation(trace_of(tmp_path / "run", routes_of(ids, width, [tokens] * prompts)))
    assert found.runs == prompts
    chosen = np.zeros((prompts, tokens, width))
    np.put_along_axis(chosen, ids.reshape(prompts, tokens, 2), 1.0, axis=2)
    by_prompt = np.einsum("pti,ptj->pij", chosen, chosen)
    logs = []
    for _ in range(400):
        table = by_prompt[random.integers(0, prompts, prompts)].sum(axis=0) / (prompts * tokens)
        expected = chance_pairs(np.diag(table)[None])[0]
        logs.append(np.log(table / expected))
    upper = np.triu_indices(width, 1)
    drawn_error = np.std(logs, axis=0)[upper]
    np.testing.assert_allclose(found.error[0][upper], drawn_error, rtol=0.2)
    assert np.mean(found.error[0][upper] / drawn_error) == pytest.approx(1.0, abs=0.07)
    independent = 1 / np.sqrt(found.together[0][upper])
    assert (drawn_error > 1.4 * independent).all()


def test_pairs_that_are_planted(tmp_path: Path) -> None:
    """Expert 1 always with 0; 2 never with 3."""
    random = np.random.default_rng(4)
    ids = np.argsort(random.random((1, 3000, 10)), axis=2)[:, :, :3]
    rows = (ids == 1).any(axis=2) & ~(ids == 0).any(axis=2)
    changed = ids[rows]
    np.put_along_axis(changed, np.where(changed[:, :1] == 1, 2, 0), 0, axis=1)
    ids[rows] = changed
    apart = (ids == 2).any(axis=2) & (ids == 3).any(axis=2)
    swapped = ids[apart]
    swapped[swapped == 3] = np.array([next(e for e in (9, 8, 7) if e not in s) for s in swapped])
    ids[apart] = swapped
    found = coactivation(trace_of(tmp_path / "run", routes_of(ids, 10)))
    top = found.strongest(1)[0]
    assert (top.layer, top.one, top.two, top.share_of_two) == (2, 0, 1, 1.0)
    assert top.low is not None and top.high is not None and top.q is not None
    assert 1 < top.low < top.lift < top.high and top.q < 1e-6
    assert "0 and 1 of layer 2" in found.findings()[0]
    lowest = found.weakest(1)[0]
    assert (lowest.one, lowest.two, lowest.lift, lowest.low) == (2, 3, 0.0, None)


class TestCommunities:
    def test_planted_in_a_trace(self, tmp_path: Path) -> None:
        """Three groups of experts, a token stays within one of them nine times of ten."""
        random = np.random.default_rng(5)
        group = random.integers(0, 3, 4000)
        near = (np.arange(18) // 6)[None] == group[:, None]
        scores = random.random((4000, 18)) + near * (random.random(4000) < 0.9)[:, None]
        names = random.permutation(18)
        ids = names[np.argsort(-scores, axis=1)[:, :3]][None]
        found = coactivation(trace_of(tmp_path / "run", routes_of(ids, 18)))
        planted = {tuple(sorted(names[start : start + 6])) for start in (0, 6, 12)}
        groups = found.groups[0]
        assert set(groups.members) == planted and groups.modularity > groups.null + 0.1
        assert {tuple(sorted(found.order[0][at : at + 6])) for at in (0, 6, 12)} == planted
        assert "three experts or more: 2." in found.findings()[-1]
        assert [row[1] for row in found.tables()[-1].rows] == [6, 6, 6]

    def test_a_random_graph_has_none(self) -> None:
        """Although its best partition has a modularity far above 0."""
        random = np.random.default_rng(6)
        weights = np.triu(random.random((12, 40, 40)) * (random.random((12, 40, 40)) < 0.1), 1)
        found = communities(weights + weights.transpose(0, 2, 1))
        assert min(each.modularity for each in found) > 0.3
        assert sum(each.found for each in found) <= 2

    def test_pairs_are_no_community(self) -> None:
        weights = np.zeros((1, 16, 16))
        weights[0, np.arange(0, 16, 2), np.arange(1, 16, 2)] = 3.0
        found = communities(weights + weights.transpose(0, 2, 1))[0]
        assert found.modularity == pytest.approx(7 / 8) and found.members == ()

    def test_no_edges(self) -> None:
        found = communities(np.zeros((2, 5, 5)))
        assert [(each.modularity, each.null, each.members) for each in found] == [
            (None, None, ())
        ] * 2

    def test_louvain_is_as_good_as_that_of_networkx(self) -> None:
        random = np.random.default_rng(7)
        weights = np.zeros((10, 50, 50))
        for number, each in enumerate(weights):
            ends = random.integers(0, 50, (2, 60 + 60 * number))
            each[ends[0], ends[1]] = random.random(ends.shape[1])
        weights = np.triu(weights, 1)
        weights += weights.transpose(0, 2, 1)
        label, modularity = louvain(weights)
        theirs = []
        for each, groups, value in zip(weights, label, modularity, strict=True):
            graph = networkx.from_numpy_array(each)
            sets = [set(np.flatnonzero(groups == n).tolist()) for n in range(groups.max() + 1)]
            assert networkx.community.modularity(graph, sets) == pytest.approx(value)
            best = networkx.community.louvain_communities(graph, seed=0)
            theirs.append(networkx.community.modularity(graph, best))
        assert np.mean(modularity) > np.mean(theirs) - 0.005


def test_the_twins_of_the_demo(demo_run: Trace) -> None:
    """All 24 pairs of experts that began as copies are found, and no others."""
    folder = Path(moe_lens.demo.__file__).parent
    pairs = json.loads((folder / "model" / "upcycling.json").read_text())["pairs"]
    found = coactivation(demo_run)
    recovered = 0
    for row, layer in enumerate(found.layers):
        twins = {tuple(sorted(pair)) for pair in pairs[str(layer)]}
        assert set(found.inseparable[row]) == twins
        best = np.nan_to_num(found.lift[row]).argmax(axis=1)
        mutual = {
            tuple(sorted((one, int(best[one])))) for one in range(16) if best[best[one]] == one
        }
        recovered += len(mutual & twins)
        top = {(pair.one, pair.two) for pair in found.strongest(layer=layer)}
        assert top == twins
    assert recovered == 24


class TestTooLittle:
    def test_one_prompt(self, tmp_path: Path) -> None:
        found = coactivation(trace_of(tmp_path / "run", random_routes(lengths=(40,))))
        assert found.runs == 1 and np.isnan(found.error).all() and np.isnan(found.q).all()
        assert "1 runs of prompts are too few" in found.findings()[-1]
        assert found.to_dict()["pairs"] == [] and found.strongest(1)[0].low is None

    def test_few_prompts(self, tmp_path: Path) -> None:
        found = coactivation(trace_of(tmp_path / "run", random_routes(lengths=(30,) * 9)))
        assert found.runs == 9 and not found.tested
        assert np.isnan(found.q).all() and np.isfinite(found.error).any()
        assert [each.modularity for each in found.groups] == [None] * 3
        assert found.inseparable == ((), (), ())

    def test_one_expert_per_token(self, tmp_path: Path) -> None:
        with pytest.raises(UsageError, match="one expert"):
            coactivation(trace_of(tmp_path / "run", random_routes(k=1)))

    def test_all_experts(self, tmp_path: Path) -> None:
        """What cannot be otherwise is not claimed."""
        routes = random_routes(width=4, k=4, lengths=(20,) * 12)
        found = coactivation(trace_of(tmp_path / "run", routes))
        off = ~np.eye(4, dtype=bool)
        np.testing.assert_allclose(found.lift[:, off], 1.0)
        assert np.isnan(found.q).all() and found.findings()

    def test_no_tokens(self, tmp_path: Path) -> None:
        empty = Profile.from_routes(random_routes(lengths=(0,)))
        with pytest.raises(CaptureError, match="no tokens"):
            coactivation(empty)

    def test_ranks_of_a_profile(self) -> None:
        with pytest.raises(UsageError, match="ranks"):
            coactivation(Profile.from_routes(random_routes()), adjacent_ranks=True)


def test_graph(demo_run: Trace) -> None:
    found = coactivation(demo_run)
    graph = coactivation_graph(found)
    assert (len(graph), graph.number_of_edges()) == (48, 24)
    place = found.place(2)
    for one, two, data in graph.subgraph(f"L2E{expert}" for expert in range(16)).edges(data=True):
        ends = tuple(graph.nodes[each]["expert"] for each in (one, two))
        assert data["weight"] == data["lift"] == found.lift[(place, *ends)]
        assert data["count"] == found.together[(place, *ends)]
    shares = sum(data["share"] for _, data in graph.nodes(data=True))
    assert shares == pytest.approx(3 * 2)
    assert len(coactivation_graph(found, layer=2)) == 16
    with pytest.raises(UsageError, match="layer 0"):
        coactivation_graph(found, layer=0)


@pytest.mark.parametrize(
    ("style", "ending", "layer"), [("light", ".png", None), ("dark", ".svg", 2)]
)
def test_pictures(demo_run: Trace, tmp_path: Path, style: str, ending: str, layer: int) -> None:
    found = coactivation(demo_run, adjacent_ranks=style == "dark")
    names = [tmp_path / f"{number}{ending}" for number in (1, 2)]
    for name in names:
        save_picture(draw_coactivation, found, name, layer=layer, style=style, subtitle="$m$")
    assert names[0].read_bytes() == names[1].read_bytes()
    assert "OLMoE" in found._repr_html_()
    with pytest.raises(UsageError, match="layer 0"):
        draw_coactivation(found, layer=0)


@pytest.mark.parametrize(("layers", "width"), [(1, 2), (4, 16), (7, 64), (20, 40)])
def test_pictures_of_every_size(tmp_path: Path, layers: int, width: int) -> None:
    routes = random_routes(
        layers=tuple(range(layers)), width=width, k=2, lengths=(9,) * 12, uneven=layers == 4
    )
    found = coactivation(trace_of(tmp_path / "run", routes))
    figure = draw_coactivation(found)
    figure.draw_without_rendering()
    assert found.tables()[0].rows and len(found.to_json()) > 100


def test_command(demo_run: Trace, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, picture = str(demo_run.path), tmp_path / "c.png"
    files = [tmp_path / name for name in ("c.html", "c.graphml")]
    graphs = [part for file in files for part in ("--graph", str(file))]
    assert cli.main(["coactivation", run, "--json", "-o", str(picture), *graphs]) == 0
    shown = json.loads(capsys.readouterr().out)
    found = coactivation(demo_run)
    assert (shown["kind"], shown["model"]) == ("coactivation", "demo")
    assert shown["graphs"] == [str(file) for file in files]
    np.testing.assert_array_equal(shown["together"], found.together)
    np.testing.assert_allclose(
        np.array(shown["lift"], dtype=float), found.lift, rtol=1e-3, equal_nan=True
    )
    assert len(shown["pairs"]) == 24 and picture.stat().st_size
    assert networkx.read_graphml(files[1]).number_of_edges() == 24
    assert cli.main(["coactivation", run, "--adjacent-ranks", "--graph", str(files[0])]) == 0
    said = capsys.readouterr().out
    assert "in adjacent ranks" in said and "Strongest pairs" in said and str(files[0]) in said
    assert cli.main(["coactivation", run, "--layer", "0"]) == 2
    assert "layer 0 has no routed experts" in capsys.readouterr().err
    assert cli.main(["coactivation", run, "--graph", "x.txt"]) == 2
    assert "graphs are written as dot" in capsys.readouterr().err
    assert cli.main(["coactivation", str(tmp_path / "none")]) in (1, 2)
