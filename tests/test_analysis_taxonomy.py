"""The taxonomy: kinds of token by hand, measures by loops, planted experts, chance, the demo."""

from __future__ import annotations

import inspect
import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mlx_lm.utils import dequantize_model

from moe_lens import cli
from moe_lens.analysis.taxonomy import ROLES, Taxonomy, Thresholds, name_experts
from moe_lens.analysis.taxonomy.kinds import COLUMNS, KINDS, columns
from moe_lens.analysis.taxonomy.result import SORTS
from moe_lens.analysis.taxonomy.token_classes import TokenTable, class_of
from moe_lens.cli import experts as command
from moe_lens.errors import MoeLensError, UsageError
from moe_lens.figures.experts import draw_experts
from moe_lens.figures.picture_file import save_picture
from moe_lens.router import ExpertRouter
from moe_lens.trace import NO_EXPERT, Routes, TokenTexts, Trace
from route_cases import random_routes
from trace_cases import trace_of


def routes_of(prompts: Sequence[Sequence[str]], experts: int = 4, k: int = 1) -> Routes:
    """Prompts of these tokens, all routed to the first experts."""
    words = sorted({word for prompt in prompts for word in prompt})
    lengths = [len(prompt) for prompt in prompts]
    total = sum(lengths)
    ids = np.broadcast_to(np.arange(k, dtype=np.uint16), (1, total, k)).copy()
    return Routes(
        layers=(0,),
        router_width=experts,
        token_ids=np.array([words.index(w) for p in prompts for w in p], dtype=np.int32),
        prompt=np.repeat(np.arange(len(prompts)), lengths).astype(np.int32),
        position=np.concatenate([np.arange(n) for n in lengths]).astype(np.int32),
        expert_ids=ids,
        expert_weights=np.full(ids.shape, 1 / k, dtype=np.float16),
        texts=TokenTexts({place: word.encode() for place, word in enumerate(words)}),
    )


def kinds_of(routes: Routes) -> list[set[str]]:
    """The kinds of each token, by their names."""
    found = columns(routes, TokenTable.of(routes.texts))
    classes = [{COLUMNS[place] for place in token} for token in found.T]
    return [{kind.name for kind in KINDS if own & set(kind.classes)} for own in classes]


class TestKinds:
    @pytest.mark.parametrize(
        ("text", "name"),
        [
            (" the", "lower case"), ("The", "capitalised"), ("HTTP", "upper case"),
            ("getName", "lower case"), (" x", "single letter"), ("A", "single letter"),
            ("42", "digits"), (" 7", "digits"), ("\n\n", "newline"), ("    ", "spaces"),
            ("\t", "spaces"), ("(", "opening bracket"), (")]", "closing bracket"),
            ("):", "closing bracket"), ('",', "quote"), (" «", "quote"), ("...", "punctuation"),
            ("==", "operator"), (" +", "operator"), ("@", "symbol"), ("_", "symbol"),
            (" привет", "Cyrillic"), ("λόγος", "Greek"), ("你好", "Han"), ("ひら", "Japanese kana"),
            ("한국", "Hangul"), ("سلام", "Arabic"), ("שלום", "Hebrew"), ("नमस्ते", "Devanagari"),
            ("ไทย", "Thai"), ("ქართ", "other script"), ("été", "lower case"),
            ("ß", "single letter"), ("x1y2z", "lower case"), ("٣", "digits"), ("", "spaces"),
        ],
    )  # fmt: skip
    def test_class_of_a_text(self, text: str, name: str) -> None:
        assert class_of(text.encode()) == name

    def test_part_of_a_character_and_special(self) -> None:
        assert class_of("你".encode()[:2]) == "part of a character"
        texts = TokenTexts({0: b"a", 1: b"\xe4\xbd"}, {2: "<|end|>"})
        routes = replace(routes_of([["a", "b", "c"]]), texts=texts)
        assert ["special tokens" in kinds for kinds in kinds_of(routes)] == [False, False, True]
        assert "parts of characters" in kinds_of(routes)[1]
        unknown = replace(routes, token_ids=np.array([0, 1, 99], dtype=np.int32))
        assert kinds_of(unknown)[2] >= {"symbols"}

    def test_json(self) -> None:
        tokens = ['{"', "id", '":', " ", "12", ",", ' "', "na", "me", '"', ": ", '"', "Bo", '"}']
        found = kinds_of(routes_of([tokens]))
        of = {name: [t for t, kinds in zip(tokens, found, strict=True) if name in kinds]
              for name in ("JSON keys", "quoted text", "word pieces", "digits")}  # fmt: skip
        assert of["JSON keys"] == ["id", "na", "me"]
        assert of["quoted text"] == ["Bo"]
        assert of["word pieces"] == ["me"] and of["digits"] == ["12"]

    def test_a_quote_does_not_reach_into_the_next_line_or_prompt(self) -> None:
        found = kinds_of(routes_of([["5", '"', " tall", "\n", "no"], ["no"]]))
        assert ["quoted text" in kinds for kinds in found] == [False, False, True] + [False] * 3

    def test_tags(self) -> None:
        tokens = ["a", " <", " b", "</", "p", ">", "hi", "<", "br", "/>", "if", " <", "3", "<b"]
        found = kinds_of(routes_of([tokens, ["after"]]))
        inside = [token for token, kinds in zip([*tokens, "x"], found, strict=True)
                  if "tags" in kinds]  # fmt: skip
        assert inside == ["</", "p", "<", "br", "<b"]

    def test_indentation_and_position(self) -> None:
        tokens = ["  ", "if", " ", "x", ":\n", "    ", "y", "\n  ", "z"] + ["w"] * 11
        found = kinds_of(routes_of([tokens, ["  "]]))
        indented = [place for place, kinds in enumerate(found) if "indentation" in kinds]
        assert indented == [0, 5, 7, len(tokens)]
        assert ["first token" in kinds for kinds in found].count(True) == 2
        start = [place for place, kinds in enumerate(found) if "start of the prompt" in kinds]
        assert start == [*range(8), len(tokens)]
        end = [place for place, kinds in enumerate(found) if "end of the prompt" in kinds]
        assert end == [15, 16, 17, 18, 19]

    def test_every_kind_is_defined_and_named_once(self) -> None:
        names = [kind.name for kind in KINDS]
        assert len(set(names)) == len(names)
        assert all(kind.definition and set(kind.classes) <= set(COLUMNS) for kind in KINDS)
        assert {kind.role for kind in KINDS} <= set(ROLES)


def entropy(share: float) -> float:
    return -sum(p * math.log2(p) for p in (share, 1 - share) if p > 0)


def by_loops(routes: Routes, labels: Sequence[str | None]) -> dict[tuple[str, int, int], Any]:
    """(topic, place, expert) -> rate, lift, purity, focus, reach, own lift, explained."""
    found: dict[tuple[str, int, int], Any] = {}
    kinds = kinds_of(routes)
    classes = columns(routes, TokenTable.of(routes.texts))[0].tolist()
    of_token = [labels[prompt] for prompt in routes.prompt]
    everyone = range(len(routes))
    there = sorted({label for label in of_token if label is not None})
    for place, layer in enumerate(routes.expert_ids):
        chosen = [set(row.tolist()) - {NO_EXPERT} for row in layer]
        even = sum(map(len, chosen)) / len(routes) / routes.router_width
        for expert in range(routes.router_width):
            takes = [expert in each for each in chosen]

            def rate(tokens: list[int], takes: list[bool] = takes) -> float:
                return sum(takes[token] for token in tokens) / len(tokens)

            rates = {D: rate([t for t in everyone if of_token[t] == D]) for D in there}
            for label in there:
                own = [t for t in everyone if of_token[t] == label]
                expected = 0.0
                for each in {classes[t] for t in own}:
                    share = {
                        D: sum(of_token[t] == D and classes[t] == each for t in everyone)
                        / of_token.count(D)
                        for D in there
                    }
                    taken = {
                        D: sum(of_token[t] == D and classes[t] == each and takes[t]
                               for t in everyone) / of_token.count(D)
                        for D in there
                    }  # fmt: skip
                    expected += share[label] * sum(taken.values()) / sum(share.values())
                mean = sum(rates.values()) / len(there)
                found[label, place, expert] = numbers(
                    rates[label], mean, 1 / len(there), even,
                    rates[label] / expected if expected else math.nan,
                )  # fmt: skip
            share = rate(list(everyone))
            for kind in KINDS:
                own = [t for t in everyone if kind.name in kinds[t]]
                if own:
                    found[kind.name, place, expert] = numbers(
                        rate(own), share, len(own) / len(routes), even, math.nan
                    )
    return found


def numbers(rate: float, share: float, base: float, even: float, own: float) -> list[float]:
    lift = rate / share if share else math.nan
    purity = lift * base
    focus = (purity - base) / (1 - base) if base < 1 else 0.0 * lift
    explained = 0.0
    if lift > 1 and 0 < share < 1 and base < 1:
        rest = (share - base * rate) / (1 - base)
        left = base * entropy(rate) + (1 - base) * entropy(rest)
        explained = 1 - left / entropy(share)
    reach = rate * (1 - even) / (max(1 - rate, 1e-6) * even)
    return [rate, lift, purity, focus, reach, own, explained]


@settings(
    max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    seed=st.integers(0, 999),
    lengths=st.lists(st.integers(0, 9), min_size=1, max_size=8).filter(lambda n: max(n) > 0),
    uneven=st.booleans(),
    k=st.sampled_from([2, 4]),
)
def test_measures_against_counting(
    tmp_path_factory: pytest.TempPathFactory, seed: int, lengths: list[int], uneven: bool, k: int
) -> None:
    """Width 4, so that k = 4 is every expert; labels of none, of empty prompts, of few tokens."""
    routes = random_routes(seed, lengths=tuple(lengths), uneven=uneven, k=k, width=4)
    labels = [("a", "b", None)[(seed + place) % 3] for place in range(len(lengths))]
    found = name_experts(trace_of(tmp_path_factory.mktemp("run"), routes, labels), clusters=2)
    expected = by_loops(routes, labels)
    measured = found.evidence.measures
    for (topic, place, expert), values in expected.items():
        row = found.evidence.names.index(topic)
        names = ("rate", "lift", "purity", "focus", "reach", "own_lift", "explained")
        actual = [getattr(measured, name)[row, place, expert] for name in names]
        np.testing.assert_allclose(actual, values, atol=1e-6, err_msg=f"{topic} {place}:{expert}")
    for card in found.cards:
        layer = routes.expert_ids[routes.layers.index(card.layer)]
        assert card.tokens == int((layer == card.expert).any(axis=1).sum())
    json.dumps(found.to_dict(), allow_nan=False)
    assert found._repr_html_()


WORDS = (" the", " of", "and", "ing", "7", "42", " 3", "(", ")", ",", ".", "\n", " Привет", " мир",
         " Anna", "x")  # fmt: skip


def planted(seed: int = 0, *, wins: bool = True) -> tuple[Routes, list[str]]:
    """40 prompts of 100 tokens, two labels, 8 experts, k = 2; with `wins`, four are for something.

    Expert 0 takes digits, 1 Cyrillic, 2 everything of label *a* that nobody else claims, nearly
    always, 3 the start of the prompt. What is left is random among 4 to 7.
    """
    random = np.random.default_rng(seed)
    prompts = [random.choice(WORDS, 100).tolist() for _ in range(40)]
    labels = ["ab"[place % 2] for place in range(40)]
    routes = routes_of(prompts, experts=8, k=2)
    ids = np.stack([random.permutation([4, 5, 6, 7])[:2] for _ in range(4000)])
    if not wins:
        ids = np.stack([random.permutation(8)[:2] for _ in range(4000)])
    words = [word for prompt in prompts for word in prompt]
    for place, word in enumerate(words) if wins else ():
        if routes.position[place] < 8:
            ids[place, 0] = 3
        elif word.strip().isdigit():
            ids[place, 0] = 0
        elif word in (" Привет", " мир"):
            ids[place, 0] = 1
        elif labels[place // 100] == "a" and random.random() < 0.95:
            ids[place, 0] = 2
    return replace(routes, expert_ids=ids[None].astype(np.uint16)), labels


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Taxonomy:
    """Of the planted experts."""
    folder = tmp_path_factory.mktemp("planted") / "run"
    return name_experts(trace_of(folder, *planted(), shard_tokens=700))


class TestPlanted:
    def test_names_and_roles(self, found: Taxonomy) -> None:
        told = [(card.name, card.role) for card in found.cards]
        assert told[0] == ("digits", "syntax")
        assert told[1] == ("Cyrillic", "specialist")
        assert told[2] == ("a", "specialist") or told[2][0].startswith("a · ")
        assert told[2][1] == "specialist"
        assert told[3] == ("start of the prompt", "positional")
        assert {role for _, role in told[4:]} == {"generalist"}
        assert found.names[0, 1] == "Cyrillic" and len(found.names) == 8
        assert all(card.confidence > 0.95 for card in found.cards[:4])

    def test_evidence_of_the_digits(self, found: Taxonomy) -> None:
        best = found.card(0, 0).evidence[0]
        assert (best.name, best.source, best.purity) == ("digits", "kind", 1.0)
        assert best.low <= best.lift <= best.high and best.q < 1e-3
        assert {token.text for token in found.card(0, 0).typical} == {"7", "42", "␣3"}
        for token in found.card(0, 0).typical:
            assert token.lift == pytest.approx(4000 / found.card(0, 0).tokens * token.share)

    def test_examples_went_to_the_expert(self, found: Taxonomy) -> None:
        routes, _ = planted()
        visible = routes.visible_tokens()
        for card in found.cards:
            assert len(card.examples) == 8 == len({each.prompt for each in card.examples})
            for each in card.examples:
                row = 100 * each.prompt + each.position
                assert card.expert in routes.expert_ids[0, row]
                assert each.token == visible[row]
                begin, end = 100 * each.prompt, 100 * each.prompt + 100
                assert each.before == "".join(visible[max(begin, row - 8) : row])
                assert each.after == "".join(visible[row + 1 : min(end, row + 9)])
                assert f"«{each.token}»" in each.marked

    def test_select(self, found: Taxonomy) -> None:
        some = found.select(role="specialist", sort="share")
        assert [card.expert for card in some.cards] == [2, 1] and not some.complete
        assert [card.expert for card in found.select(name="DIG").cards] == [0]
        by_lift = [card.lift for card in found.select(sort="lift").cards]
        assert by_lift == sorted(by_lift, reverse=True)
        assert found.select(role="rarely used").findings() == ["No expert is of that kind."]
        for wrong in ({"role": "boss"}, {"sort": "size"}, {"layer": 3}):
            with pytest.raises(UsageError):
                found.select(**wrong)
        with pytest.raises(UsageError, match="0 to 7"):
            found.card(0, 8)
        with pytest.raises(UsageError, match="selected"):
            some.card(0, 7)

    def test_page(self, found: Taxonomy) -> None:
        page = found.page(0, 1)
        assert page.title == "Layer 0, expert 1: Cyrillic"
        assert [each.name for each in page.labels] in (["a", "b"], ["b", "a"])
        assert page.kinds[0].name == "Cyrillic" and "script" in page.meanings["Cyrillic"]
        heads = [table.title for table in page.tables()]
        assert heads == ["Typical tokens", "Examples", "Labels", "Kinds of token"]
        assert json.loads(page.to_json())["card"]["name"] == "Cyrillic"

    def test_does_not_depend_on_shards(self, found: Taxonomy, tmp_path: Path) -> None:
        again = name_experts(trace_of(tmp_path / "run", *planted(), shard_tokens=4000))
        assert again.to_json() == found.to_json()

    def test_higher_thresholds_name_fewer(self, tmp_path: Path) -> None:
        trace = trace_of(tmp_path / "run", *planted())
        strict = name_experts(trace, thresholds=Thresholds(reach=10))
        assert [card.topic for card in strict.cards[:4]] == [
            "digits", "Cyrillic", None, "start of the prompt"
        ]  # fmt: skip
        assert not any(card.topic for card in name_experts(
            trace, thresholds=Thresholds(false_share=0.0)).cards)  # fmt: skip

    def test_without_labels(self, tmp_path: Path) -> None:
        routes, _ = planted()
        found = name_experts(trace_of(tmp_path / "run", routes), clusters=4)
        assert [found.names[0, each] for each in (0, 1, 3)] == [
            "digits", "Cyrillic", "start of the prompt"
        ]  # fmt: skip
        assert found.labels == () and "no labels" in " ".join(found.findings())
        digits = next(group for group in found.clusters if "42" in group.texts)
        assert set(digits.texts) == {"7", "42", "␣3"}
        assert sum(len(group.token_ids) for group in found.clusters) == len(WORDS)
        assert found.card(0, 0).cluster == digits.name
        assert found.tables()[-1].title.startswith("Groups")


class TestChance:
    @pytest.mark.parametrize("seed", range(4))
    def test_random_routes_have_no_names(self, tmp_path: Path, seed: int) -> None:
        found = name_experts(trace_of(tmp_path / "run", *planted(seed, wins=False)))
        assert all(card.topic is None for card in found.cards)
        assert np.nanmean(found.evidence.q <= 0.05) < 0.02  # few by chance

    def test_a_kind_is_not_claimed_for_what_a_label_does(self, tmp_path: Path) -> None:
        """Label b has more digits and expert 0: not because of the digits, inside prompts."""
        random = np.random.default_rng(0)
        prompts = [random.choice(["7", " the"], 100, p=[p, 1 - p]).tolist()
                   for p in [0.1, 0.9] * 30]  # fmt: skip
        routes = routes_of(prompts)
        label = routes.prompt % 2
        first = np.where(random.random(6000) < np.where(label, 0.9, 0.1), 0, 1)
        routes = replace(routes, expert_ids=first[None, :, None].astype(np.uint16))
        found = name_experts(trace_of(tmp_path / "run", routes, ["a", "b"] * 30, shard_tokens=6000))
        digits = found.evidence.names.index("digits")
        assert found.evidence.measures.lift[digits, 0, 0] > 1.5
        assert found.evidence.q[digits, 0, 0] > 0.05
        assert found.evidence.q[found.evidence.names.index("b"), 0, 0] < 0.01

    def test_too_little_data_is_said(self, tmp_path: Path) -> None:
        found = name_experts(
            trace_of(tmp_path / "run", random_routes(lengths=(20, 20)), ["a", "b"])
        )
        assert {card.role for card in found.cards} == {"too little data"}
        card = found.cards[0]
        assert card.name == f"too little data ({card.tokens} tokens)"
        assert card.topic is None and math.isnan(card.confidence) and not card.evidence
        assert "24 experts received fewer than 50 tokens" in " ".join(found.findings())

    def test_rarely_used(self, tmp_path: Path) -> None:
        routes, labels = planted(wins=False)
        routes = replace(routes, expert_ids=np.where(routes.expert_ids == 7, 6, routes.expert_ids))
        found = name_experts(trace_of(tmp_path / "run", routes, labels))
        assert found.card(0, 7).role == "rarely used" and found.card(0, 7).tokens == 0

    def test_one_prompt_one_expert(self, tmp_path: Path) -> None:
        routes = random_routes(lengths=(300,), layers=(5,), width=2, k=2)
        found = name_experts(trace_of(tmp_path / "run", routes, ["only"], shard_tokens=300))
        assert [card.role for card in found.cards] == ["generalist"] * 2
        assert all(math.isnan(card.confidence) for card in found.cards)


@pytest.fixture(scope="module")
def named(demo_run: Trace) -> Taxonomy:
    """Of the bundled model."""
    return name_experts(demo_run)


class TestDemo:
    """The bundled model, whose domains are known."""

    def test_specialists_prefer_their_domain_on_other_text(
        self, named: Taxonomy, tmp_path: Path
    ) -> None:
        """Precision: share of specialists whose domain has the highest rate on held-out prompts."""
        with ExpertRouter.from_pretrained("demo", cpu_experts="auto") as router:
            dequantize_model(router.model)  # several times faster on a CPU, and the same routing
            held = name_experts(router.trace("demo:evaluation", tmp_path / "r", sample_size=48))
        special = named.select(role="specialist").cards
        assert len(special) >= 10
        assert {card.topic for card in special} >= {"html", "json", "code", "prose"}
        right = 0
        for card in special:
            place = named.layers.index(card.layer)
            rates = held.evidence.measures.rate[: len(held.labels), place, card.expert]
            right += held.labels[int(rates.argmax())] == card.topic
        assert right == len(special)

    @pytest.mark.parametrize("seed", [100])
    def test_random_routers_have_no_specialists(self, tmp_path: Path, seed: int) -> None:
        with ExpertRouter.from_pretrained("demo", cpu_experts="auto") as router:
            dequantize_model(router.model)
            mx.random.seed(seed)
            for layer in router.info.moe_layers:
                gate = router.model.layers[layer].mlp.gate
                gate.weight = 0.1 * mx.random.normal(gate.weight.shape)
            found = name_experts(router.trace("demo", tmp_path / "run", sample_size=96))
        assert not found.select(role="specialist").cards
        # It is not for lack of data or of significance.
        assert (found.evidence.q[: len(found.labels)] < 0.01).mean() > 0.2
        assert {card.role for card in found.cards} & {"generalist"}

    def test_command(
        self, named: Taxonomy, demo_run: Trace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        run, picture = str(demo_run.path), tmp_path / "e.png"
        assert cli.main(["experts", run, "--json", "-o", str(picture)]) == 0
        shown = json.loads(capsys.readouterr().out)
        assert shown["kind"] == "experts" and picture.stat().st_size
        assert [card["name"] for card in shown["cards"]] == [card.name for card in named.cards]
        assert cli.main(["experts", run, "--role", "specialist", "--sort", "lift"]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert sum(" specialist " in line for line in lines[3:]) == len(
            named.select(role="specialist").cards
        )
        assert cli.main(["experts", run, "--expert", "2:6"]) == 0
        assert "«" in capsys.readouterr().out
        for wrong, said in (
            (["--expert", "0:1"], "layer 0 has no routed experts"),
            (["--expert", "1:99"], "experts 0 to 15"),
            (["--expert", "one"], "LAYER:EXPERT"),
            (["--expert", "1:1", "--layer", "1"], "leave out"),
            (["--layer", "9"], "the MoE layers are 1, 2, 3"),
        ):
            assert cli.main(["experts", run, *wrong]) == 2
            assert said in capsys.readouterr().err


def test_options_are_those_of_the_analysis() -> None:
    """The command writes them out, so that its help needs no heavy import."""
    assert inspect.signature(command.experts).parameters["min_focus"].default == Thresholds().focus
    assert [role.replace("-", " ") for role in command.Role] == list(ROLES)
    assert tuple(command.Sort) == SORTS


def larger(found: Taxonomy, layers: int, width: int) -> Taxonomy:
    """The same experts again and again, for pictures and tables of large models."""
    many = [
        replace(found.cards[(layer * width + expert) % len(found.cards)], layer=layer,
                expert=expert)
        for layer in range(layers)
        for expert in range(width)
    ]  # fmt: skip
    return replace(found, layers=tuple(range(layers)), router_width=width, cards=tuple(many))


@pytest.mark.parametrize(("layers", "width"), [(1, 8), (4, 16), (48, 128)])
@pytest.mark.parametrize("style", ["light", "dark"])
def test_pictures(found: Taxonomy, tmp_path: Path, layers: int, width: int, style: str) -> None:
    shown = larger(found, layers, width)
    figure = draw_experts(shown, style=style, subtitle="$m$")
    figure.draw_without_rendering()
    axes = figure.axes[0]
    texts = " ".join(text.get_text() for text in axes.texts)
    legend = " ".join(text.get_text() for text in axes.get_legend().get_texts())
    assert ("Cyrillic" in texts) == (width <= 16)
    assert ("Cyrillic" in legend) == (width > 16)
    limits = figure.bbox
    for text in axes.texts:
        box = text.get_window_extent()
        assert limits.x0 <= box.x0 and box.x1 <= limits.x1
    if layers == 1:
        one = save_picture(draw_experts, shown, tmp_path / "one.svg", style=style)
        two = save_picture(draw_experts, shown, tmp_path / "two.svg", style=style)
        assert one.read_bytes() == two.read_bytes()


def test_many_experts_are_summarised(found: Taxonomy) -> None:
    large = larger(found, 48, 128)
    (table,) = large.tables()
    assert len(table.rows) == 48 and table.columns[0] == "layer"
    assert sum(table.rows[0][1 : 1 + 4]) == 128  # type: ignore[arg-type]
    assert "--layer" in large.findings()[-1]
    assert len(large.select(layer=3).tables()[0].rows) == 128


def test_a_damaged_shard_is_refused(tmp_path: Path) -> None:
    trace = trace_of(tmp_path / "run", *planted())
    shard = trace.path / trace.entries[0].file
    shard.write_bytes(b"\xff" * trace.entries[0].bytes)
    with pytest.raises(MoeLensError, match="is damaged"):
        name_experts(trace)
