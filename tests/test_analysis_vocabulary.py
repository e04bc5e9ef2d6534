"""Vocabulary of experts by routing, against counting by hand; and the command on a run."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moe_lens import cli
from moe_lens.analysis.vocabulary import (
    Vocabulary,
    count_ids,
    expert_card,
    routed_vocabulary,
    token_card,
    token_of,
)
from moe_lens.errors import UsageError
from moe_lens.figures.picture_file import save_picture
from moe_lens.figures.vocabulary import draw_vocabulary
from moe_lens.trace import NO_EXPERT, Routes, TokenTexts, Trace
from route_cases import random_routes
from trace_cases import trace_of

TEXTS = TokenTexts({3: b" Paris", 4: b"\n", 5: b"Rome"}, {9: "<|end|>"})


def ids_of(routes: Routes, kind: str, predicted: list[int]) -> dict[int, int]:
    """Row to id, by a loop."""
    found = {}
    for row in range(len(routes)):
        if kind == "input":
            found[row] = int(routes.token_ids[row])
        elif kind == "predicted":
            found[row] = predicted[row]
        elif row + 1 < len(routes) and routes.prompt[row + 1] == routes.prompt[row]:
            found[row] = int(routes.token_ids[row + 1])
    return found


@settings(
    max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    seed=st.integers(0, 999),
    kind=st.sampled_from(["input", "next", "predicted"]),
    slots=st.integers(1, 3),
    uneven=st.booleans(),
    lengths=st.lists(st.integers(0, 20), min_size=1, max_size=9).filter(lambda n: max(n) > 1),
)
def test_against_counting(
    tmp_path_factory: pytest.TempPathFactory,
    seed: int,
    kind: str,
    slots: int,
    uneven: bool,
    lengths: list[int],
) -> None:
    """N(x, e) / N(x), and the unweighted mean over ids of its largest."""
    routes = random_routes(seed, lengths=tuple(lengths), uneven=uneven, k=3)
    predicted = np.random.default_rng(seed).integers(0, 40, len(routes)).tolist()
    trace = trace_of(tmp_path_factory.mktemp("run"), routes, [None] * len(lengths), shard_tokens=9)
    counts = count_ids(trace, kind=kind, slots=slots, predicted=np.array(predicted, dtype=np.int32))
    ids = ids_of(routes, kind, predicted)
    times = Counter(ids.values())
    assert dict(zip(counts.token_ids, counts.occurrences, strict=True)) == dict(times)
    found = routed_vocabulary(counts, fewest=2, top=4)
    for place in range(3):
        pairs: Counter[tuple[int, int]] = Counter()
        for row, x in ids.items():
            for expert in map(int, routes.expert_ids[place, row, :slots]):
                if expert != NO_EXPERT:
                    pairs[x, expert] += 1
        largest = {x: max(pairs[x, e] for e in range(8)) / times[x] for x in times}
        assert found.all_ids.value[place] == pytest.approx(np.mean(list(largest.values())))
        often = [largest[x] for x in times if times[x] >= 2]
        assert found.frequent.ids == len(often)
        if often:
            assert found.frequent.value[place] == pytest.approx(np.mean(often))
        for expert in range(8):
            shares = [pairs[x, expert] / times[x] for x in times if times[x] >= 2]
            expected = sorted((each for each in shares if each), reverse=True)[:4]
            shown = found.top_share[place, expert]
            np.testing.assert_allclose(shown[~np.isnan(shown)], expected)
            for x, share in zip(found.top[place, expert], shown, strict=True):
                assert x < 0 or pairs[int(x), expert] / times[int(x)] == pytest.approx(share)
        card = token_card(int(counts.token_ids[0]), trace.texts, counts, None)
        x = card.token_id
        assert card.share is not None and card.occurrences == times[x]
        np.testing.assert_allclose(card.share[place], [pairs[x, e] / times[x] for e in range(8)])


def test_random_routing_is_what_chance_gives(tmp_path: Path) -> None:
    """No id prefers any expert, so the mean is that of chance, for every number of choices."""
    trace = trace_of(tmp_path / "run", random_routes(1, lengths=(500,) * 8, k=3))
    for slots in (1, 2, 3):
        found = routed_vocabulary(count_ids(trace, slots=slots))
        np.testing.assert_allclose(found.all_ids.value, found.all_ids.random, rtol=0.04)
        assert found.all_ids.random[0] > slots / 8


def test_an_id_that_occurs_once_says_nothing(tmp_path: Path) -> None:
    routes = random_routes(2, lengths=(10,))
    routes.token_ids[:] = np.arange(10)
    found = routed_vocabulary(count_ids(trace_of(tmp_path / "run", routes)))
    np.testing.assert_allclose(found.all_ids.value, 1.0)
    np.testing.assert_allclose(found.all_ids.random, 1.0)
    assert found.frequent.ids == 0 and (found.top < 0).all()
    assert "occur" in found.findings()[0] and found.tables()


def test_experts_with_a_vocabulary_of_their_own(tmp_path: Path) -> None:
    """Each id goes to the expert of its number; a tenth of the tokens go anywhere."""
    routes = random_routes(3, lengths=(200,) * 20, k=1, layers=(4,))
    stray = np.random.default_rng(0).random(len(routes)) < 0.1
    routes.expert_ids[0, ~stray, 0] = routes.token_ids[~stray] % 8
    found = routed_vocabulary(count_ids(trace_of(tmp_path / "run", routes)))
    assert 0.9 < found.all_ids.value[0] < 0.93 and found.all_ids.random[0] < 0.3
    assert found.all_ids.low[0] < found.all_ids.value[0] < found.all_ids.high[0]
    assert found.top[0, :, 0].tolist() != [-1] * 8
    assert all(int(x) % 8 == expert for expert, x in enumerate(found.top[0, :, 0]))
    card = expert_card(4, 7, found, None)
    assert "7" in card.title and card.tables()[1].rows


def test_the_interval_covers(tmp_path: Path) -> None:
    """The spread of the value over new corpora, against the interval of one: alike.

    Prompts differ in their topic, so tokens of one prompt are alike, and counting tokens as
    independent would give an interval several times too narrow.
    """
    values, widths = [], []
    for seed in range(20):
        random = np.random.default_rng(seed)
        lengths = random.integers(5, 150, 30)
        routes = random_routes(seed, lengths=tuple(lengths), k=1, layers=(0,))
        topic = np.repeat(random.choice(4, 30, p=(0.55, 0.15, 0.15, 0.15)), lengths)
        routes.expert_ids[0, :, 0] = np.where(random.random(len(topic)) < 0.7, topic, 4)
        found = routed_vocabulary(count_ids(trace_of(tmp_path / f"run{seed}", routes)))
        values.append(found.all_ids.value[0])
        widths.append(found.all_ids.high[0] - found.all_ids.low[0])
    spread = 2 * 1.96 * np.std(values)
    assert 0.85 * spread < np.median(widths) < 1.2 * spread


def test_one_layer_one_prompt_all_experts(tmp_path: Path) -> None:
    routes = random_routes(5, lengths=(40,), k=8, layers=(2,))
    found = routed_vocabulary(count_ids(trace_of(tmp_path / "run", routes), slots=8))
    np.testing.assert_allclose(found.all_ids.value, 1.0)
    assert Vocabulary.of(found, None, layer=2).tables()[0].rows[7][0] == 7


def test_refusals(tmp_path: Path) -> None:
    trace = trace_of(tmp_path / "run", random_routes(lengths=(5, 4)))
    with pytest.raises(UsageError, match="input, next, predicted"):
        count_ids(trace, kind="output")
    with pytest.raises(UsageError, match="give the model itself"):
        count_ids(trace, kind="predicted")
    with pytest.raises(UsageError, match="3 predictions for 9 tokens"):
        count_ids(trace, kind="predicted", predicted=np.zeros(3, dtype=np.int32))
    with pytest.raises(UsageError, match="give 1 to 2"):
        count_ids(trace, slots=3)
    found = routed_vocabulary(count_ids(trace))
    with pytest.raises(UsageError, match="MoE layers are 1, 2, 3"):
        Vocabulary.of(found, None, layer=0)
    with pytest.raises(UsageError, match="experts 0 to 7"):
        expert_card(1, 8, found, None)
    for call in (lambda: Vocabulary.of(None, None), lambda: expert_card(1, 1, None, None)):
        with pytest.raises(UsageError, match="neither"):
            call()
    single = trace_of(tmp_path / "single", random_routes(lengths=(1, 1)))
    with pytest.raises(UsageError, match="two tokens"):
        count_ids(single, kind="next")


def test_a_token_by_its_text() -> None:
    assert token_of(" Paris", TEXTS) == token_of("␣Paris", TEXTS) == token_of("id:3", TEXTS) == 3
    assert token_of("\n", TEXTS) == token_of("↵", TEXTS) == 4
    assert token_of("<|end|>", TEXTS) == 9
    with pytest.raises(UsageError, match="did you mean ' Paris'"):
        token_of("Paris", TEXTS)
    with pytest.raises(UsageError, match="did you mean 'Rome'"):
        token_of(" Rome", TEXTS)
    with pytest.raises(UsageError, match="give one token"):
        token_of("Paris and Rome", TEXTS)
    with pytest.raises(UsageError, match="no token 8 among the 4"):
        token_of("id:8", TEXTS)


@pytest.mark.parametrize(("ending", "style"), [(".png", "light"), (".svg", "dark")])
def test_pictures(tmp_path: Path, ending: str, style: str) -> None:
    trace = trace_of(tmp_path / "run", random_routes(lengths=(90, 80, 70)), ["a", "$b$", None])
    found = Vocabulary.of(routed_vocabulary(count_ids(trace)), None)
    one = save_picture(draw_vocabulary, found, tmp_path / f"one{ending}", style=style, subtitle="m")
    two = save_picture(draw_vocabulary, found, tmp_path / f"two{ending}", style=style, subtitle="m")
    assert one.read_bytes() == two.read_bytes()
    assert "Eq. 8" in found._repr_html_()


def test_command_on_a_run(
    demo_run: Trace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, picture = str(demo_run.path), tmp_path / "v.png"
    assert cli.main(["vocab", run, "--ids", "next", "--json", "-o", str(picture)]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["kind"] == "vocabulary" and shown["written"] is None and picture.stat().st_size
    again = routed_vocabulary(count_ids(demo_run, kind="next"))
    np.testing.assert_allclose(shown["routed"]["all_ids"]["value"], again.all_ids.value)
    assert cli.main(["vocab", run, "--token", " return"]) == 0
    assert "chosen most" in capsys.readouterr().out
    assert cli.main(["vocab", run, "--expert", "2:3"]) == 0
    assert "expert 2:3" in capsys.readouterr().out
    assert cli.main(["vocab", run, "--layer", "3"]) == 0
    assert "Experts of layer 3" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--by", "contribution"], "give the model instead of the run"),
        (["--expert", "1:2", "--directions", "1"], "give the model instead of the run"),
        (["--ids", "predicted"], "give the model itself"),
        (["--layer", "0"], "no routed experts"),
        (["--expert", "1:99"], "experts 0 to 15"),
        (["--expert", "7"], "LAYER:EXPERT"),
        (["--layer", "1", "--token", "x"], "give one of them"),
        (["--directions", "2"], "belong to one expert"),
        (["--token", "no such token"], "no single token"),
        (["--token", "id:3", "-o", "x.png"], "a picture shows all experts"),
        (["--choices", "3"], "give 1 to 2"),
        (["--data", "demo"], "leave out --data"),
    ],
)
def test_command_refuses(
    demo_run: Trace, options: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["vocab", str(demo_run.path), *options]) == 2
    assert says in capsys.readouterr().err
