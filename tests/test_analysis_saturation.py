"""Saturation: against counting with sets, checkpoints by name, resuming, refusals, the command."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.utils import load_model, save_model

from moe_lens import cli
from moe_lens.analysis.saturation import Saturation, saturation
from moe_lens.errors import UsageError
from moe_lens.families import find_moe_layers
from moe_lens.figures.picture_file import save_picture
from moe_lens.figures.saturation import draw_saturation
from moe_lens.recording.checkpoints import find_checkpoints, record_checkpoints
from moe_lens.router import ExpertRouter
from moe_lens.telling import Stage
from moe_lens.trace import NO_EXPERT, Routes, Trace
from route_cases import random_routes
from tiny_models import save_checkpoint
from trace_cases import trace_of
from twins import write_words

LENGTHS = (9, 0, 14, 5, 8, 11)
STEPS = (10, 40, 100)


def mixed(last: Routes, seed: int, share: float) -> Routes:
    """`last`, whose tokens choose at random with probability 1 - share."""
    layers, tokens, k = last.expert_ids.shape
    other = random_routes(seed, layers=last.layers, width=last.router_width, k=k, lengths=LENGTHS)
    keep = np.random.default_rng(seed).random((layers, tokens)) < share
    ids = np.where(keep[..., None], last.expert_ids, other.expert_ids)
    ids[last.expert_ids == NO_EXPERT] = NO_EXPERT
    return replace(last, expert_ids=ids.astype(np.uint16))


def counted(one: Routes, two: Routes) -> tuple[list[float], list[float]]:
    """Equation 5 by Python's sets: all choices, and the first, layer by layer."""
    every, first = [], []
    for ours, theirs in zip(one.expert_ids.tolist(), two.expert_ids.tolist(), strict=True):
        pairs = [
            ({*a} - {NO_EXPERT}, {*b} - {NO_EXPERT}) for a, b in zip(ours, theirs, strict=True)
        ]
        every.append(sum(len(a & b) / len(b) for a, b in pairs) / len(pairs))
        first.append(sum(a[0] == b[0] for a, b in zip(ours, theirs, strict=True)) / len(pairs))
    return every, first


@settings(max_examples=12, deadline=None)
@given(
    seed=st.integers(0, 999),
    k=st.sampled_from([1, 2, 3, 8]),
    cuts=st.lists(st.integers(1, 40), min_size=3, max_size=3),
)
def test_against_counting(
    tmp_path_factory: pytest.TempPathFactory, seed: int, k: int, cuts: list[int]
) -> None:
    """Runs that are cut into other shards each, with an empty prompt among them."""
    folder = tmp_path_factory.mktemp("runs")
    last = random_routes(seed, lengths=LENGTHS, k=k, uneven=1 < k < 8)
    routes = [mixed(last, seed + 1, 0.2), mixed(last, seed + 2, 0.6), last]
    traces = [
        trace_of(folder / str(number), each, ["a", "b"] * 3, shard_tokens=cut)
        for number, (each, cut) in enumerate(zip(routes, cuts, strict=True))
    ]
    found = saturation(traces, steps=STEPS)
    assert found.tokens == sum(LENGTHS) and found.prompts == 5
    for place in (0, 1):
        every, first = counted(routes[place], last)
        np.testing.assert_allclose(found.final.value[place], every)
        np.testing.assert_allclose(found.first.value[place], first)
        every, first = counted(routes[place], routes[place + 1])
        np.testing.assert_allclose(found.next.value[place], every)
        np.testing.assert_allclose(found.next_first.value[place], first)
    used = [k - 1 if 1 < k < 8 else k, k, k]
    np.testing.assert_allclose(found.final.random, np.array(used) / 8)
    np.testing.assert_allclose(found.first.random, 1 / 8)
    np.testing.assert_allclose(found.fraction, [0.1, 0.4, 1.0])


@pytest.fixture(scope="module")
def rising(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Trace], Saturation]:
    """Four runs of which 0, 30, 70 and 100 % of the tokens choose as the last one does."""
    folder = tmp_path_factory.mktemp("rising")
    lengths = (60,) * 24
    last = random_routes(3, layers=tuple(range(4)), lengths=lengths, width=16, k=2)
    traces = []
    for number, share in enumerate((0.0, 0.3, 0.7, 1.0)):
        other = random_routes(number + 9, layers=last.layers, lengths=lengths, width=16, k=2)
        keep = np.random.default_rng(number).random((4, len(last), 1)) < share
        ids = np.where(keep, last.expert_ids, other.expert_ids).astype(np.uint16)
        routes = replace(last, expert_ids=ids)
        traces.append(trace_of(folder / f"{number}", routes, ["a"] * 24, shard_tokens=500))
    names = ["step0", "step5", "step50", "step100"]
    return traces, saturation(traces, names=names, steps=[0, 5, 50, 100])


def test_what_is_known_comes_out(rising: tuple[list[Trace], Saturation]) -> None:
    _, found = rising
    random = 2 / 16
    for place, share in enumerate((0.0, 0.3, 0.7)):
        expected = share + (1 - share) * random
        np.testing.assert_allclose(found.final.value[place], expected, atol=0.03)
        np.testing.assert_allclose(found.first.value[place], share + (1 - share) / 16, atol=0.03)
        assert (found.final.low[place] <= found.final.value[place]).all()
        assert (found.final.value[place] <= found.final.high[place]).all()
        inside = (found.final.low[place] <= expected) & (expected <= found.final.high[place])
        assert inside.sum() >= 3
    np.testing.assert_allclose(found.next.value[2], found.final.value[2])
    assert "step0 (0 % of the steps) makes 12" in found.findings()[0]
    assert "12.5 % at random" in found.findings()[0]
    content = json.loads(found.to_json())
    assert content["names"][3] == "step100" and len(content["final"]["value"]) == 3
    assert "Eq. 5" in found._repr_html_() and len(found.definition) < 4 * 130


def test_one_prompt_has_no_interval(tmp_path: Path) -> None:
    routes = random_routes(lengths=(20,), layers=(0,), k=1)
    found = saturation([trace_of(tmp_path / name, routes) for name in "ab"])
    assert found.final.value.tolist() == [[1.0]] and np.isnan(found.final.low).all()
    assert found.tables() and found.findings()


def other(routes: Routes, what: str, folder: Path) -> Trace:
    """A run that is no checkpoint of the same: of another model, text or tokenizer."""
    if what == "layers":
        routes = random_routes(0, lengths=LENGTHS, layers=(0, 2, 3))
    elif what == "experts":
        routes = random_routes(0, lengths=LENGTHS, width=16)
    elif what == "k":
        routes = random_routes(0, lengths=LENGTHS, k=3)
    elif what == "tokens":
        routes = replace(routes, token_ids=routes.token_ids + 1)
    elif what == "lengths":
        routes = random_routes(0, lengths=(8, 1, 14, 5, 8, 11))
    trace = trace_of(folder, routes, [None] * 6)
    if what == "prompts":
        content = json.loads((folder / "prompts.json").read_text())
        content["sha256"][2] = "1" * 16
        (folder / "prompts.json").write_text(json.dumps(content))
        trace = Trace.open(folder)
    return trace


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("layers", "no checkpoints of one model"),
        ("experts", "MoE layers of 16 experts"),
        ("k", "3 per token"),
        ("prompts", "other prompts"),
        ("lengths", "prompts of other lengths"),
        ("tokens", "read other tokens"),
    ],
)
def test_what_cannot_be_compared(tmp_path: Path, what: str, said: str) -> None:
    routes = random_routes(0, lengths=LENGTHS)
    one, two = trace_of(tmp_path / "a", routes, [None] * 6), other(routes, what, tmp_path / "b")
    with pytest.raises(UsageError, match=said):
        saturation([one, two])
    with pytest.raises(UsageError, match=said):
        saturation([two, one])
    with pytest.raises(UsageError, match="two or more"):
        saturation([one])


def folders(base: Path, *names: str) -> Path:
    for name in names:
        (base / name).mkdir(parents=True)
        (base / name / "config.json").write_text("{}")
    return base


@pytest.mark.parametrize(
    ("names", "steps"),
    [
        (["step5000", "step120000", "step20000"], [5000, 20000, 120000]),
        (["checkpoint-10", "checkpoint-9"], [9, 10]),
        (["iter_0000100", "iter_0000020"], [20, 100]),
        (["epoch_0.5", "epoch_1.5", "epoch_1.0"], [0.5, 1.0, 1.5]),
        (["m7b-step20-tokens4B", "m7b-step5-tokens1B"], [5, 20]),
    ],
)
def test_checkpoints_by_number(tmp_path: Path, names: list[str], steps: list[float]) -> None:
    (tmp_path / "logs").mkdir()
    found = find_checkpoints([folders(tmp_path, *names)])
    assert [each.step for each in found] == steps
    assert not any(each.recorded for each in found)


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["step1", "final"], "order is not clear"),
        (["a", "b"], "order is not clear"),
        (["a1-b2", "a2-b1"], "order is not clear"),
        (["step1", "step01"], "order is not clear"),
        (["step1"], "holds 1 checkpoint "),
        ([], "holds 0 checkpoints"),
    ],
)
def test_no_order(tmp_path: Path, names: list[str], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        find_checkpoints([folders(tmp_path, *names)])


def test_checkpoints_that_are_named(tmp_path: Path) -> None:
    folders(tmp_path, "step1", "final", "step9", "step30")
    found = find_checkpoints([tmp_path / "step9", tmp_path / "step1", tmp_path / "final"])
    assert [(each.name, each.step) for each in found] == [("step9", 1), ("step1", 2), ("final", 3)]
    rising = find_checkpoints([tmp_path / "step1", tmp_path / "step30"])
    assert [each.step for each in rising] == [1, 30]
    trace_of(tmp_path / "run2", random_routes(lengths=(3,)))
    for wrong, said in (
        (["step1", "run2"], "not both"),
        (["step1", "nothing"], "no model folder"),
        (["step1", "step1"], "named twice"),
        (["step1"], "is one checkpoint"),
        (["nothing"], "no folder"),
    ):
        with pytest.raises(UsageError, match=said):
            find_checkpoints([tmp_path / each for each in wrong])


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints whose routers go from random rows to the last ones, and a text of words."""
    base = tmp_path_factory.mktemp("trained")
    for step, share in ((0, 0.0), (50, 0.6), (400, 1.0)):
        folder = save_checkpoint("qwen3_moe", base / "models" / f"step{step}", experts=16)
        model, _ = load_model(folder)
        parameters = dict(tree_flatten(model.parameters()))
        for layer in find_moe_layers(model):
            for key in layer.router_parameters():
                noise = mx.random.normal(parameters[key].shape, key=mx.random.key(7))
                start = noise * mx.std(parameters[key])
                parameters[key] = share * parameters[key] + (1 - share) * start
        model.update(tree_unflatten(list(parameters.items())))
        mx.eval(model.parameters())
        save_model(folder, model, donate_model=True)
    write_words(base / "words.jsonl", 6, 1)
    return base


def test_models_are_recorded_one_after_the_other(trained: Path, tmp_path: Path) -> None:
    loaded: list[str] = []
    told: list[Stage] = []

    def load(path: Path) -> ExpertRouter:
        loaded.append(path.name)
        return ExpertRouter.from_pretrained(path)

    def run(count: int = 3, **changed: Any) -> list[Trace]:
        return record_checkpoints(
            find_checkpoints([trained / "models"])[:count],
            trained / "words.jsonl",
            tmp_path / "work",
            load=load,
            progress=lambda stage, _done, _total: told.append(stage),
            **changed,
        )

    run(2)  # interrupted after the second of three
    assert loaded == ["step0", "step50"]
    traces = run()
    assert loaded == ["step0", "step50", "step400"]
    assert {str(stage) for stage in told} >= {"recording step400 (3 of 3)"}
    found = saturation(traces, steps=[0, 50, 400])
    assert (found.final.value[0] < found.final.value[1]).all()
    assert (found.final.value[0] < 0.5).all() and (found.final.value[1] > 0.4).all()
    fresh = record_checkpoints(
        find_checkpoints([trained / "models"]), trained / "words.jsonl", tmp_path / "new", load=load
    )
    again = saturation(fresh, steps=[0, 50, 400])
    assert json.loads(again.to_json()) | {"names": None} == json.loads(found.to_json()) | {
        "names": None
    }
    with pytest.raises(UsageError, match="choose another output folder"):
        run(sample_size=2)


def test_command(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    work, picture = tmp_path / "runs", tmp_path / "s.png"
    asked = [str(trained / "models"), "--data", str(trained / "words.jsonl"), "--work", str(work)]
    assert cli.main(["saturation", *asked, "--json", "--fraction", "-o", str(picture)]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["kind"] == "saturation" and shown["names"] == ["step0", "step50", "step400"]
    assert shown["steps"] == [0, 50, 400] and picture.stat().st_size
    assert cli.main(["saturation", str(work)]) == 0
    assert "step50 (12.5 %)" in capsys.readouterr().out
    assert cli.main(["saturation", str(work), "--data", "demo"]) == 2
    assert "leave out --data" in capsys.readouterr().err
    assert cli.main(["saturation", str(work), "--fraction"]) == 2
    assert "name its file" in capsys.readouterr().err
    assert cli.main(["saturation", str(tmp_path)]) == 2
    assert "holds 0 checkpoints" in capsys.readouterr().err


@pytest.mark.parametrize("style", ["light", "dark"])
def test_pictures(rising: tuple[list[Trace], Saturation], tmp_path: Path, style: str) -> None:
    _, found = rising
    one, two = (
        save_picture(draw_saturation, found, tmp_path / f"{name}.svg", style=style, subtitle="m")
        for name in "ab"
    )
    assert one.read_bytes() == two.read_bytes()
    save_picture(draw_saturation, found, tmp_path / "c.png", fraction=True, style=style, dpi=50)
