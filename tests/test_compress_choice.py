"""The best of all methods at one size, and the loss at several."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moe_lens.compress import compress, read_plan
from moe_lens.compress.calibration.calibration import identify_corpus
from moe_lens.compress.calibration.validation_split import split
from moe_lens.compress.choice.choice import choose
from moe_lens.compress.choice.frontier import Frontier, frontier
from moe_lens.compress.choice.methods import (
    NAMES,
    Candidate,
    combined_candidates,
    single_candidates,
)
from moe_lens.compress.choice.readings import Readings, read_all
from moe_lens.compress.choice.trials import TrialBench
from moe_lens.compress.pruning.channels import plan_channels
from moe_lens.compress.tensors.parent import open_parent
from moe_lens.compress.tensors.size_table import Shape, SizeTable
from moe_lens.compress.tensors.unpacked import fastest, unpack
from moe_lens.compress.verification.losses import compare
from moe_lens.corpus import Corpus, Prompt, read_corpus
from moe_lens.errors import MoeLensError, UsageError
from moe_lens.figures.frontier import draw_frontier, save_frontier
from moe_lens.router import ExpertRouter
from tiny_models import save_checkpoint
from twins import merge_plan, prune_plan, save_twins, write_words

PAIRS = [(expert, expert + 8) for expert in range(8)]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("choice")
    save_twins(folder / "twins")
    write_words(folder / "learn.jsonl", 24, 1, words=16)
    write_words(folder / "test.jsonl", 8, 2, words=16)
    return folder


@pytest.fixture(scope="module")
def learn(place: Path) -> Corpus:
    return read_corpus(place / "learn.jsonl")


@pytest.fixture(scope="module")
def readings(place: Path, learn: Corpus) -> Readings:
    return read_all(ExpertRouter.from_pretrained(place / "twins"), split(learn)[0])


@pytest.fixture(scope="module")
def bench(place: Path, learn: Corpus, readings: Readings) -> TrialBench:
    tokens = split(learn)[1].tokenize(readings.router.tokenizer, 512)
    return TrialBench(readings.router, tokens, SizeTable.of(open_parent(place / "twins")))


# The split ----------------------------------------------------------------------------------


def test_a_third_of_each_label_validates_and_nothing_is_on_both_sides(learn: Corpus) -> None:
    calibration, validation = split(learn, seed=3)
    assert (len(calibration), len(validation)) == (16, 8)
    assert {p.label: 0 for p in validation.prompts} == {"a": 0, "b": 0}
    texts = [{p.text for p in part.prompts} for part in (calibration, validation)]
    assert not texts[0] & texts[1]
    assert texts[0] | texts[1] == {p.text for p in learn.prompts}
    again, other = split(learn, seed=3)[1], split(learn, seed=4)[1]
    assert again.prompts == validation.prompts != other.prompts


def test_copies_of_a_prompt_fall_on_one_side() -> None:
    prompts = tuple(Prompt(f"text {number % 5}") for number in range(40))
    calibration, validation = split(Corpus("copies", prompts))
    assert not {p.text for p in calibration.prompts} & {p.text for p in validation.prompts}
    with pytest.raises(UsageError, match="3 different prompts"):
        split(Corpus("few", prompts[:3]))


# Trials -------------------------------------------------------------------------------------


def test_a_trial_is_the_loss_of_the_model_that_would_be_written(
    place: Path, bench: TrialBench, tmp_path: Path
) -> None:
    from moe_lens.compress import write

    router = ExpertRouter.from_pretrained(place / "twins")
    plans = {
        "prune": prune_plan(router, {n: list(range(3, 11)) for n in router.info.moe_layers}),
        "merge": merge_plan(router, dict.fromkeys(router.info.moe_layers, PAIRS)),
    }
    for name, plan in plans.items():
        written = ExpertRouter.from_pretrained(write(plan, place / "twins", tmp_path / name))
        trial = bench.try_plan(name, plan)[0]
        found = compare(router.forwards, [written.forwards], bench.tokens, router.info.vocab_size)[
            0
        ]
        np.testing.assert_allclose(trial.kl, found.kl, atol=2e-5)
        assert trial.loss.kl.value == pytest.approx(float(found.kl.mean()), rel=1e-3)
        assert trial.shape.num_experts == 8


def test_experts_per_token_are_tried_on_one_model(bench: TrialBench, place: Path) -> None:
    router = ExpertRouter.from_pretrained(place / "twins")
    plan = merge_plan(router, dict.fromkeys(router.info.moe_layers, PAIRS))
    both = bench.try_plan("merge", plan, (2, 1))
    assert [trial.plan.experts_per_token for trial in both] == [2, 1]
    alone = bench.try_plan("merge", plan.with_experts_per_token(1))[0]
    np.testing.assert_allclose(both[1].kl, alone.kl, atol=1e-6)


def test_unpacked_weights_give_the_same_logits(tmp_path: Path) -> None:
    source = save_checkpoint("qwen3_moe", tmp_path / "packed", 4, experts=8)
    router = ExpertRouter.from_pretrained(source)
    tokens = [[1, 2, 3, 4, 5, 6]]
    expected = np.array(router.forward(tokens))
    for how in ("stock", "segmented"):
        fast = fastest(router, how)
        assert fast is not router
        assert (fast.cpu_experts, router.cpu_experts) == (how, "stock")
        found = np.array(fast.forward(tokens))
        np.testing.assert_allclose(found, expected, atol=1e-3 * np.abs(expected).max())
        assert not any("scales" in module for _, module in fast.model.named_modules())
        assert fastest(fast, how) is fast
    plain = ExpertRouter.from_pretrained(save_checkpoint("qwen3_moe", tmp_path / "plain"))
    assert fastest(plain, "stock") is plain
    unpack(router.model, [router.layers[0].router])
    packed = [name for name, module in router.model.named_modules() if "scales" in module]
    assert f"{router.layers[0].path}.gate" not in packed
    assert f"{router.layers[1].path}.gate" in packed


# The choice ---------------------------------------------------------------------------------


def test_every_method_is_tried_or_has_a_reason(readings: Readings, bench: TrialBench) -> None:
    limit = bench.table.bytes(Shape(10, bench.table.full.expert_width))
    text = identify_corpus(Corpus("v", ()), bench.tokens, 512, 0)
    stages: list[str] = []
    found = choose(
        readings, bench, text, limit, progress=lambda stage, done, total: stages.append(str(stage))
    )
    names = {trial.name for trial in found.trials} | {each.name for each in found.skipped}
    assert set(NAMES) <= names
    assert any(name.endswith(" + channels") for name in names)
    assert {f"trying {trial.name}" for trial in found.trials} | {"planning"} == set(stages)
    assert all(trial.bytes <= limit for trial in found.trials)
    kls = [trial.loss.kl.value for trial in found.trials]
    assert kls == sorted(kls)
    assert found.best.loss.kl.value < kls[[t.name for t in found.trials].index("reap")] / 3
    content = found.plan().evidence["choice"]
    assert len(content["trials"]) == len(found.trials)
    assert content["trials"][0]["method"] in content["text"]
    assert "random" in content["text"]


def test_what_fails_while_it_is_tried_is_listed(
    readings: Readings, bench: TrialBench, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = TrialBench.try_plan

    def failing(self: TrialBench, name: str, *args: Any, **options: Any) -> Any:
        if name == "reap":
            raise UsageError("it cannot be routed so")
        trials = original(self, name, *args, **options)
        if name != "frequency":
            return trials
        broken = replace(trials[0].loss.kl, value=float("nan"))
        return [replace(trials[0], loss=replace(trials[0].loss, kl=broken))]

    monkeypatch.setattr(TrialBench, "try_plan", failing)
    limit = bench.table.bytes(Shape(8, bench.table.full.expert_width))
    text = identify_corpus(Corpus("v", ()), bench.tokens, 512, 0)
    methods = ["reap", "frequency", "gate-sum"]
    found = choose(readings, bench, text, limit, methods=methods)
    assert [trial.name for trial in found.trials] == ["gate-sum"]
    reasons = {each.name: each.reason for each in found.skipped}
    assert reasons["reap"] == "it cannot be routed so"
    assert "NaN" in reasons["frequency"]
    with pytest.raises(MoeLensError, match=r"no method can.*it cannot be routed so"):
        choose(readings, bench, text, limit, methods=["reap"])


def test_a_model_that_cannot_be_narrowed_says_so(learn: Corpus, tmp_path: Path) -> None:
    # The same number is the width of its dense layers.
    source = save_checkpoint("jamba", tmp_path / "source")
    table = SizeTable.of(open_parent(source))
    found = read_all(ExpertRouter.from_pretrained(source), Corpus("few", learn.prompts[:3]))
    limit = table.bytes(Shape(table.full.num_experts - 1, table.full.expert_width))
    singles = {each.name: each for each in single_candidates(found, table, limit)}
    assert "which also sets" in singles["channels"].to_dict()["reason"]
    assert isinstance(singles["reap"], Candidate)
    assert not list(combined_candidates(found, table, limit, "reap"))


def test_experts_and_channels_share_the_bytes(readings: Readings, bench: TrialBench) -> None:
    table = bench.table
    limit = table.bytes(Shape(8, table.full.expert_width))
    found = list(combined_candidates(readings, table, limit, "reap"))
    assert found
    for each in found:
        assert isinstance(each, Candidate)
        plan = each.plan
        assert plan.num_experts < 16
        assert plan.expert_width is not None
        assert table.bytes(Shape(plan.num_experts, plan.expert_width)) <= limit
        more = table.bytes(Shape(plan.num_experts + 1, plan.expert_width))
        assert more > limit


def test_channels_alone_are_those_of_the_method(readings: Readings, bench: TrialBench) -> None:
    limit = bench.table.bytes(Shape(8, bench.table.full.expert_width))
    found = next(single_candidates(readings, bench.table, limit, methods=["channels"]))
    assert isinstance(found, Candidate)
    assert readings.channels is not None
    width = found.plan.expert_width
    assert width is not None
    assert found.plan.layers == plan_channels(readings.channels, width).layers


def test_auto_takes_the_copies_and_writes_the_table(place: Path, tmp_path: Path) -> None:
    said: list[str] = []
    found = compress(
        place / "twins",
        ratio=0.25,
        output=tmp_path / "small",
        calibration=place / "learn.jsonl",
        evaluation=place / "test.jsonl",
        say=said.append,
    )
    # A quarter less was asked for; merging the copies halves the experts and loses less.
    assert found.plan.kind == "merge"
    assert found.plan.num_experts == 8
    assert found.verification is not None
    assert found.verification.loss.kl.value < 2e-3
    choice = found.plan.evidence["choice"]
    assert choice["trials"][0]["kl"]["value"] < 2e-3
    assert found.plan.settings["asked"] == {"method": "auto", "ratio": 0.25}
    assert any("8 of the 24 calibration prompts" in note for note in said)
    card = (tmp_path / "small" / "README.md").read_text()
    assert "How the method was chosen" in card
    assert "| random |" in card
    assert "--plan plan.json" in card
    assert read_plan(tmp_path / "small" / "plan.json") == found.plan
    validation = choice["validation"]["fingerprint"]
    assert validation != found.plan.corpus.fingerprint != found.verification.corpus.fingerprint


# The frontier -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def measured(place: Path) -> Frontier:
    return frontier(
        place / "twins",
        ratios=(0.25, 0.5, 0.999),
        methods=["reap", "random", "channels", "merge"],
        calibration=place / "learn.jsonl",
    )


def test_a_frontier_has_each_method_at_each_size(measured: Frontier) -> None:
    assert len(measured.choices) == 3
    # One expert cannot serve the two slots of a token; a merge may use one slot.
    tried = {trial.name for trial in measured.choices[2].trials}
    assert "reap" not in tried
    assert "merge" in tried
    assert "channels" in tried
    names, rows = measured.rows()
    assert names[:2] == ("at most MB", "method")
    assert {row[1] for row in rows} == {"reap", "random", "channels", "merge"}
    for points in measured.curves().values():
        sizes = [point[0] for point in points]
        assert sizes == sorted(sizes, reverse=True)
    content = measured.to_dict()
    assert content["sizes"][0]["limit_bytes"] > content["sizes"][1]["limit_bytes"]
    assert content["parent_bytes"] > content["sizes"][0]["limit_bytes"]


@pytest.mark.parametrize("style", ["light", "dark"])
def test_a_frontier_can_be_seen(style: str, measured: Frontier, tmp_path: Path) -> None:
    path = save_frontier(measured, tmp_path / "frontier.png", style=style)
    assert path.read_bytes()[:4] == b"\x89PNG"
    axes = draw_frontier(measured, style=style).axes[0]
    written = {text.get_text() for text in axes.texts}
    assert {"reap", "random", "channels", "merge"} <= written
    assert axes.get_yscale() == "log"
    drawn = [list(map(float, line.get_ydata())) for line in axes.lines]
    for points in measured.curves().values():
        assert [pytest.approx(point[1]) for point in points] in drawn


def test_a_frontier_refuses_what_cannot_be(place: Path, measured: Frontier, tmp_path: Path) -> None:
    text = {"calibration": place / "learn.jsonl"}
    with pytest.raises(UsageError, match="no method 'magic'"):
        frontier(place / "twins", methods=["magic"], **text)
    with pytest.raises(UsageError, match="between 0 and 1"):
        frontier(place / "twins", ratios=(1.5,), **text)
    with pytest.raises(UsageError, match=r"frontier\.png"):
        save_frontier(measured, tmp_path / "frontier.bmp")
    with pytest.raises(MoeLensError, match="removes none"):
        frontier(place / "twins", ratios=(0.001,), methods=["reap"], **text)
