"""Experts across layers: against counts by hand, and against ways that are known."""

from __future__ import annotations

import itertools
import json
import math
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scipy import stats

from moe_lens import cli
from moe_lens.analysis.pipeline import Pipeline, pipeline, pipeline_graph
from moe_lens.analysis.pipeline.chains import best_chains
from moe_lens.analysis.pipeline.matching import dealt_anew
from moe_lens.errors import UsageError
from moe_lens.figures.picture_file import save_picture
from moe_lens.figures.pipeline import draw_pipeline
from moe_lens.figures.pipeline_depth import draw_depth
from moe_lens.trace import NO_EXPERT, Routes, Trace
from pipeline_cases import CHAIN, alike_in_a_prompt, planted
from route_cases import random_routes
from trace_cases import trace_of

ANY_FOLDER = [HealthCheck.function_scoped_fixture]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Pipeline:
    """Label a takes `CHAIN` with a chance of 0.8."""
    routes, labels = planted()
    return pipeline(trace_of(tmp_path_factory.mktemp("planted") / "run", routes, labels))


def steps_by_hand(routes: Routes, place: int, slots: int) -> Counter[tuple[int, int]]:
    counted: Counter[tuple[int, int]] = Counter()
    for one, two in zip(routes.expert_ids[place], routes.expert_ids[place + 1], strict=True):
        pairs = itertools.product(one[:slots].tolist(), two[:slots].tolist())
        counted.update(pair for pair in pairs if NO_EXPERT not in pair)
    return counted


def bits_by_hand(counted: Counter[tuple[int, int]]) -> float:
    """Plug-in mutual information less Miller's bias."""
    total = sum(counted.values())
    rows, columns = Counter[int](), Counter[int]()
    for (i, j), many in counted.items():
        rows[i] += many
        columns[j] += many
    bits = sum(
        many / total * math.log2(many * total / (rows[i] * columns[j]))
        for (i, j), many in counted.items()
    )
    cells = len(counted) - len(rows) - len(columns) + 1
    return bits - cells / (2 * total * math.log(2))


class TestSteps:
    @settings(max_examples=15, deadline=None, suppress_health_check=ANY_FOLDER)
    @given(
        seed=st.integers(0, 999),
        lengths=st.lists(st.integers(0, 9), min_size=1, max_size=8).filter(any),
        k=st.sampled_from([1, 2, 3, 5]),
        labelled=st.booleans(),
    )
    def test_against_counting(
        self,
        tmp_path_factory: pytest.TempPathFactory,
        seed: int,
        lengths: list[int],
        k: int,
        labelled: bool,
    ) -> None:
        uneven = k > 1 and seed % 2 == 0
        routes = random_routes(seed, lengths=tuple(lengths), width=5, k=k, uneven=uneven)
        labels = [
            ("a", "b", None)[place % 3] if labelled else None for place in range(len(lengths))
        ]
        made = pipeline(trace_of(tmp_path_factory.mktemp("run"), routes, labels, shard_tokens=9))
        for place in range(2):
            for table, slots in ((made.first, 1), (made.any, k)):
                expected = np.zeros((5, 5), dtype=int)
                for pair, many in steps_by_hand(routes, place, slots).items():
                    expected[pair] = many
                np.testing.assert_array_equal(table[place], expected)
            first = steps_by_hand(routes, place, 1)
            assert made.information.bits[place] == pytest.approx(bits_by_hand(first), abs=1e-9)
        assert made.information.ranks.shape == (k, 2)
        np.testing.assert_allclose(made.information.ranks[0], made.information.bits)

    def test_lift_chance_and_p(self, tmp_path: Path) -> None:
        routes, labels = planted(3, chance=0.5)
        made = pipeline(trace_of(tmp_path / "run", routes, labels, shard_tokens=300))
        for steps, slots in ((made.first_steps, 1), (made.any_steps, 2)):
            for row in range(0, len(steps.count), 5):
                place, i, j = (int(each[row]) for each in (steps.place, steps.source, steps.target))
                one, two = routes.expert_ids[place : place + 2, :, :slots]
                both = (one == i).any(axis=1) & (two == j).any(axis=1)
                assert steps.count[row] == both.sum()
                # A token leaves an expert once for each slot of the next layer.
                assert steps.chance[row] == pytest.approx(both.sum() / ((one == i).sum() * slots))
                even = (one == i).sum() * (two == j).sum() / len(routes)
                assert steps.lift[row] == pytest.approx(both.sum() / even)
                assert steps.low[row] <= steps.lift[row] <= steps.high[row]
                beyond = []
                a, b = (one == i).any(axis=1), (two == j).any(axis=1)
                for prompt in range(len(labels)):
                    own = routes.prompt == prompt
                    linear = a[own].sum() * b.mean() + a.mean() * b[own].sum()
                    beyond.append(both[own].sum() - linear + own.sum() * a.mean() * b.mean())
                expected = stats.ttest_1samp(beyond, 0, alternative="greater").pvalue
                assert steps.p[row] == pytest.approx(expected)
            # All 2 x 8 x 8 pairs of experts are tested; those that are not listed have p = 1.
            order = np.argsort(steps.p)
            ranked = steps.p[order] * 128 / np.arange(1, len(order) + 1)
            expected = np.minimum(1, np.minimum.accumulate(ranked[::-1])[::-1])
            np.testing.assert_allclose(steps.q[order], expected)
        assert made.first_steps.q[0] < 0.01

    def test_the_prompt_alone(self, tmp_path: Path) -> None:
        """Prompts that stay with one expert tell everything; shuffling them changes nothing."""
        routes = random_routes(1, k=1, lengths=(50,) * 16)
        of_prompt = (np.arange(16) % 4)[routes.prompt]
        kept = replace(
            routes,
            expert_ids=np.stack([of_prompt + each for each in range(3)])[..., None].astype(
                np.uint16
            ),
        )
        told = pipeline(trace_of(tmp_path / "kept", kept, shard_tokens=400)).information
        np.testing.assert_allclose(told.bits, 2.0, atol=0.02)
        np.testing.assert_allclose(told.prompt, told.bits)
        np.testing.assert_allclose(told.entropy, 2.0)
        by_token = np.random.default_rng(0).integers(0, 4, len(routes))
        own = replace(routes, expert_ids=np.stack([by_token] * 3)[..., None].astype(np.uint16))
        told = pipeline(trace_of(tmp_path / "own", own)).information
        np.testing.assert_allclose(told.bits, 2.0, atol=0.02)
        np.testing.assert_allclose(told.prompt, 0.0, atol=0.1)
        assert (told.low <= told.bits).all() and (told.bits <= told.high).all()


class TestChains:
    def test_the_planted_chain(self, found: Pipeline) -> None:
        chain = next(each for each in found.chains if each.label == "a")
        assert [set(layer) for layer in chain.experts] == [{expert} for expert in CHAIN]
        assert chain.claimed and not chain.why and chain.q < 0.01
        # A token that does not take it has an expert among its 2 of 8 by chance.
        step, whole = 0.8 + 0.2 / 4**2, 0.8 + 0.2 / 4**3
        assert chain.flow == pytest.approx(step, abs=0.05)
        assert chain.low < step < chain.high
        assert chain.whole == pytest.approx(whole, abs=0.05)
        assert chain.whole_independent == pytest.approx((0.8 + 0.2 / 4) ** 3, abs=0.05)
        assert chain.others == pytest.approx(1 / 4**2, abs=0.03)
        assert chain.lift == pytest.approx(3 * step / (step + 2 / 4**2), rel=0.1)
        assert chain.chosen_prompts == 6 and chain.prompts == 6 and chain.tokens == 240
        assert found.claimed[0] is chain
        assert [each.label for each in found.chains if not each.claimed] == ["b", "c"]
        assert all(each.why for each in found.chains if not each.claimed)
        assert "1 of 3 labels have a pipeline. The clearest is a" in found.findings()[0]

    def test_layers_that_are_independent(self, tmp_path: Path) -> None:
        """On the chain in each layer with a chance of its own: the whole is the product."""
        routes, labels = planted(chance=0.0, prompts=60)
        of_a = np.array([label == "a" for label in labels])[routes.prompt]
        random = np.random.default_rng(0)
        ids = routes.expert_ids % 4  # nobody else comes near the chain, 4 to 6
        for layer in range(3):
            ids[layer, of_a & (random.random(len(routes)) < 0.6), 0] = 4 + layer
        trace = trace_of(tmp_path / "run", replace(routes, expert_ids=ids), labels)
        chain = pipeline(trace).chains[0]
        assert chain.experts == ((4,), (5,), (6,))
        np.testing.assert_allclose(chain.on, 0.6, atol=0.06)
        np.testing.assert_allclose(chain.steps, 0.36, atol=0.06)
        assert chain.flow == pytest.approx(chain.steps.mean())
        assert chain.whole == pytest.approx(0.216, abs=0.05)
        assert chain.whole_independent == pytest.approx(np.prod(chain.on))
        assert chain.low < chain.flow < chain.high
        assert chain.whole_low < chain.whole < chain.whole_high < chain.flow
        assert chain.others == chain.whole_others == 0 and chain.lift == pytest.approx(3)
        assert chain.null == pytest.approx(chain.flow / 3)

    def test_the_halves_do_not_meet(self, tmp_path: Path) -> None:
        """A chain that only the choosing half takes has no flow on the measuring half."""
        routes, labels = planted(chance=1.0)
        assert pipeline(trace_of(tmp_path / "all", routes, labels)).chains[0].whole == 1.0
        # Each prompt of label a goes its own way: a chain of one half is no chain of the other.
        ids = routes.expert_ids.copy()
        for number, prompt in enumerate(
            place for place, label in enumerate(labels) if label == "a"
        ):
            own = np.array([[number % 8, (number * 3 + 1) % 8, (number * 5 + 2) % 8]]).T
            ids[:, routes.prompt == prompt, 0] = own
            ids[:, routes.prompt == prompt, 1] = (own + 1) % 8
        alone = pipeline(trace_of(tmp_path / "own", replace(routes, expert_ids=ids), labels))
        assert not alone.chains[0].claimed

    def test_random_routing_has_no_pipeline(self, tmp_path: Path) -> None:
        """Prompts with experts of their own, dealt to labels at random."""
        wrong = 0
        for seed in range(12):
            routes, labels = alike_in_a_prompt(seed)
            trace = trace_of(tmp_path / str(seed), routes, labels, shard_tokens=2000)
            wrong += bool(pipeline(trace, seed=seed).claimed)
        assert wrong <= 2  # 5 % of 12; three or more happen once in 50 times

    def test_too_few_prompts(self, tmp_path: Path) -> None:
        routes, labels = planted(prompts=18)
        chain = pipeline(trace_of(tmp_path / "run", routes, labels)).chains[0]
        assert not chain.claimed and "too few prompts to measure on: 3 of the label" in chain.why
        assert math.isnan(chain.p)

    def test_width(self, tmp_path: Path) -> None:
        """Two chains, half the tokens each: a width of two takes both."""
        routes, labels = planted(chance=1.0)
        ids = routes.expert_ids.copy()
        random = np.random.default_rng(0)
        half = random.random(len(routes)) < 0.5
        half &= np.array([label == "a" for label in labels])[routes.prompt]
        for layer, expert in enumerate((1, 6, 0)):
            ids[layer, half, 0] = expert
            ids[layer, half, 1] = (expert + random.integers(1, 8, half.sum())) % 8
        trace = trace_of(tmp_path / "run", replace(routes, expert_ids=ids), labels)
        one, two = (pipeline(trace, width=width).chains[0] for width in (1, 2))
        assert {len(layer) for layer in two.experts} == {2}
        both = [{5, 1}, {2, 6}, {7, 0}]
        assert [set(layer) for layer in two.experts] == both
        assert one.whole == pytest.approx(0.5, abs=0.1) and two.whole == 1.0
        with pytest.raises(UsageError, match="give 1 to 8"):
            pipeline(trace, width=9)

    @settings(max_examples=40, deadline=None)
    @given(seed=st.integers(0, 10_000), layers=st.integers(2, 4), width=st.integers(2, 4))
    def test_best_of_all_paths(self, seed: int, layers: int, width: int) -> None:
        random = np.random.default_rng(seed)
        steps = random.integers(0, 30, (3, layers - 1, width, width))
        steps[random.random(steps.shape) < 0.3] = 0
        tokens = random.integers(50, 200, 3)
        share = steps / tokens[:, None, None, None]
        mean = share.mean(axis=0)

        def value(label: int, path: tuple[int, ...]) -> float:
            total = 0.0
            for place, (i, j) in enumerate(itertools.pairwise(path)):
                each = share[label, place, i, j]
                total += each * math.log2(each / mean[place, i, j]) if each else -math.inf
            return total

        for label, chain in enumerate(best_chains(steps, tokens, 1)):
            best = max(
                value(label, path) for path in itertools.product(range(width), repeat=layers)
            )
            if chain:
                assert value(label, tuple(each for (each,) in chain)) == pytest.approx(best)
            else:
                assert best == -math.inf


class TestMatching:
    def test_experts_that_change_their_number(self, tmp_path: Path) -> None:
        """Each layer renames the experts of the one before; labels prefer some of them."""
        random = np.random.default_rng(0)
        routes = random_routes(0, width=6, k=1, lengths=(60,) * 30)
        labels = ["abcde"[place % 5] for place in range(30)]
        taste = random.dirichlet(np.full(6, 0.4), 5)
        label = (np.arange(30) % 5)[routes.prompt]
        first = (taste[label].cumsum(axis=1) > random.random((len(routes), 1))).argmax(axis=1)
        renamed = [np.arange(6), random.permutation(6), random.permutation(6)]
        ids = np.stack([names[first] for names in renamed])[..., None].astype(np.uint16)
        trace = trace_of(tmp_path / "run", replace(routes, expert_ids=ids), labels)
        match = pipeline(trace).matching
        assert match.by == "labels"
        for place in range(2):
            for expert in range(6):
                if match.match[place, renamed[place][expert]] >= 0:
                    assert match.match[place, renamed[place][expert]] == renamed[place + 1][expert]
        assert (match.score > 0.999).all() and (match.q < 0.05).all()
        np.testing.assert_allclose(match.corrected, (match.score - match.null) / (1 - match.null))
        np.testing.assert_allclose(match.flow, match.flow_best)
        assert (match.flow > 0.9).all() and (match.flow_random < 0.6).all()

    def test_similarity_by_hand(self, found: Pipeline, tmp_path: Path) -> None:
        routes, labels = planted()
        for place in range(2):
            profiles = []
            for layer in (place, place + 1):
                rate = np.zeros((3, 8))
                for number, name in enumerate("abc"):
                    own = np.array([label == name for label in labels])[routes.prompt]
                    rate[number] = np.bincount(routes.expert_ids[layer, own].ravel(), minlength=8)
                    rate[number] /= own.sum()
                profiles.append(rate / rate.sum(axis=0))
            alike = np.sqrt(profiles[0]).T @ np.sqrt(profiles[1])
            best = max(
                np.mean([alike[i, j] for i, j in enumerate(order)])
                for order in itertools.permutations(range(8))
            )
            assert found.matching.score[place] == pytest.approx(best)
            followed = sum(
                int(found.matching.match[place, one] == two)
                for one, two in routes.expert_ids[place : place + 2, :, 0].T.tolist()
            )
            assert found.matching.flow[place] == pytest.approx(followed / len(routes))

    def test_dealt_anew(self) -> None:
        """Preferences change places; what an expert takes and what there is of a label stay."""
        choices = np.random.default_rng(0).gamma(2.0, size=(16, 6))
        dealt = dealt_anew(choices, np.random.default_rng(1))
        np.testing.assert_allclose(dealt.sum(axis=1), choices.sum(axis=1))
        np.testing.assert_allclose(dealt.sum(axis=0), choices.sum(axis=0), rtol=0.02)
        assert np.abs(dealt - choices).max() > 1

    def test_by_token_ids_without_labels(self, tmp_path: Path) -> None:
        routes = random_routes(4, width=5, k=1, lengths=(80,) * 12)
        renamed = np.array([3, 0, 4, 1, 2])
        expert = np.where(
            np.random.default_rng(0).random(len(routes)) < 0.9, routes.token_ids % 5, 0
        )
        ids = np.stack([expert, renamed[expert], expert])[..., None].astype(np.uint16)
        made = pipeline(trace_of(tmp_path / "run", replace(routes, expert_ids=ids)))
        match = made.matching
        assert match.by == "token ids" and match.match[0].tolist() == renamed.tolist()
        np.testing.assert_allclose(match.score, 1.0)
        assert (match.low <= 1 + 1e-9).all() and (match.q < 0.05).all()
        assert made.chains == () and made.roles is None
        assert "the prompts have no labels" in made.findings()[0]
        assert "--data JSONL with a label" in made.findings()[0]

    def test_the_interval_by_tokens(self, tmp_path: Path) -> None:
        """The linear interval is about as wide as scores of other samples spread."""
        scores, widths = [], []
        for seed in range(12):
            routes = random_routes(seed, layers=(0, 1), width=3, k=1, lengths=(20,) * 40)
            random = np.random.default_rng(seed)
            taste = np.random.default_rng(99).dirichlet(np.ones(3), (2, 10))
            draw = random.random((2, len(routes), 1))
            ids = (taste[:, routes.token_ids].cumsum(axis=2) > draw).argmax(axis=2)[..., None]
            trace = trace_of(
                tmp_path / str(seed),
                replace(routes, expert_ids=ids.astype(np.uint16)),
                shard_tokens=2000,
            )
            match = pipeline(trace).matching
            scores.append(match.score[0])
            widths.append((match.high[0] - match.low[0]) / 4)
        assert 0.5 < np.mean(widths) / np.std(scores, ddof=1) < 2


class TestRoles:
    def test_own_experts_from_the_second_layer(self, tmp_path: Path) -> None:
        routes = random_routes(0, layers=(0, 3, 5), width=8, k=1, lengths=(50,) * 24)
        labels = ["abcd"[place % 4] for place in range(24)]
        label = (np.arange(24) % 4)[routes.prompt]
        ids = routes.expert_ids.copy()
        own = np.random.default_rng(0).random(len(routes)) < 0.7
        for layer in (1, 2):
            ids[layer, own, 0] = label[own] + 2
        made = pipeline(trace_of(tmp_path / "run", replace(routes, expert_ids=ids), labels))
        nodes, found = pipeline_graph(made).nodes, made.roles
        assert found is not None
        assert nodes["L3E4"]["group"] == "c" and nodes["L3E7"]["group"] is None
        assert found.own_from.tolist() == [3, 3, 3, 3]
        assert found.specialised.tolist() == [0, 4, 4]
        assert found.top[:, 1].tolist() == [2, 3, 4, 5] and found.claimed[:, 1].all()
        assert found.kept[1] == 1.0 and math.isnan(found.kept[0])
        for number in range(4):
            for layer in range(3):
                counts = np.bincount(ids[layer, label == number, 0], minlength=8)
                entropy = stats.entropy(counts, base=2)
                assert found.effective[number, layer] == pytest.approx(2**entropy)
        assert (found.low <= found.effective).all() and (found.effective <= found.high + 0.3).all()


class TestFlows:
    def test_against_counting(self, found: Pipeline) -> None:
        routes, labels = planted()
        flows = found.flows
        assert flows.groups == ("a", "b", "c", "") and flows.tokens.tolist() == [480, 480, 480, 0]
        for group, name in enumerate("abc"):
            own = np.array([label == name for label in labels])[routes.prompt]
            for place in range(2):
                for a, source in enumerate(flows.experts[place]):
                    for b, target in enumerate(flows.experts[place + 1]):
                        one, two = routes.expert_ids[place : place + 2, own, 0]
                        expected = ((one == source) & (two == target)).sum()
                        assert flows.counts[group, place, a, b] == expected

    def test_many_experts(self, tmp_path: Path) -> None:
        """The tables of the picture stay small; the others are one bar, and nothing is lost."""
        routes = random_routes(0, layers=tuple(range(15)), width=96, k=4, lengths=(30,) * 12)
        labels = ["ab"[place % 2] for place in range(12)]
        made = pipeline(trace_of(tmp_path / "run", routes, labels, shard_tokens=1000))
        assert made.flows.counts.shape == (3, 14, 25, 25) and (made.flows.others == 72).all()
        assert (made.flows.counts.sum(axis=(0, 2, 3)) == 360).all()
        for chain in made.chains:
            for experts, shown in zip(chain.experts, made.flows.experts, strict=True):
                assert experts[0] in shown
        figure = draw_pipeline(made)
        assert len(figure.axes) == 2  # continued in a second row
        # A row begins with the layer that the one above it ends with.
        ticks = [[int(each.get_text()) for each in axes.get_xticklabels()] for axes in figure.axes]
        assert ticks[0][-1] == ticks[1][0] and {*ticks[0], *ticks[1]} == set(range(15))
        content = json.loads(made.to_json())
        assert "left_out" not in content and len(content["first"]) == 14


class TestEdges:
    def test_one_moe_layer(self, tmp_path: Path) -> None:
        trace = trace_of(tmp_path / "run", random_routes(layers=(3,)))
        with pytest.raises(UsageError, match="one MoE layer"):
            pipeline(trace)

    @pytest.mark.parametrize(("k", "width"), [(1, 4), (4, 4), (3, 70)])
    def test_every_k(self, tmp_path: Path, k: int, width: int) -> None:
        routes = random_routes(1, k=k, width=width, lengths=(20,) * 12)
        made = pipeline(trace_of(tmp_path / "run", routes, ["a", "b"] * 6))
        assert (made.any.sum(axis=(1, 2)) == 240 * k * k).all()
        made._repr_html_()
        draw_pipeline(made)

    @pytest.mark.parametrize("labels", [["a"], [None]])
    def test_one_prompt(self, tmp_path: Path, labels: list[str | None]) -> None:
        made = pipeline(trace_of(tmp_path / "run", random_routes(lengths=(7,)), labels))
        assert not made.claimed and np.isnan(made.first_steps.p).all()
        assert np.isnan(made.information.low).all()
        assert len(made.notes) == 1
        made.tables()
        save_picture(draw_depth, made, tmp_path / "d.png")
        json.loads(made.to_json())

    def test_no_expert_at_all(self, tmp_path: Path) -> None:
        routes = random_routes(lengths=(7, 7))
        ids = np.full_like(routes.expert_ids, NO_EXPERT)
        made = pipeline(trace_of(tmp_path / "run", replace(routes, expert_ids=ids), ["a", "b"]))
        assert made.any.sum() == 0 and not made.claimed and len(made.first_steps.count) == 0
        draw_pipeline(made)

    def test_a_label_of_one_prompt_gets_no_chain(self, tmp_path: Path) -> None:
        routes, labels = planted()
        labels[-1] = "alone"
        made = pipeline(trace_of(tmp_path / "run", routes, labels))
        assert [each.label for each in made.chains] == ["a", "b", "c"]
        assert "1 of 4 labels get no chain" in made.notes[0]

    def test_same_seed_same_result(self, tmp_path: Path) -> None:
        routes, labels = planted(prompts=12, length=10)
        trace = trace_of(tmp_path / "run", routes, labels)
        assert pipeline(trace).to_json() == pipeline(trace).to_json()

    def test_progress(self, tmp_path: Path) -> None:
        seen: list[tuple[int, int | None]] = []
        trace = trace_of(tmp_path / "run", random_routes(lengths=(30, 30)))
        pipeline(trace, progress=lambda done, total: seen.append((done, total)))
        assert seen[0] == (0, 120) and seen[-1] == (120, 120)
        assert [done for done, _ in seen] == sorted(done for done, _ in seen)


class TestGraph:
    def test_steps_and_pipelines(self, found: Pipeline, tmp_path: Path) -> None:
        graph = pipeline_graph(found)
        step = graph.edges[f"L1E{CHAIN[0]}", f"L2E{CHAIN[1]}"]
        count = found.first[0, CHAIN[0], CHAIN[1]]
        assert step["count"] == count and step["weight"] == pytest.approx(count / 1440)
        assert step["pipelines"] == "a" and step["lift"] > 1.5
        node = graph.nodes[f"L4E{CHAIN[2]}"]
        assert (node["layer"], node["expert"], node["pipelines"]) == (4, CHAIN[2], "a")
        assert node["share"] == found.first_loads[2, 7] / 1440
        by_layer = [node["share"] for _, node in graph.nodes(data=True) if node["layer"] == 2]
        assert sum(by_layer) == pytest.approx(1)
        assert len(pipeline_graph(found, 1).edges) < len(graph.edges)


class TestPictures:
    @pytest.mark.parametrize(
        ("style", "ending"), [("light", ".png"), ("dark", ".svg"), ("light", ".pdf")]
    )
    def test_the_same_result_gives_the_same_file(
        self, found: Pipeline, tmp_path: Path, style: str, ending: str
    ) -> None:
        draws = [draw_pipeline, *([draw_depth] if ending == ".png" else [])]
        for number, draw in enumerate(draws):
            paths = [tmp_path / f"{number}{turn}{ending}" for turn in "ab"]
            one, two = (
                save_picture(draw, found, path, style=style, subtitle="$m$") for path in paths
            )
            assert one.read_bytes() == two.read_bytes()

    def test_one_label_and_some_layers(self, found: Pipeline) -> None:
        figure = draw_pipeline(found, label="a", layers=range(1, 3))
        (axes,) = figure.axes
        assert "480 tokens" in figure.get_suptitle() and "a only" in figure.get_suptitle()
        assert [each.get_text() for each in axes.get_xticklabels()] == ["layer 1", "layer 2"]
        heavy = {each.get_text() for each in axes.texts if each.get_fontweight() == "bold"}
        assert heavy == {str(expert) for expert in CHAIN[:2]}
        with pytest.raises(UsageError, match="the labels are a, b, c"):
            draw_pipeline(found, label="x")
        with pytest.raises(UsageError, match="successive MoE layers"):
            draw_pipeline(found, layers=[1, 4])

    def test_bars_are_as_high_as_their_share(self, found: Pipeline) -> None:
        (axes,) = draw_pipeline(found).axes
        bars = [each for each in axes.patches if hasattr(each, "get_height")]
        column = [each.get_height() for each in bars if round(each.get_x() + 0.2) == 1]
        shares = np.sort(found.first_loads[1] / 1440)
        np.testing.assert_allclose(np.sort(column) / sum(column), shares)

    def test_html(self, found: Pipeline) -> None:
        html = found._repr_html_()
        assert "Chains of labels" in html and "<table" in html and "Bhattacharyya" in html


def test_command(demo_run: Trace, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, picture, graph = str(demo_run.path), tmp_path / "p.png", tmp_path / "g.json"
    options = ["--output", str(picture), "--label", "math", "--graph", str(graph)]
    assert cli.main(["pipeline", run, "--json", *options]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["kind"] == "pipeline" and shown["model"] == "demo" and picture.stat().st_size
    assert shown["graphs"] == [str(graph)] and json.loads(graph.read_text())["nodes"]
    assert {each["label"] for each in shown["chains"]} == set(demo_run.label_names)
    # The demo's domains are told apart, and each has experts of its own.
    assert all(each["claimed"] and each["lift_low"] > 2 for each in shown["chains"])
    assert cli.main(["pipeline", run, "--width", "2", "--view", "depth", "-o", str(picture)]) == 0
    assert "Chains of labels" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--layers", "3"], "FIRST-LAST"),
        (["--layers", "2-1"], "FIRST-LAST"),
        (["--view", "depth", "--label", "math"], "leave out --view depth"),
        (["--label", "math"], "add --output FILE"),
        (["--graph", "g.txt"], "name the file g.html"),
        (["--width", "99"], "give 1 to 16"),
        (["--output", "x.png", "--label", "nothing"], "there is no label 'nothing'"),
    ],
)
def test_bad_wishes(
    demo_run: Trace, options: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["pipeline", str(demo_run.path), *options]) == 2
    assert said in capsys.readouterr().err
