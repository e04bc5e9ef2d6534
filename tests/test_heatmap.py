"""Heat maps: the numbers, the terminal at every width with and without colour, the pictures."""

from __future__ import annotations

import io
import json
import re
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import matplotlib.image
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.cells import cell_len
from rich.console import Console
from rich.style import Style

from moe_lens.analysis.heatmap import (
    FirstChoice,
    Heatmap,
    LayerExpert,
    TokenExpert,
    first_choice,
    layer_expert,
    token_expert,
)
from moe_lens.errors import CaptureError, UsageError
from moe_lens.figures.colors import contrast, readable_on, scale_color, tag_color
from moe_lens.figures.fonts import drawable
from moe_lens.figures.heatmap import draw_heatmap, save_heatmap
from moe_lens.figures.terminal import Cells, TerminalHeatmap
from moe_lens.profile import Profile
from moe_lens.trace import NO_EXPERT, Routes
from route_cases import random_routes

PROMPT = random_routes(lengths=(11,), width=16)
BIG = random_routes(lengths=(6,), width=64, k=8, layers=tuple(range(30)))
UNEVEN = random_routes(lengths=(11,), uneven=True)


def all_kinds(routes: Routes = PROMPT) -> list[Heatmap]:
    return [token_expert(routes, 2), layer_expert(routes), first_choice(routes)]


class TestNumbers:
    def test_token_expert(self) -> None:
        found = token_expert(UNEVEN, 1)
        assert found.weights.shape == (11, 8) and found.layer == 1
        for token in range(11):
            for slot in range(2):
                expert = int(UNEVEN.expert_ids[0, token, slot])
                if expert != NO_EXPERT:
                    assert found.weights[token, expert] == UNEVEN.expert_weights[0, token, slot]
        assert (~np.isnan(found.weights)).sum(axis=1).tolist() == [1] * 11
        assert "1 of 8 experts per token" in found.definition

    def test_only_used(self) -> None:
        found = token_expert(BIG, 5, only_used=True)
        assert set(found.experts) == set(BIG.expert_ids[5].ravel().tolist())
        assert found.num_experts == 64 and not np.isnan(found.weights).all(axis=0).any()

    def test_layer_expert_of_every_source(self, tmp_path: Path) -> None:
        routes = random_routes(lengths=(4, 6, 5))
        labels = ["a", "b", "a"]
        profile = Profile.from_routes(routes, labels)
        one, two = layer_expert(routes), layer_expert(profile)
        expected = 100 * profile.counts / 15
        np.testing.assert_allclose(one.share, expected)
        np.testing.assert_allclose(two.share, expected)
        assert one.num_prompts == two.num_prompts == 3
        np.testing.assert_allclose(one.uniform, 25.0)
        only = layer_expert(profile, label="a")
        assert (only.num_tokens, only.num_prompts, only.label) == (9, 2, "a")
        np.testing.assert_allclose(only.share.sum(axis=1), 200.0)

    def test_uniform_where_layers_differ_in_k(self) -> None:
        found = layer_expert(UNEVEN)
        np.testing.assert_allclose(found.uniform, [12.5, 25.0, 25.0])
        assert "12.5 %, 25 %" in found.definition

    def test_first_choice(self) -> None:
        found = first_choice(PROMPT, start=3, stop=6)
        assert np.array_equal(found.experts, PROMPT.expert_ids[:, 3:6, 0])
        assert found.first_position == 3 and len(found.tokens) == 3

    def test_refusals(self) -> None:
        with pytest.raises(UsageError, match="layer 0 has no routed experts"):
            token_expert(PROMPT, 0)
        with pytest.raises(UsageError, match="the prompt has 11 tokens"):
            first_choice(PROMPT, start=11)
        with pytest.raises(UsageError, match="have no labels"):
            layer_expert(PROMPT, label="x")
        with pytest.raises(UsageError, match="the labels are a"):
            layer_expert(Profile.from_routes(PROMPT, ["a"]), label="x")
        with pytest.raises(CaptureError, match="no tokens"):
            layer_expert(PROMPT.rows(0, 0))

    def test_results_explain_themselves(self) -> None:
        for result in all_kinds():
            content = json.loads(result.to_json())
            assert content["kind"] == result.kind and content["definition"].startswith("Cell: ")
        assert json.loads(all_kinds()[0].to_json())["weights"][0].count(None) == 14

    def test_notebook_table_escapes_tokens(self) -> None:
        html = token_expert(PROMPT, 2)._repr_html_()
        assert "<a&b>" not in html and "&lt;a&amp;b&gt;" in html
        for result in all_kinds():
            ElementTree.fromstring(result._repr_html_().replace("<br>", "<br/>"))


def printed(result: Heatmap, width: int, cells: Cells = "auto", **options: Any) -> str:
    out = io.StringIO()
    Console(file=out, width=width, **options).print(TerminalHeatmap(result, cells=cells))
    return out.getvalue()


class TestTerminal:
    @settings(max_examples=25, deadline=None)
    @given(st.integers(24, 200), st.sampled_from(["auto", "values", "tenths"]))
    def test_no_line_is_wider_than_the_terminal_and_no_column_is_lost(
        self, width: int, cells: Cells
    ) -> None:
        for result in [*all_kinds(), *all_kinds(BIG)]:
            out = printed(result, width, cells)
            assert max(map(cell_len, out.splitlines())) <= width
            assert colored_cells(result, width, cells) == filled_cells(result)

    def test_values(self) -> None:
        result = replace(
            token_expert(PROMPT, 2, stop=1),
            tokens=("␣x",),
            experts=(0, 1, 2),
            num_experts=3,
            weights=np.array([[0.53, np.nan, 2.5]]),
        )
        lines = printed(result, 60).splitlines()
        assert lines[2].split()[-3:] == ["0", "1", "2"]
        assert lines[3].split() == ["0", "␣x", ".53", "·", "2.5"]

    def test_layer_by_expert_as_percent_and_as_tenths(self) -> None:
        result = replace(
            layer_expert(PROMPT),
            layers=(1, 2),
            share=np.array([[50.0, 12.5, 0.0], [24.9, 25.1, 3.0]]),
        )
        assert printed(result, 60).splitlines()[3].split() == ["layer", "1", "50", "12", "0"]
        tenths = printed(result, 80, "tenths")
        assert " expert 012\nlayer 1 920\nlayer 2 450\n" in tenths
        assert "tenths of the highest value, 50 %" in tenths

    def test_blocks_say_what_they_show(self) -> None:
        out = printed(layer_expert(BIG), 80, "values")
        spans = re.findall(r"experts (\d+)-(\d+) of 64", out)
        assert [int(first) for first, _ in spans] == [0, *(int(last) + 1 for _, last in spans[:-1])]
        assert spans[-1][1] == "63"
        layers = printed(first_choice(BIG), 60)
        assert "layers 0-" in layers and re.search(r"-29 \(\d+ to 30 of 30 shown\)", layers)

    def test_unused_experts_are_mentioned(self) -> None:
        result = token_expert(BIG, 5, only_used=True)
        assert f"{len(result.experts)} of 64 experts are shown" in printed(result, 100)

    @pytest.mark.parametrize("only_used", [False, True])
    def test_narrow_columns_have_upright_numbers(self, only_used: bool) -> None:
        result = token_expert(BIG, 5, only_used=only_used)
        tens, units, row = printed(result, 90, "tenths").splitlines()[2:5]
        start = len(row) - len(result.experts)
        columns = zip(tens[start:].ljust(len(units) - start), units[start:], strict=True)
        assert [int(ten + unit) for ten, unit in columns] == list(result.experts)
        shown = [row[start + place] != "·" for place in range(len(result.experts))]
        assert shown == (~np.isnan(result.weights[0])).tolist()

    def test_colour_only_adds(self) -> None:
        for result in all_kinds():
            plain = printed(result, 90)
            colored = printed(result, 90, force_terminal=True, color_system="truecolor")
            assert "\x1b[" not in plain and "48;2;" in colored
            assert re.sub(r"\x1b\[[0-9;]*m", "", colored) == plain

    def test_sixteen_colours_are_not_trusted(self) -> None:
        out = printed(all_kinds()[0], 90, force_terminal=True, color_system="standard")
        assert not re.search(r"\x1b\[[0-9;]*4[0-7]", out)

    def test_no_color(self) -> None:
        out = printed(
            all_kinds()[0], 90, force_terminal=True, color_system="truecolor", no_color=True
        )
        assert "48;2;" not in out

    def test_wide_and_long_tokens(self) -> None:
        result = replace(first_choice(PROMPT, stop=2), tokens=("你" * 30, "a" * 40))
        lines = printed(result, 60).splitlines()
        rows = [line for line in lines if "…" in line]
        assert len(rows) == 2 and len({cell_len(row) for row in rows}) == 1

    def test_too_narrow(self) -> None:
        with pytest.raises(UsageError, match="at least 24 columns"):
            list(TerminalHeatmap(all_kinds()[0]).lines(23, colored=False))


def colored_cells(result: Heatmap, width: int, cells: Cells) -> int:
    """Cells that a terminal with colours paints."""
    lines = TerminalHeatmap(result, cells=cells).lines(width, colored=True)
    styles = [span.style for line in lines for span in line.spans]
    return sum(isinstance(style, Style) and style.bgcolor is not None for style in styles)


def filled_cells(result: Heatmap) -> int:
    """Cells of a result that have a value."""
    if isinstance(result, TokenExpert):
        return int((~np.isnan(result.weights)).sum())
    return (result.share if isinstance(result, LayerExpert) else result.experts).size


class TestColours:
    def test_every_cell_is_readable(self) -> None:
        backgrounds = [scale_color(step / 200) for step in range(201)]
        backgrounds += [tag_color(expert) for expert in range(512)]
        assert min(contrast(readable_on(color), color) for color in backgrounds) >= 4.5

    def test_scale_grows_in_lightness(self) -> None:
        black = [contrast(scale_color(step / 50), (0, 0, 0)) for step in range(51)]
        assert black == sorted(black) and black[-1] > 10 * black[0]

    def test_neighbours_differ(self) -> None:
        for expert in range(255):
            one, two = np.array(tag_color(expert)), np.array(tag_color(expert + 1))
            assert np.abs(one - two).sum() > 90


class TestPictures:
    @pytest.mark.parametrize(
        ("kind", "style", "start"),
        [("png", "light", b"\x89PNG"), ("svg", "dark", b"<?xml"), ("pdf", "dark", b"%PDF")],
    )
    def test_the_same_result_gives_the_same_file(
        self, tmp_path: Path, kind: str, style: str, start: bytes
    ) -> None:
        result = first_choice(PROMPT)
        paths = [tmp_path / name / f"x.{kind}" for name in "ab"]
        written = [save_heatmap(result, path, style=style).read_bytes() for path in paths]
        assert written[0] == written[1] and written[0].startswith(start)
        assert [path.name for path in (tmp_path / "a").iterdir()] == [f"x.{kind}"]

    def test_slide_size(self, tmp_path: Path) -> None:
        for result in all_kinds():
            path = save_heatmap(result, tmp_path / "x.png", style="dark")
            assert matplotlib.image.imread(path).shape[1] == 1920

    def test_cells_have_the_colour_of_their_value(self) -> None:
        result = layer_expert(PROMPT)
        axes = draw_heatmap(result)[0].axes[0]
        assert np.array_equal(np.asarray(axes.images[0].get_array()), result.share)
        assert [float(text.get_text()) for text in axes.texts] == [
            pytest.approx(value, abs=0.051) for value in result.share.ravel()
        ]

    def test_labels(self) -> None:
        result = replace(token_expert(PROMPT, 2, stop=2), tokens=("$x$", "␣a_b^c"))
        figure = draw_heatmap(result)[0]
        labels = figure.axes[0].get_yticklabels()
        assert [label.get_text() for label in labels] == ["$x$", "␣a_b^c"]
        assert not any(label.get_parse_math() for label in labels)
        figure.savefig(io.BytesIO(), format="svg")

    def test_title_and_definition_stand_in_the_picture(self) -> None:
        for result in all_kinds():
            figure = draw_heatmap(result, subtitle="demo")[0]
            assert figure.get_suptitle() == f"{result.title} · demo"
            assert figure.axes[0].get_title("left").replace("\n", " ") == result.definition

    @pytest.mark.parametrize("experts", [16, 100, 128, 512])
    def test_expert_numbers_do_not_collide(self, experts: int) -> None:
        share = np.ones((2, experts))
        result = LayerExpert("Cell: x.", (0, 1), share, share[:, 0], 1, 1, None)
        figure = draw_heatmap(result)[0]
        figure.draw_without_rendering()
        boxes = [label.get_window_extent() for label in figure.axes[0].get_xticklabels()]
        assert all(a.x1 < b.x0 for a, b in pairwise(boxes))

    def test_long_prompts_get_pages(self, tmp_path: Path) -> None:
        long = random_routes(lengths=(150,))
        rows = token_expert(long, 1)
        with pytest.raises(UsageError, match=r"150 tokens do not fit .* 50 of them .* 3 pages"):
            save_heatmap(rows, tmp_path / "x.png")
        assert not list(tmp_path.iterdir())
        pages = save_heatmap(rows, tmp_path / "x.pdf").read_bytes()
        assert len(re.findall(rb"/Type /Page\b", pages)) == 3

    @pytest.mark.parametrize(
        ("tokens", "experts", "panels"), [(32, 8, 1), (33, 8, 2), (64, 32, 2), (64, 64, 1)]
    )
    def test_many_tokens_stand_in_two_columns(self, tokens: int, experts: int, panels: int) -> None:
        routes = random_routes(lengths=(tokens,), width=experts)
        (figure,) = draw_heatmap(token_expert(routes, 1))
        *shown, _color_bar = figure.axes
        labels = [label.get_text() for axes in shown for label in axes.get_yticklabels()]
        assert len(shown) == panels and labels == list(map(drawable, routes.visible_tokens()))

    def test_a_long_prompt_wraps_into_panels(self) -> None:
        routes = random_routes(lengths=(100,))
        (figure,) = draw_heatmap(first_choice(routes))
        labels = [label.get_text() for axes in figure.axes for label in axes.get_xticklabels()]
        assert len(figure.axes) == 3 and labels == list(map(drawable, routes.visible_tokens()))

    def test_bad_wishes(self, tmp_path: Path) -> None:
        result = all_kinds()[0]
        with pytest.raises(UsageError, match=r"not '\.gif'; name the file x\.png"):
            save_heatmap(result, tmp_path / "x.gif")
        with pytest.raises(UsageError, match="light, dark"):
            save_heatmap(result, tmp_path / "x.png", style="pink")

    def test_characters_without_a_font_are_written_out(self) -> None:
        assert drawable("␣é↵") == "␣é↵"
        assert drawable("\U000f0000") == "<U+F0000>"
        assert drawable("a" * 30) == "a" * 17 + "…"


def test_an_empty_slot_is_no_expert() -> None:
    routes = replace(UNEVEN, expert_ids=np.full_like(UNEVEN.expert_ids, NO_EXPERT))
    result = first_choice(routes)
    assert isinstance(result, FirstChoice) and (result.experts == -1).all()
    assert "·" in printed(result, 60)
    draw_heatmap(result)
    draw_heatmap(token_expert(routes, 1))
