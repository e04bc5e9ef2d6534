"""What experts push: the sums of their effects, what is made of them, and whether it is true."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from moe_lens import cli
from moe_lens.analysis.vocabulary import (
    Vocabulary,
    count_ids,
    expert_card,
    routed_vocabulary,
    token_card,
    written_vocabulary,
)
from moe_lens.corpus import Corpus, Prompt
from moe_lens.corpus.batches import pad
from moe_lens.errors import UsageError
from moe_lens.experts.directions import write_directions
from moe_lens.families.class_swap import ClassSwaps, call_original
from moe_lens.figures.picture_file import save_picture
from moe_lens.figures.vocabulary import draw_vocabulary
from moe_lens.recording import ExpertEffects, record_effects, record_predictions
from moe_lens.router import ExpertRouter
from moe_lens.trace import TokenTexts, Trace
from moe_lens.unembedding import ExpertReading, Unembedding
from route_cases import random_routes
from tiny_models import save_checkpoint
from trace_cases import trace_of

VOCABULARY, HIDDEN, EXPERTS = 40, 6, 4
TEXTS = TokenTexts({i: f"t{i}".encode() for i in range(VOCABULARY - 3)})
HEAD = np.random.default_rng(0).normal(size=(HIDDEN, VOCABULARY))


class Linear:
    """A reading whose numbers can be computed by hand."""

    def effects(self, vectors: np.ndarray) -> np.ndarray:
        return (vectors @ HEAD).astype(np.float32)

    def alone(self, vectors: np.ndarray, place: int | None = None) -> np.ndarray:
        lengths = np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-9)
        return (vectors / lengths @ HEAD).astype(np.float32)


def made_effects(seed: int = 0) -> ExpertEffects:
    """Two layers; expert 3 of the second one received too few tokens."""
    random = np.random.default_rng(seed)
    counts = np.full((2, 2, EXPERTS), 100)
    counts[:, 1, 3] = 7
    sums = random.normal(size=(1, 2, EXPERTS, HIDDEN)) + 0.1 * random.normal(
        size=(2, 2, EXPERTS, HIDDEN)
    )
    return ExpertEffects((1, 5), counts, 100 * sums, 50 * sums)


def corpus_of(*texts: str, labels: tuple[str | None, ...] = ()) -> Corpus:
    given = labels or (None,) * len(texts)
    return Corpus(
        "made",
        tuple(Prompt(text=text, label=label) for text, label in zip(texts, given, strict=True)),
    )


WORDS = tuple(
    " ".join(f"w{i}" for i in np.random.default_rng(seed).integers(1, 120, 20)) for seed in range(9)
)


class TestNumbers:
    def test_against_numpy(self) -> None:
        effects = made_effects()
        found = written_vocabulary(effects, Linear(), TEXTS, top=5, asked=[8])
        for place in range(2):
            known = [e for e in range(EXPERTS) if effects.counts[:, place, e].sum() >= 50]
            z = {}
            for e in known:
                mean = effects.sums[:, place, e].sum(0) / effects.counts[:, place, e].sum()
                logits = (mean @ HEAD)[: VOCABULARY - 3]
                z[e] = (logits - logits.mean()) / logits.std()
                assert found.size[place, e] == pytest.approx(logits.std(), rel=1e-5)
            for e in known:
                others = np.mean([z[o] for o in known if o != e], axis=0)
                specific = 1 - np.corrcoef(z[e], others)[0, 1]
                assert found.specificity[place, e] == pytest.approx(specific, abs=1e-5)
                assert found.sharpness[place, e] == pytest.approx(np.sort(z[e])[-10:].mean(), 1e-4)
                assert found.pushed.up[place, e].tolist() == np.argsort(-z[e])[:5].tolist()
                assert found.pushed.down[place, e].tolist() == np.argsort(z[e])[:5].tolist()
                up = [i for i in np.argsort(others - z[e]) if z[e][i] > 1][:5]
                assert [i for i in found.beyond.up[place, e] if i >= 0] == up
                assert found.asked_z[place, e, 0] == pytest.approx(z[e][8], rel=1e-4)
                assert found.asked_beyond[place, e, 0] == pytest.approx(
                    z[e][8] - others[8], rel=1e-3, abs=1e-5
                )
                halves = [effects.sums[h, place, e] @ HEAD[:, : VOCABULARY - 3] for h in range(2)]
                noise = 1 - np.corrcoef(*halves)[0, 1]
                assert found.noise[place, e] == pytest.approx(noise, abs=1e-5)
        assert np.isnan(found.specificity[1, 3]) and (found.pushed.up[1, 3] == -1).all()
        json.loads(found.to_json())

    def test_read_alone(self) -> None:
        effects = made_effects()
        found = written_vocabulary(effects, Linear(), TEXTS, read="alone")
        np.testing.assert_allclose(found.size[0, 0], np.std(
            (lambda v: v / np.linalg.norm(v))(effects.writes[:, 0, 0].sum(0)) @ HEAD[:, :37]
        ), rtol=1e-5)  # fmt: skip
        with pytest.raises(UsageError, match="effect or alone"):
            written_vocabulary(effects, Linear(), TEXTS, read="both")

    def test_noise_is_not_specific(self) -> None:
        """Effects that differ between the halves as between experts: nothing is established."""
        random = np.random.default_rng(3)
        sums = random.normal(size=(2, 2, EXPERTS, HIDDEN))
        effects = ExpertEffects((1, 5), np.full((2, 2, EXPERTS), 100), sums, sums)
        noise = written_vocabulary(effects, Linear(), TEXTS)
        real = written_vocabulary(made_effects(), Linear(), TEXTS)
        assert real.established.sum() >= 6 > noise.established.sum() + 1
        assert "left out of the table" in " ".join(noise.findings())

    def test_random_directions_are_the_measure(self) -> None:
        """Experts that give random directions are sharper than 97.5 % of them now and then."""
        random = np.random.default_rng(5)
        sums = np.repeat(random.normal(size=(1, 4, 64, HIDDEN)), 2, axis=0)
        effects = ExpertEffects((0, 1, 2, 3), np.full((2, 4, 64), 99), sums, sums)
        found = written_vocabulary(effects, Linear(), TEXTS)
        assert 0 <= (found.sharpness > found.random_sharpness).mean() < 0.12

    def test_cards(self) -> None:
        written = written_vocabulary(made_effects(), Linear(), TEXTS, asked=[8, 2])
        card = expert_card(5, 1, None, written)
        lists = dict(card.rows)
        assert lists["pushes up, z"][0][0] == f"t{written.pushed.up[1, 1, 0]}"
        assert card.numbers["tokens"] == 200
        token = token_card(2, TEXTS, None, written)
        assert token.z is not None
        np.testing.assert_array_equal(token.z, written.asked_z[:, :, 1])
        assert "standard deviations" in token.findings()[0]
        with pytest.raises(UsageError, match="not kept"):
            token_card(3, TEXTS, None, written)

    def test_no_text_no_claim(self) -> None:
        zero = np.zeros((2, 1, EXPERTS, HIDDEN))
        none = ExpertEffects((1,), np.zeros((2, 1, EXPERTS), dtype=np.int64), zero, zero)
        found = written_vocabulary(none, Linear(), TEXTS)
        assert "No expert received 50 tokens" in found.findings()[0]
        assert found.tables()[0].rows == ()

    @pytest.mark.parametrize("style", ["light", "dark"])
    def test_pictures(self, tmp_path: Path, style: str) -> None:
        written = written_vocabulary(made_effects(), Linear(), TEXTS)
        trace = trace_of(tmp_path / "run", random_routes(lengths=(90,), layers=(1, 5), width=4))
        routed = routed_vocabulary(count_ids(trace))
        for number, sides in enumerate([(routed, written), (None, written)]):
            both = Vocabulary.of(*sides)
            path = save_picture(draw_vocabulary, both, tmp_path / f"{number}.png", style=style)
            assert path.stat().st_size > 10_000
            assert "first order" in both._repr_html_()


@pytest.mark.parametrize("name", ["qwen3_moe", "phimoe", "llama4"])
def test_effects_by_the_formula(name: str, tmp_path: Path) -> None:
    """Sums of J(h) g f: RMSNorm, LayerNorm, and a block that weighs its experts' input."""
    with ExpertRouter.from_pretrained(save_checkpoint(name, tmp_path / name)) as router:
        unembedding = Unembedding.of(router)
        corpus = corpus_of(*WORDS[:3])
        found = record_effects(router, corpus, unembedding, batch_size=2)
        norm = dict(router.model.named_modules())[unembedding.norm_name]
        gain, eps = np.array(norm.weight, dtype=np.float64), norm.eps
        sums, counts = np.zeros_like(found.sums[0]), np.zeros_like(found.counts[0])
        for text in WORDS[:3]:
            stream, seen = _stream_and_experts(router, norm, router.encode(text))
            h = stream - (stream.mean(-1, keepdims=True) if "bias" in norm else 0)
            rms = np.sqrt((h**2).mean(-1, keepdims=True) + eps)
            for place, layer in enumerate(router.layers):
                ids, weights, outputs = seen[layer.index]
                if layer.family.weights_on_input:
                    weights = np.ones_like(weights)
                for row in range(len(ids)):
                    for slot, expert in enumerate(ids[row]):
                        v = weights[row, slot] * outputs[row, slot]
                        v = v - (v.mean() if "bias" in norm else 0)
                        part = (v @ h[row]) * h[row] / h.shape[1] / rms[row] ** 2
                        sums[place, expert] += gain * (v - part) / rms[row]
                        counts[place, expert] += 1
        np.testing.assert_array_equal(found.counts.sum(0), counts)
        scale = np.abs(sums).max()
        np.testing.assert_allclose(found.sums.sum(0), sums, atol=2e-5 * scale)


def _stream_and_experts(router: ExpertRouter, norm: Any, tokens: list[int]) -> tuple[Any, Any]:
    """The final stream [L, hidden], and ids, weights and outputs of each MoE layer."""
    streams: list[mx.array] = []

    def call(module: Any, x: mx.array) -> Any:
        streams.append(x)
        return call_original(module, x)

    swaps = ClassSwaps()
    swaps.swap(norm, call)
    try:
        with router.capture("expert_ids", "expert_weights", "expert_outputs") as seen:
            mx.eval(router.forward(tokens))
    finally:
        swaps.undo()
    shown = {
        layer: tuple(
            np.array(each, dtype=np.float64 if each.dtype != np.uint16 else None)
            for each in (seen[layer].expert_ids, seen[layer].expert_weights,
                         seen[layer].expert_outputs)
        )
        for layer in router.info.moe_layers
    }  # fmt: skip
    shown = {
        layer: (ids.astype(int), weights, outputs)
        for layer, (ids, weights, outputs) in shown.items()
    }
    return np.array(streams[0], dtype=np.float64)[0], shown


def test_streamed_effects_and_predictions_are_the_same(tmp_path: Path) -> None:
    folder = save_checkpoint("qwen3_moe", tmp_path / "model")
    corpus = corpus_of(*WORDS, labels=("a",) * 5 + ("b",) * 4)
    found = []
    for stream in (False, True):
        with ExpertRouter.from_pretrained(folder, stream=stream) as router:
            unembedding = Unembedding.of(router)
            effects = record_effects(router, corpus, unembedding, batch_size=4)
            found.append((effects, record_predictions(router, corpus, batch_size=2)))
            if not stream:
                rows = [router.encode(text) for text in WORDS]
                one = [np.array(mx.argmax(router.forward(row)[0], axis=-1)) for row in rows]
                np.testing.assert_array_equal(found[0][1], np.concatenate(one))
    (one, told), (two, again) = found
    np.testing.assert_array_equal(told, again)
    np.testing.assert_allclose(one.sums, two.sums, atol=1e-5)
    assert one.counts.sum() == two.counts.sum() == 180 * 2 * len(one.layers)
    assert (one.counts.sum(axis=(1, 2)) == np.array([100, 80]) * 2 * len(one.layers)).all()


def test_only_so_many_tokens(tmp_path: Path) -> None:
    with ExpertRouter.from_pretrained(save_checkpoint("mixtral", tmp_path / "m")) as router:
        found = record_effects(router, corpus_of(*WORDS), Unembedding.of(router), tokens=45)
        assert (found.counts.sum(axis=(0, 2)) == 60 * 2).all()


def test_ablation_lowers_what_an_expert_pushes(demo_run: Trace) -> None:
    """Demo, last layer: an expert's weight set to 0, on other prompts than those it was read on.

    The measured change of the logits follows the effect of that expert, and not that of others.
    """
    with ExpertRouter.from_pretrained("demo", cpu_experts="auto") as router:
        reading = ExpertReading.of(router)
        effects = record_effects(router, "demo", reading.unembedding, tokens=2500)
        told = reading.effects(effects.mean()[-1])
        prompts = [demo_run.prompt(index) for index in range(3, 192, 47)]
        ids, lengths = pad([prompt.token_ids for prompt in prompts])
        valid = np.arange(ids.shape[1])[None] < np.array(lengths)[:, None]
        chosen = np.concatenate([prompt.expert_ids[-1] for prompt in prompts])
        plain = np.array(router.forward(ids, lengths))[valid]
        own, others, drops = [], [], []
        for expert in range(0, 16, 4):
            with router.override(layers=[demo_run.layers[-1]], scale={expert: 0.0}):
                cut = np.array(router.forward(ids, lengths))[valid]
            change = (plain - cut)[(chosen == expert).any(axis=1)].mean(axis=0)
            all_experts = [float(np.corrcoef(change, each)[0, 1]) for each in told]
            own.append(all_experts.pop(expert))
            others.append(np.mean(all_experts))
            change -= change.mean()
            drops.append(change[np.argsort(-told[expert])[:10]].mean() / change.std())
    assert min(own) > 0.5 and np.mean(own) > 0.8
    assert np.mean(others) < np.mean(own) - 0.3
    assert min(drops) > 0.5


class TestDirections:
    @pytest.mark.parametrize(
        ("name", "quantise"), [("qwen3_moe", None), ("gpt_oss", 4), ("dbrx", None), ("hunyuan", 4)]
    )
    def test_against_numpy(self, name: str, quantise: int | None, tmp_path: Path) -> None:
        folder = save_checkpoint(name, tmp_path / name, quantise=quantise)
        with ExpertRouter.from_pretrained(folder) as router:
            layer = router.layers[-1]
            found = write_directions(layer, 2, 3)
            down = layer.down_projections[2 if layer.list_experts else 0]
            leaves = {k: v if layer.list_experts else v[2] for k, v in down.items()}
            weight = leaves["weight"]
            if quantise:
                weight = mx.dequantize(
                    weight, leaves["scales"], leaves.get("biases"), down.group_size, down.bits,
                    mode=getattr(down, "mode", "affine"),
                )  # fmt: skip
            left, values, _ = np.linalg.svd(np.array(weight.astype(mx.float32), np.float64))
            np.testing.assert_allclose(
                np.abs((found.vectors * left[:, :3].T).sum(axis=1)), 1.0, atol=1e-4
            )
            np.testing.assert_allclose(found.shares, values[:3] ** 2 / (values**2).sum(), rtol=1e-4)
            assert (found.bias is not None) == (name == "gpt_oss")

    def test_zero_experts_have_no_weights(self, tmp_path: Path) -> None:
        folder = save_checkpoint("longcat_flash", tmp_path / "m")
        refused = pytest.raises(UsageError, match="4 more only return what they read")
        with ExpertRouter.from_pretrained(folder) as router, refused:
            write_directions(router.layers[0], 9, 1)


class TestCommand:
    def test_on_a_model(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        folder = str(save_checkpoint("gpt_oss", tmp_path / "m"))
        data = tmp_path / "text.txt"
        data.write_text("\n".join(WORDS))
        command = ["vocab", folder, "--data", str(data), "--json"]
        picture = tmp_path / "x.png"
        assert cli.main([*command, "--ids", "predicted", "-o", str(picture)]) == 0
        shown = json.loads(capsys.readouterr().out)
        assert shown["routed"]["token_kind"] == "predicted" and picture.stat().st_size
        assert shown["written"]["read"] == "effect"
        assert cli.main([*command, "--expert", "1:2", "--directions", "2"]) == 0
        card = json.loads(capsys.readouterr().out)
        names = [name for name, _ in card["rows"]]
        assert "direction 2, b, z" in names and "bias up, z" in names
        assert cli.main([*command, "--token", "w5", "--by", "contribution"]) == 0
        token = json.loads(capsys.readouterr().out)
        assert token["token_id"] == 5 and token["share"] is None and len(token["z"]) == 2
        assert cli.main([*command, "--expert", "1:44"]) == 2
        assert "experts 0 to 7" in json.loads(capsys.readouterr().out)["error"]

    def test_what_cannot_be_told_is_said(
        self,
        tmp_path: Path,
        capsys: pytest.CaptureFixture[str],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        """An architecture whose experts cannot be followed into the stream."""
        folder = str(save_checkpoint("mixtral", tmp_path / "m"))
        data = tmp_path / "text.txt"
        data.write_text("\n".join(WORDS))
        with ExpertRouter.from_pretrained(folder) as router:
            block = replace(router.layers[0].family, not_written="of something behind the block")
        monkeypatch.setattr("moe_lens.families.registry._declared", lambda module: block if (
            type(module).__name__ == block.name) else None)  # fmt: skip
        assert cli.main(["vocab", folder, "--data", str(data)]) == 0
        out, err = capsys.readouterr()
        assert "only routing is shown" in err and "Share of the most chosen" in out
        assert cli.main(["vocab", folder, "--data", str(data), "--by", "both"]) == 1
        assert "of something behind the block; look at their routing" in capsys.readouterr().err
