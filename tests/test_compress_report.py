"""What lies beside the weights: report.json, the model card, pictures, commands; and the upload."""

from __future__ import annotations

import inspect
import json
import re
import shlex
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from huggingface_hub import HfApi
from huggingface_hub.errors import LocalTokenNotFoundError
from matplotlib.figure import Figure
from mlx_lm import generate
from mlx_lm.utils import load
from PIL import Image
from scipy.cluster.hierarchy import linkage
from scipy.spatial.distance import squareform

from moe_lens.cli import main
from moe_lens.compress import (
    CompressionResult,
    ExpertGroup,
    LayerPlan,
    Plan,
    calibrate,
    compress,
    read_plan,
    similarity,
    upload,
    write,
)
from moe_lens.compress.choice.asked import Asked
from moe_lens.compress.merging.merging import Merging
from moe_lens.compress.report.commands import Texts, commands
from moe_lens.corpus import read_corpus
from moe_lens.errors import MoeLensError, UsageError
from moe_lens.figures.choice import draw_choice
from moe_lens.figures.merge_tree import draw_merge_tree, save_merge_tree
from moe_lens.figures.plan import KEPT, draw_plan, save_plan
from moe_lens.figures.saliency import draw_saliency, save_saliency
from moe_lens.router import ExpertRouter
from twins import save_twins, write_words

LIGHT = 240


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    save_twins(folder / "the twins")
    write_words(folder / "learn.jsonl", 18, 1, words=16)
    write_words(folder / "it's a test.jsonl", 8, 2, words=16)
    return folder


def run(place: Path, output: str, **options: Any) -> CompressionResult:
    return compress(
        place / "the twins",
        output=place / output,
        calibration=place / "learn.jsonl",
        evaluation=place / "it's a test.jsonl",
        **options,
    )


@pytest.fixture(scope="module")
def merged(place: Path) -> CompressionResult:
    return run(place, "merged", threshold=0.8)


@pytest.fixture(scope="module")
def pruned(place: Path) -> CompressionResult:
    return run(place, "pruned", ratio=0.25, method="gated-sum", seed=3)


@pytest.fixture(scope="module")
def chosen(place: Path) -> CompressionResult:
    return run(place, "chosen", ratio=0.25)


def stored(result: CompressionResult) -> dict[str, Any]:
    assert result.output is not None
    found: dict[str, Any] = json.loads((result.output / "report.json").read_text())
    return found


def card(result: CompressionResult) -> str:
    assert result.output is not None
    return (result.output / "README.md").read_text(encoding="utf-8")


# The report ---------------------------------------------------------------------------------


def test_the_report_holds_everything_once(merged: CompressionResult) -> None:
    found = stored(merged)
    plan = merged.plan
    assert found["format"] == "moe-lens report"
    assert found["summary"] == plan.summary()
    assert found["parent"] == plan.model.to_dict()
    assert found["calibration"]["text"] == plan.corpus.to_dict()
    assert found["choice"] is None
    assert merged.verification is not None
    assert found["verification"] == json.loads(merged.verification.to_json())
    assert found["notes"] == list(merged.notes)
    assert found["plan"]["num_experts"] == 8
    assert found["plan"]["settings"] == plan.settings
    groups = found["plan"]["layers"][0]["groups"]
    assert [group["experts"] for group in groups] == [[e, e + 8] for e in range(8)]
    assert merged.output is not None
    names = {path.name for path in merged.output.iterdir()}
    assert {"report.json", "plan.json", "README.md", "pictures"} <= names
    assert "verification.json" not in names


def test_what_only_applying_needs_stands_in_the_plan_alone(merged: CompressionResult) -> None:
    assert merged.output is not None
    recipe, report = (merged.output / "plan.json").read_text(), json.dumps(stored(merged))
    for word in ("router_row", "calibration_prompts"):
        assert f'"{word}"' in recipe
        assert f'"{word}"' not in report.replace('"router_rows"', "")
    assert len(report) < len(recipe)


def test_the_choice_is_in_the_report(chosen: CompressionResult) -> None:
    found = stored(chosen)
    assert found["choice"] == json.loads(json.dumps(chosen.plan.evidence["choice"]))
    assert "choice" not in found["plan"]["evidence"]
    assert {"random", "reap"} <= {trial["method"] for trial in found["choice"]["trials"]}


def test_a_plan_that_was_only_written_has_a_report_too(
    pruned: CompressionResult, place: Path, tmp_path: Path
) -> None:
    again = write(pruned.plan, place / "the twins", tmp_path / "again")
    found = json.loads((again / "report.json").read_text())
    assert found["verification"] is None
    assert found["commands"]["verify"] is None
    assert found["commands"]["compress"] is None
    assert found["commands"]["plan"].startswith("moe-lens compress 'the twins' --plan plan.json")
    assert "Nothing was measured yet" in (again / "README.md").read_text()


def test_stock_mlx_lm_loads_a_folder_with_all_of_it(chosen: CompressionResult) -> None:
    model, tokenizer = load(str(chosen.output))
    assert isinstance(generate(model, tokenizer, "w1 w2 w3", max_tokens=2), str)


def test_a_smaller_model_does_not_inherit_what_is_true_of_its_parent(
    pruned: CompressionResult, place: Path, tmp_path: Path
) -> None:
    assert pruned.output is not None
    found = compress(
        pruned.output,
        experts=8,
        method="frequency",
        output=tmp_path / "less",
        calibration=place / "learn.jsonl",
        evaluation=place / "it's a test.jsonl",
    )
    assert stored(found)["parent"]["num_experts"] == 12
    assert "8 of 12 experts" in card(found)


# Commands -----------------------------------------------------------------------------------


def test_commands_say_what_was_asked_and_no_more(
    merged: CompressionResult, pruned: CompressionResult
) -> None:
    texts = "--data learn.jsonl --eval-data 'it'\"'\"'s a test.jsonl'"
    assert stored(merged)["commands"] == {
        "plan": f"moe-lens compress 'the twins' --plan plan.json {texts} --output ../merged-again",
        "compress": f"moe-lens compress 'the twins' --threshold 0.8 {texts} --output merged-again",
        "verify": "moe-lens verify 'the twins' . --eval-data 'it'\"'\"'s a test.jsonl'",
    }
    assert stored(pruned)["commands"]["compress"] == (
        "moe-lens compress 'the twins' --ratio 0.25 --method gated-sum "
        f"{texts} --seed 3 --output pruned-again"
    )
    for line in stored(pruned)["commands"].values():
        assert f"```bash\n{line}\n```" in card(pruned)
    assert "put yours in its place" in card(pruned)


def test_a_text_without_a_name_cannot_be_named(place: Path, tmp_path: Path) -> None:
    found = compress(
        place / "the twins",
        ratio=0.5,
        method="frequency",
        output=tmp_path / "small",
        calibration=read_corpus(place / "learn.jsonl"),
        evaluation=place / "it's a test.jsonl",
    )
    lines = stored(found)["commands"]
    assert lines["compress"] is None
    assert "--data" not in shlex.split(lines["plan"])
    assert "it's a test.jsonl" in shlex.split(lines["verify"])


def test_every_argument_is_an_option_or_changes_nothing() -> None:
    """A new argument of `compress` must find its way into the commands."""
    arguments = set(inspect.signature(compress).parameters)
    asked = {field.name for field in fields(Asked)} - {"repair_steps"} | {"repair_router"}
    read = {field.name for field in fields(Texts)}
    apart = {"name", "output", "format", "trust_remote_code", "revision"}
    no_effect = {"max_kl", "dry_run", "force", "resume", "stream", "progress", "say"}
    assert arguments == asked | read | apart | no_effect


def test_every_option_of_the_commands_exists(
    pruned: CompressionResult, capfd: pytest.CaptureFixture[str]
) -> None:
    everything = {field.name: 1 for field in fields(Asked)} | {"plan": None, "merging": Merging()}
    texts = Texts("a", "b", 1, 2, True, 3, "stock")
    defaults = {"sample_size": 128, "sequence_length": 512, "seed": 0, "cpu_experts": "auto"}
    found = commands(
        pruned.plan, "small", Asked(**everything), texts, defaults, trust_remote_code=True
    )
    assert main(["compress", "--help"]) == 0
    known = set(re.findall(r"--[a-z-]+", capfd.readouterr().out))
    assert found.compress is not None
    options = [word for word in found.compress if word.startswith("--")]
    assert set(options) <= known
    # All but the plan and the statistics; a merge has five, both texts and their reading nine.
    assert len(options) == len(fields(Asked)) - 3 + 5 + 9


# Pictures -----------------------------------------------------------------------------------


def pictures(result: CompressionResult) -> dict[str, Path]:
    assert result.output is not None
    found = {each["file"]: result.output / each["file"] for each in stored(result)["pictures"]}
    assert set(found.values()) == set((result.output / "pictures").iterdir())
    return found


def test_each_plan_has_the_pictures_it_has_something_for(
    merged: CompressionResult, pruned: CompressionResult, chosen: CompressionResult
) -> None:
    assert set(pictures(merged)) == {"pictures/plan.png", "pictures/dendrogram.png"}
    assert set(pictures(pruned)) == {"pictures/plan.png", "pictures/saliency.png"}
    assert {"pictures/plan.png", "pictures/methods.png"} <= set(pictures(chosen))
    for result in (merged, pruned, chosen):
        for name in pictures(result):
            assert f"]({name})" in card(result)


def test_pictures_are_small_and_light(
    merged: CompressionResult, pruned: CompressionResult, chosen: CompressionResult
) -> None:
    for result in (merged, pruned, chosen):
        for path in pictures(result).values():
            assert path.stat().st_size < 100_000
            with Image.open(path) as image:
                assert image.size[0] == 1280
                pixels = np.asarray(image.convert("L"))
            assert pixels[0, 0] > LIGHT  # the paper
            assert 0.001 < (pixels < 128).mean() < 0.5


def cells(figure: Figure) -> np.ndarray:
    """[layers, steps, experts, 3] of the picture of a plan."""
    image = figure.axes[0].images[0].get_array()
    layers = round(figure.axes[0].get_ylim()[0] + 0.5)
    return np.asarray(image).reshape(layers, -1, *image.shape[1:])


def test_the_picture_of_a_plan_shows_what_becomes_of_every_expert(
    merged: CompressionResult, pruned: CompressionResult
) -> None:
    found = cells(draw_plan(pruned.plan))
    blue = np.array(KEPT) / 255
    for row, layer in zip(found, pruned.plan.layers, strict=True):
        kept = np.isclose(row, blue).all(axis=(0, 2))
        assert np.flatnonzero(~kept).tolist() == list(layer.removed)
    for row, layer in zip(cells(draw_plan(merged.plan)), merged.plan.layers, strict=True):
        colors = {tuple(np.unique(row[:, list(g.experts)], axis=1).ravel()) for g in layer.groups}
        assert len(colors) == len(layer.groups)
        assert all((row[:, a] == row[:, b]).all() for a, b in (g.experts for g in layer.groups))


def test_the_picture_of_a_plan_shows_how_many_channels_stay(pruned: CompressionResult) -> None:
    plan = pruned.plan
    width = plan.model.expert_width // 4
    layers = tuple(
        replace(layer, channels=(tuple(range(width)),) * len(layer.groups)) for layer in plan.layers
    )
    narrow = replace(plan, expert_width=width, layers=layers)
    blue = np.isclose(cells(draw_plan(narrow)), np.array(KEPT) / 255).all(axis=-1)
    for row, layer in zip(blue, layers, strict=True):
        stays = [group.experts[0] for group in layer.groups]
        assert (row[:, stays].mean(axis=0) == 0.25).all()
        assert row[-1, stays].all()


def test_large_plans_and_layers_of_unequal_size_can_be_drawn(
    pruned: CompressionResult, tmp_path: Path
) -> None:
    experts, rows = 256, 60
    model = replace(pruned.plan.model, num_experts=experts)
    layers = []
    for n in range(rows):
        kept = tuple(ExpertGroup.single(e) for e in range(experts - n))
        gone = tuple(range(experts - n, experts))
        layers.append(LayerPlan(n, kept, gone, saliency=(None, *(1.0 + e for e in range(255)))))
    plan = replace(pruned.plan, model=model, num_experts=experts, layers=tuple(layers))
    for save, name in ((save_plan, "plan.png"), (save_saliency, "saliency.svg")):
        assert save(plan, tmp_path / name).stat().st_size > 10_000
    crosses = draw_plan(plan).axes[0].collections[0].get_offsets()
    assert len(crosses) == sum(range(rows))


def test_saliencies_stand_where_they_are(pruned: CompressionResult) -> None:
    kept, gone = draw_saliency(pruned.plan).axes[0].collections[:2]
    values = [
        (layer.saliency[e], e in layer.removed)
        for layer in pruned.plan.layers
        for e in range(16)
        if layer.saliency is not None
    ]
    for marks, removed in ((kept, False), (gone, True)):
        heights = np.sort(np.asarray(marks.get_offsets())[:, 1])
        np.testing.assert_allclose(heights, sorted(v for v, r in values if r == removed))


def test_the_tree_is_that_of_the_similarities(merged: CompressionResult, place: Path) -> None:
    tree = merged.plan.evidence["merge_tree"]
    router = ExpertRouter.from_pretrained(place / "the twins")
    found = calibrate(router, read_corpus(place / "learn.jsonl"))
    statistics = next(each for each in found.layers if each.layer == tree["layer"])
    distances = 1 - similarity(statistics).total
    np.fill_diagonal(distances, 0)
    expected = linkage(squareform(distances, checks=False), "complete")
    (part,) = tree["parts"]
    assert part["experts"] == list(range(16))
    np.testing.assert_allclose(part["height"], expected[:, 2], rtol=1e-5, atol=1e-7)
    assert [part["first"], part["second"]] == expected[:, :2].T.astype(int).tolist()


def test_the_dendrogram_colours_what_is_merged(merged: CompressionResult) -> None:
    axes = draw_merge_tree(merged.plan).axes[0]
    joins = [line for line in axes.lines if len(line.get_xdata()) == 4]
    thick = [line for line in joins if line.get_linewidth() > 1]
    assert (len(joins), len(thick)) == (15, 8)
    (cut,) = [line for line in axes.lines if line.get_linestyle() == "--"]
    height = cut.get_ydata()[0]
    assert height == pytest.approx(0.2)
    assert max(max(line.get_ydata()) for line in thick) < height
    assert min(max(line.get_ydata()) for line in joins if line not in thick) > height


def test_the_methods_stand_in_order(chosen: CompressionResult) -> None:
    trials = chosen.plan.evidence["choice"]["trials"]
    names = list(dict.fromkeys(trial["method"] for trial in trials))
    axes = draw_choice(chosen.plan).axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == names
    points = [line for line in axes.lines if len(line.get_xdata()) == 1]
    best = {t["method"]: t["kl"]["value"] for t in reversed(trials)}
    found = [float(line.get_xdata()[0]) for line in points]
    assert found == pytest.approx([best[name] for name in names])
    assert found == sorted(found)


@pytest.mark.parametrize("draw", [draw_saliency, draw_choice])
def test_what_a_plan_does_not_hold_is_not_drawn(
    draw: Callable[[Plan], Figure], merged: CompressionResult
) -> None:
    with pytest.raises(UsageError, match="only"):
        draw(merged.plan)


def test_a_plan_without_a_tree(pruned: CompressionResult, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="only merges by complete linkage or hc-smoe"):
        save_merge_tree(pruned.plan, tmp_path / "tree.png")


def test_plans_by_distance_and_by_dominant_experts(place: Path) -> None:
    options = {"ratio": 0.5, "merge": True, "experts_per_token": 2, "dry_run": True}
    by_distance = run(place, "none", **options).plan
    assert by_distance.evidence["merge_tree"]["height"].startswith("Euclidean distance")
    axes = draw_merge_tree(by_distance, style="dark").axes[0]
    assert len([line for line in axes.lines if line.get_linewidth() > 2]) == 8
    around = run(place, "none", merging=Merging(grouping="ream"), **options).plan
    assert "merge_tree" not in around.evidence


# Upload -------------------------------------------------------------------------------------


class Hub:
    """What the hub's client was asked for."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[tuple[str, dict[str, Any]]] = []
        for name in ("whoami", "create_repo", "upload_folder"):
            monkeypatch.setattr(HfApi, name, self._recorder(name))

    def _recorder(self, name: str) -> Callable[..., str]:
        def call(api: HfApi, *words: Any, **options: Any) -> str:
            self.calls.append((name, {"words": words, **options}))
            return "https://huggingface.co/me/small"

        return call

    @property
    def names(self) -> Sequence[str]:
        return [name for name, _ in self.calls]


def test_upload(merged: CompressionResult, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = Hub(monkeypatch)
    assert merged.output is not None
    assert upload(merged.output, "me/small") == "https://huggingface.co/me/small"
    assert hub.names == ["whoami", "create_repo", "upload_folder"]
    assert hub.calls[1][1]["exist_ok"] is True
    sent = hub.calls[2][1]
    assert (sent["repo_id"], sent["folder_path"]) == ("me/small", merged.output)
    assert "model*.safetensors" in sent["delete_patterns"]


@pytest.mark.parametrize("repo", ["small", "a/b/c", "me/sm all", "me/..", ""])
def test_names_that_no_repository_can_have(
    repo: str, merged: CompressionResult, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = Hub(monkeypatch)
    assert merged.output is not None
    with pytest.raises(UsageError, match=r"repository|owner"):
        upload(merged.output, repo)
    assert hub.calls == []


def test_an_upload_of_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = Hub(monkeypatch)
    with pytest.raises(UsageError, match="no model"):
        upload(tmp_path, "me/small")
    assert hub.calls == []


def test_without_a_token(merged: CompressionResult, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(api: HfApi) -> None:
        raise LocalTokenNotFoundError("Token is required")

    hub = Hub(monkeypatch)
    monkeypatch.setattr(HfApi, "whoami", refuse)
    assert merged.output is not None
    with pytest.raises(MoeLensError, match="hf auth login"):
        upload(merged.output, "me/small")
    assert hub.calls == []


def test_without_a_network(merged: CompressionResult, monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub's own client, at an address where nobody answers."""
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "hf_none")
    assert merged.output is not None
    with pytest.raises(MoeLensError, match="cannot be reached"):
        upload(merged.output, "me/small")


def test_a_refusal_says_how_to_go_on(
    merged: CompressionResult, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(api: HfApi, *words: Any, **options: Any) -> None:
        raise ConnectionError("the line went dead")

    Hub(monkeypatch)
    monkeypatch.setattr(HfApi, "upload_folder", broken)
    assert merged.output is not None
    with pytest.raises(MoeLensError, match="the line went dead") as raised:
        upload(merged.output, "me/small")
    assert f"hf upload me/small {merged.output}" in str(raised.value)
    assert read_plan(merged.output / "plan.json") == merged.plan
