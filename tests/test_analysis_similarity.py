"""Similarity of experts: each measure against plain numpy, known copies, chance, agreement."""

from __future__ import annotations

import json
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.utils import load_model, save_model
from safetensors.numpy import load_file
from scipy.spatial.distance import jensenshannon
from scipy.stats import spearmanr

from family_cases import open_case
from moe_lens import cli
from moe_lens.analysis.similarity.agreement import agree
from moe_lens.analysis.similarity.compared import Material, compare
from moe_lens.analysis.similarity.measures import Measure
from moe_lens.analysis.similarity.outputs import compare_means, linear_cka, token_cosines
from moe_lens.analysis.similarity.routing import compare_routing
from moe_lens.analysis.similarity.similarity import ExpertSimilarity
from moe_lens.analysis.similarity.spectrum import random_ranks, ranks
from moe_lens.analysis.similarity.weights import read_weights
from moe_lens.errors import UsageError
from moe_lens.experts.answers import all_outputs
from moe_lens.experts.layer_sample import sample_layers
from moe_lens.experts.matrices import expert_modules
from moe_lens.experts.mean_outputs import MeanOutputs
from moe_lens.families import find_moe_layers
from moe_lens.figures.picture_file import save_picture
from moe_lens.figures.similarity import draw_similarity, expert_order
from moe_lens.router import ExpertRouter
from moe_lens.trace import Trace
from route_cases import random_routes
from tiny_models import CONFIGS, save_checkpoint
from trace_cases import trace_of
from twins import save_twins, write_words

DEMO = Path(__file__).resolve().parent.parent / "moe_lens" / "demo" / "model"


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    a, b = a.ravel().astype(np.float64), b.ravel().astype(np.float64)
    return float(a @ b / np.sqrt((a @ a) * (b @ b)))


def changed(folder: Path, change: Any, name: str = "qwen3_moe/nonorm", experts: int = 8) -> Path:
    """A checkpoint whose expert tensors went through ``change(key, value)``."""
    save_checkpoint(name, folder, experts=experts)
    model, _ = load_model(folder)
    parameters = dict(tree_flatten(model.parameters()))
    for layer in find_moe_layers(model):
        for key in layer.expert_parameters():
            parameters[key] = change(key, parameters[key])
    model.update(tree_unflatten(list(parameters.items())))
    mx.eval(model.parameters())
    save_model(folder, model, donate_model=True)
    return folder


def by_name(measures: Any) -> dict[str, Measure]:
    return {each.name: each for each in measures}


@pytest.fixture(scope="module")
def twins(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_twins(tmp_path_factory.mktemp("twins") / "twins")


@pytest.mark.parametrize(
    ("name", "mode"),
    [("qwen3_moe", "float32"), ("gpt_oss", "4bit"), ("nemotron_h", "float32"), ("dbrx", "4bit")],
)
def test_weights_as_they_lie(name: str, mode: str) -> None:
    """Three matrices, quantised with biases, two matrices without a gate, a list of experts."""
    with open_case(name, mode) as case:
        layer = case.layers[0]
        found = by_name(read_weights(case.layers, align=0).measures)
        flat: dict[str, list[np.ndarray]] = {}
        for expert in range(layer.num_experts):
            for part, matrix in expert_modules(layer, expert).items():
                flat.setdefault(part, []).append(np.array(matrix.rows()))
        for part, matrices in flat.items():
            seen = found[f"weights {part}"].values[0]
            assert seen[0, 1] == pytest.approx(cosine(matrices[0], matrices[1]), abs=1e-5)
            assert np.isnan(np.diag(seen)).all() and np.isnan(found["aligned"].values[0]).all()
        everything = [np.concatenate([m[e].ravel() for m in flat.values()]) for e in (0, 1)]
        assert found["weights"].values[0][0, 1] == pytest.approx(cosine(*everything), abs=1e-5)


def test_channels_in_another_order_are_found(tmp_path: Path) -> None:
    """Expert 4 + e is expert e with its channels permuted: unrelated as they lie, else the same."""
    order = np.random.default_rng(0).permutation(64)

    def change(key: str, value: mx.array) -> mx.array:
        half = value[:4]
        moved = half[..., mx.array(order)] if "down_proj" in key else half[:, mx.array(order)]
        return mx.concatenate([half, moved])

    router = ExpertRouter.from_pretrained(changed(tmp_path / "m", change))
    found = compare(Material(router.layers), align=6)
    lying, aligned = found.measure("weights"), found.measure("aligned")
    assert found.origins is not None and set(found.origins.words) == {"reordered"}
    for place in range(len(router.layers)):
        assert aligned.mutual(place)[:4] == [(0, 4), (1, 5), (2, 6), (3, 7)]
        assert all(abs(lying.values[place][e, e + 4]) < 0.2 for e in range(4))
        assert all(aligned.values[place][e, e + 4] > 0.9999 for e in range(4))
    assert found.aligned_pairs is not None and set(found.aligned_pairs) == {6}
    assert any("copies with channels in another order" in each for each in found.findings())


def test_chance_of_unrelated_weights(tmp_path: Path) -> None:
    """Random experts: as they lie N(0, 1 / n); aligned above 0, and as far as a scrambled one."""
    reading = read_weights(
        ExpertRouter.from_pretrained(save_checkpoint("qwen3_moe", tmp_path / "m")).layers
    )
    found = by_name(reading.measures)
    pairs = np.concatenate([t[np.triu_indices(len(t), 1)] for t in found["weights"].values])
    size = sum(rows * columns for rows, columns in reading.spectra.shapes)
    assert reading.chance.spread == pytest.approx(1 / np.sqrt(size))
    assert pairs.std() == pytest.approx(reading.chance.spread, rel=0.3)
    aligned = np.concatenate([t[np.triu_indices(len(t), 1)] for t in found["aligned"].values])
    assert aligned.min() > 3 * reading.chance.spread
    assert reading.chance.aligned.mean() == pytest.approx(aligned.mean(), rel=0.15)
    assert reading.chance.lying.std() < 3 * reading.chance.spread


def test_upcycled_experts_differ_by_few_directions(tmp_path: Path) -> None:
    """One network in all experts, and a difference of rank 1 in each: copies."""
    draw = np.random.default_rng(1)

    def change(key: str, value: mx.array) -> mx.array:
        experts, rows, columns = value.shape
        one = draw.normal(size=(experts, rows, 1)) @ draw.normal(size=(experts, 1, columns))
        return value[:1] + mx.array((0.005 * one).astype(np.float32))

    found = compare(Material(ExpertRouter.from_pretrained(changed(tmp_path / "m", change)).layers))
    assert found.origins is not None and set(found.origins.words) == {"copies"}
    assert found.spectra is not None
    for difference, full in zip(found.spectra.difference, found.spectra.effective, strict=True):
        assert difference.max() < 2.01 < 10 < full.min()
    assert all((apart < 0.3).all() for apart in found.spectra.apart)
    assert "upcycled" in found.findings()[0]


def test_experts_of_a_random_model_look_apart(tmp_path: Path) -> None:
    router = ExpertRouter.from_pretrained(save_checkpoint("qwen3_moe", tmp_path / "m"))
    found = compare(Material(router.layers))
    assert found.origins is not None and set(found.origins.words) == {"apart"}


@given(st.integers(1, 12), st.integers(1, 12), st.integers(0, 99))
@settings(max_examples=30, deadline=None)
def test_ranks(rows: int, columns: int, seed: int) -> None:
    weight = np.random.default_rng(seed).normal(size=(rows, columns)).astype(np.float32)
    squares = np.linalg.svd(weight.astype(np.float64), compute_uv=False) ** 2
    share = squares / squares.sum()
    found = ranks(mx.array(weight))
    assert found.stable == pytest.approx(squares.sum() / squares[0], rel=1e-3)
    assert found.effective == pytest.approx(np.exp(-(share * np.log(share)).sum()), rel=1e-3)
    assert 1 - 1e-4 <= found.stable <= found.effective * 1.0001 <= min(rows, columns) * 1.001


def test_rank_of_a_gaussian_matrix() -> None:
    assert random_ranks(64, 64).effective < 64 * 0.65 < 64 * 0.9 < random_ranks(64, 4096).effective
    assert ranks(mx.zeros((3, 4))).effective == 0


def hsic(k: np.ndarray, m: np.ndarray) -> float:
    """Unbiased HSIC as Song et al. (2012), equation 5, write it."""
    n, k, m = len(k), k - np.diag(np.diag(k)), m - np.diag(np.diag(m))
    ones = np.ones(n)
    middle = (ones @ k @ ones) * (ones @ m @ ones) / ((n - 1) * (n - 2))
    return float((np.trace(k @ m) + middle - 2 / (n - 2) * ones @ k @ m @ ones) / (n * (n - 3)))


def test_outputs_on_the_same_tokens() -> None:
    draw = np.random.default_rng(2)
    outputs = draw.normal(size=(9, 3, 5)).astype(np.float32)
    turn = np.linalg.qr(draw.normal(size=(5, 5)))[0]
    outputs[:, 2] = 3 * outputs[:, 0] @ turn  # the same but for a rotation
    outputs[4, 1] = 0  # says nothing of one token
    seen = mx.array(outputs)
    expected = sum(cosine(a, b) for a, b in zip(outputs[:, 0], outputs[:, 2], strict=True)) / 9
    assert token_cosines(seen)[0, 2] == pytest.approx(expected, abs=1e-6)
    cka = linear_cka(seen)
    grams = [outputs[:, e].astype(np.float64) @ outputs[:, e].T for e in range(3)]
    for one in range(3):
        for two in range(3):
            scale = np.sqrt(hsic(grams[one], grams[one]) * hsic(grams[two], grams[two]))
            assert cka[one, two] == pytest.approx(hsic(grams[one], grams[two]) / scale, abs=1e-5)
    assert cka[0, 2] == pytest.approx(1, abs=1e-5)
    assert np.isnan(linear_cka(seen[:3])).all()


def test_cka_of_unrelated_outputs_is_not_biased_upwards() -> None:
    """With 40 tokens of 64 numbers the plain estimate would be about 0.6."""
    outputs = np.random.default_rng(3).normal(size=(40, 12, 64)).astype(np.float32)
    values = linear_cka(mx.array(outputs))[np.triu_indices(12, 1)]
    assert abs(values.mean()) < 0.02


def test_mean_outputs_over_routed_tokens(twins: Path) -> None:
    router = ExpertRouter.from_pretrained(twins)
    tokens = [row.tolist() for row in np.random.default_rng(0).integers(1, 126, (3, 20))]
    means = MeanOutputs(router.layers)
    with router.recording(means):
        router.forward(tokens[:2])
        router.forward(tokens[2:])
    samples = sample_layers(router, tokens)
    for sample in samples:
        layer = sample.layer
        ids = np.argsort(-np.array(sample.logits), axis=1)[:, : layer.k]
        outputs = np.array(all_outputs(sample))
        counts = np.bincount(ids.ravel(), minlength=16)
        np.testing.assert_array_equal(means.counts[layer.index], counts)
        for expert in np.flatnonzero(counts):
            expected = outputs[(ids == expert).any(axis=1), expert].mean(axis=0)
            np.testing.assert_allclose(
                means.means(layer.index)[expert], expected, rtol=1e-3, atol=1e-6
            )
        assert np.isnan(means.means(layer.index)[counts == 0]).all()


def test_cosines_of_means() -> None:
    means = np.random.default_rng(4).normal(size=(4, 6))
    means[2] = np.nan
    plain, centred = compare_means([means])
    known = means[[0, 1, 3]]
    assert plain.values[0][0, 3] == pytest.approx(cosine(means[0], means[3]), abs=1e-6)
    middle = known.mean(axis=0)
    expected = cosine(means[0] - middle, means[3] - middle)
    assert centred.values[0][0, 3] == pytest.approx(expected, abs=1e-6)
    assert np.isnan(plain.values[0][2]).all()


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 99), uneven=st.booleans(), k=st.sampled_from([1, 2, 6]))
def test_routing(tmp_path_factory: pytest.TempPathFactory, seed: int, uneven: bool, k: int) -> None:
    routes = random_routes(seed, lengths=(7, 0, 9, 4), width=6, k=k, uneven=uneven and k > 1)
    labels = ["a", "b", "c", "a"]
    trace = trace_of(tmp_path_factory.mktemp("run"), routes, labels, shard_tokens=8)
    found = by_name(compare_routing(trace, [6] * 3))
    for place in range(3):
        chosen = np.array([[e in row for e in range(6)] for row in routes.expert_ids[place]])
        for one, two in ((0, 1), (2, 5)):
            a, b = chosen[:, one], chosen[:, two]
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                phi = np.corrcoef(a, b)[0, 1]
            seen = found["chosen together"].values[place][one, two]
            assert np.isnan(phi) == np.isnan(seen)
            assert np.isnan(phi) or seen == pytest.approx(phi, abs=1e-5)
            if not (a.any() and b.any()):
                assert np.isnan(found["same tokens"].values[place][one, two])
                continue
            p, q = (np.bincount(routes.token_ids[c], minlength=10) / c.sum() for c in (a, b))
            shared = np.minimum(p, q).sum() / np.maximum(p, q).sum()
            assert found["same tokens"].values[place][one, two] == pytest.approx(shared, abs=1e-5)
            kinds = np.array([labels[prompt] for prompt in routes.prompt])
            p, q = ([(kinds[c] == name).mean() for name in "abc"] for c in (a, b))
            alike = 1 - jensenshannon(p, q, base=2) ** 2
            assert found["same labels"].values[place][one, two] == pytest.approx(alike, abs=1e-5)


def table(seed: int, experts: int) -> np.ndarray:
    values = np.random.default_rng(seed).normal(size=(experts, experts))
    return values + values.T


def test_agreement() -> None:
    """Spearman of scipy; a copy agrees beyond chance, an unrelated table does not."""
    one, two = table(0, 12), table(1, 12)
    dead = table(2, 12)
    dead[3], dead[:, 3] = np.nan, np.nan
    some = np.full((12, 12), np.nan)
    some[0, 1] = some[1, 0] = 1.0
    measures = [
        Measure.of(name, "weights", "", [values])
        for name, values in (("a", one), ("b", one**3), ("c", two), ("d", dead), ("e", some))
    ]
    found = agree(measures)
    alive = [e for e in range(12) if e != 3]
    upper = np.triu_indices(11, 1)
    parts = [values[np.ix_(alive, alive)][upper] for values in (one, two, dead)]
    assert found.rho[0, 0, 2] == pytest.approx(spearmanr(parts[0], parts[1])[0])
    assert found.rho[0, 3, 2] == pytest.approx(spearmanr(parts[2], parts[1])[0])
    assert found.rho[0, 0, 1] == pytest.approx(1) and found.q[0, 0, 1] <= 0.05
    assert found.q[0, 0, 2] > 0.05 and np.isnan(found.rho[0, 4]).all()


def test_mantel_is_honest_about_shared_experts() -> None:
    """Tables made of one number for each expert: unrelated ones pass at about their level."""
    draw, passed = np.random.default_rng(5), 0
    for seed in range(60):
        tables = [np.add.outer(x, x) for x in draw.normal(size=(2, 10))]
        measures = [Measure.of(str(n), "weights", "", [t]) for n, t in enumerate(tables)]
        passed += agree(measures, seed=seed, permutations=99).q[0, 0, 1] <= 0.05
    assert passed <= 9  # binomial: 10 or more of 60 at 5 % has probability 0.0013


def test_means_and_nearest() -> None:
    values = table(6, 9)
    measure = Measure.of("a", "weights", "", [values])
    found = measure.means()
    assert found.mean[0] == pytest.approx(values[np.triu_indices(9, 1)].mean(), abs=1e-6)
    without = [np.delete(np.delete(values, e, 0), e, 1) for e in range(9)]
    means = np.array([each[np.triu_indices(8, 1)].mean() for each in without])
    error = np.sqrt(8 / 9 * ((means - means.mean()) ** 2).sum())
    assert found.high[0] - found.mean[0] == pytest.approx(1.96 * error, rel=1e-4)
    nearest, _ = measure.nearest(0)
    np.fill_diagonal(values, -np.inf)
    np.testing.assert_array_equal(nearest, values.argmax(axis=1))
    assert all(nearest[b] == a and nearest[a] == b for a, b in measure.mutual(0))
    none = Measure.of("b", "weights", "", [np.full((3, 3), np.nan)])
    assert none.nearest(0)[0].tolist() == [-1] * 3 and np.isnan(none.means().mean[0])


@pytest.fixture(scope="module")
def demo_found(demo_run: Trace) -> ExpertSimilarity:
    router = ExpertRouter.from_pretrained("demo", cpu_experts="auto")
    means = MeanOutputs(router.layers)
    tokens = [demo_run.prompt(index).token_ids.tolist() for index in range(0, 192, 24)]
    with router.recording(means):
        for each in tokens:
            router.forward([each])
    sample = partial(sample_layers, router, tokens)
    return compare(Material(router.layers, demo_run, sample, means), spectra=2)


def test_every_measure_finds_the_copies_of_demo(demo_found: ExpertSimilarity) -> None:
    """Each expert of demo has one near copy; see `moe_lens.demo.upcycle`."""
    pairs = json.loads((DEMO / "upcycling.json").read_text())["pairs"]
    heads = ("weights", "aligned", "outputs", "CKA", "chosen together", "router rows")
    for name in heads:
        measure = demo_found.measure(name)
        for place, layer in enumerate(demo_found.layers):
            assert sorted(measure.mutual(place)) == sorted(map(tuple, pairs[str(layer)])), name
    assert demo_found.origins is not None and set(demo_found.origins.words) == {"groups"}
    assert demo_found.spectra is not None
    random = demo_found.spectra.random[0].effective
    for difference in demo_found.spectra.difference:
        np.testing.assert_allclose(difference[:, 0], random, rtol=0.03)  # noise was added


def test_result(demo_found: ExpertSimilarity, tmp_path: Path) -> None:
    content = json.loads(demo_found.to_json())
    shown = content["measures"][0]
    np.testing.assert_allclose(
        np.array(shown["values"], float), demo_found.measures[0].values, atol=1e-5
    )
    assert shown["nearest"][0][4] == 6 and [4, 6] in shown["mutual"][0]
    assert len(demo_found.definition) < 4 * 130
    written = load_file(demo_found.save(tmp_path / "m.safetensors"))
    np.testing.assert_array_equal(written["CKA/2"], demo_found.measure("CKA").values[1])
    with pytest.raises(UsageError, match="no measure 'x'"):
        demo_found.measure("x")
    assert "<table" in demo_found._repr_html_()


def test_a_streamed_and_a_loaded_model_say_the_same(twins: Path) -> None:
    found = [
        compare(Material(ExpertRouter.from_pretrained(twins, stream=stream).layers), align=3)
        for stream in (False, True)
    ]
    assert found[0].to_json() == found[1].to_json()


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["float32", "4bit"])
@pytest.mark.parametrize("name", CONFIGS)
def test_every_model_type(name: str, mode: str) -> None:
    with open_case(name, mode) as case:
        router = case.router
        tokens = [row.tolist() for row in np.random.default_rng(0).integers(1, 126, (2, 9))]
        means = MeanOutputs(router.layers)
        with router.recording(means):
            router.forward(tokens)
        sample = partial(sample_layers, router, tokens)
        found = compare(Material(router.layers, None, sample, means), align=3, spectra=1)
        assert found.notes == () and found.findings() and found.tables()
        for name_ in ("weights", "outputs", "CKA", "router rows"):
            assert all(found.measure(name_).complete(place) for place in range(len(found.layers)))


def test_order_of_experts() -> None:
    groups = np.array([0, 1, 0, 1, 0, 1])
    order = expert_order((groups[:, None] == groups).astype(float))
    assert sorted(order.tolist()) == list(range(6))
    assert (np.diff(groups[order]) != 0).sum() == 1
    assert expert_order(np.full((2, 2), np.nan)).tolist() == [0, 1]


@pytest.mark.parametrize("style", ["light", "dark"])
def test_pictures(demo_found: ExpertSimilarity, tmp_path: Path, style: str) -> None:
    paths = [tmp_path / "1.svg", tmp_path / "2.svg"]
    one, two = (
        save_picture(draw_similarity, demo_found, path, style=style, subtitle="m") for path in paths
    )
    assert one.read_bytes() == two.read_bytes()
    figure = draw_similarity(demo_found, measure="CKA", layers=[3], style=style)
    assert "CKA" in figure.get_suptitle()
    with pytest.raises(UsageError, match="layer 0 has no routed"):
        draw_similarity(demo_found, layers=[0])


def test_command(
    demo_run: Trace, twins: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["similarity", str(demo_run.path), "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["kind"] == "similarity" and shown["model"] == "demo" and shown["spectra"] is None
    words = write_words(tmp_path / "words.jsonl", 4, 1)
    picture, matrices = tmp_path / "p.png", tmp_path / "m.safetensors"
    asked = [str(twins), "--data", str(words), "--align", "5", "-o", str(picture)]
    asked += ["--measure", "CKA", "--matrices", str(matrices)]
    assert cli.main(["similarity", *asked]) == 0
    out = capsys.readouterr().out
    assert "groups of near copies" in out and "5 of 120" in out
    assert picture.stat().st_size and matrices.stat().st_size
    assert cli.main(["similarity", str(twins), "--kinds", "weights", "--json"]) == 0
    names = [each["name"] for each in json.loads(capsys.readouterr().out)["measures"]]
    assert "weights" in names and "outputs" not in names
    assert cli.main(["similarity", str(twins), "--kinds", "weights", "--sample-size", "3"]) == 2
    assert "leave out --sample-size" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--kinds", "taste"], "no kind 'taste'"),
        (["--kinds", "weights"], "holds no weights"),
        (["--align", "3"], "--align is about weights"),
        (["--align", "some"], "not 'some'"),
        (["--data", "demo"], "leave out --data"),
        (["-o", "x.png", "--measure", "taste"], "no measure 'taste'"),
        (["-o", "x.gif"], "not '.gif'"),
        (["--measure", "CKA"], "name its file with --output"),
    ],
)
def test_what_a_run_refuses(
    demo_run: Trace, options: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["similarity", str(demo_run.path), *options]) == 2
    assert said in capsys.readouterr().err
