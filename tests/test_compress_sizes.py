"""How small: by experts, by bytes, and by a plan that is applied again."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from mlx.utils import tree_flatten
from mlx_lm.utils import load

from moe_lens.compress import Plan, compress, read_plan
from moe_lens.compress.tensors.parent import open_parent
from moe_lens.compress.tensors.size_table import Shape, SizeTable
from moe_lens.errors import UsageError
from moe_lens.router import ExpertRouter
from tiny_models import save_checkpoint
from twins import kept_per_layer, prune_plan, save_twins, write_words

CASES = [
    ("qwen3_moe", None),
    ("gpt_oss", 4),
    ("deepseek_v3", 4),
    ("dbrx", 4),
    ("longcat_flash", None),
]


def files(folder: Path) -> int:
    """Bytes of the weight files."""
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def parent_names(folder: Path) -> list[str]:
    """Of all parameters, as mlx-lm has them."""
    return [name for name, _ in tree_flatten(open_parent(folder).model.parameters())]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sizes")
    save_twins(folder / "twins")
    write_words(folder / "learn.jsonl", 24, 1, words=12)
    write_words(folder / "test.jsonl", 8, 2, words=12)
    return folder


def run(place: Path, output: Path | None, **options: Any) -> Any:
    texts = {"calibration": place / "learn.jsonl", "evaluation": place / "test.jsonl"}
    dry = {"dry_run": True} if output is None else {}
    return compress(place / "twins", output=output, **{**texts, **dry, **options})


@pytest.mark.parametrize(("name", "quantise"), CASES)
def test_the_table_is_what_is_written(name: str, quantise: int | None, tmp_path: Path) -> None:
    from moe_lens.compress import write

    source = save_checkpoint(name, tmp_path / "source", quantise, experts=16)
    router = ExpertRouter.from_pretrained(source)
    table = SizeTable.of(open_parent(source))
    width = table.full.expert_width
    assert table.full == Shape(router.info.num_experts, router.layers[0].expert_width)
    assert 0 <= table.bytes(table.full) - files(source) < 0.1 * files(source) + 20_000
    plan = prune_plan(router, kept_per_layer(router, 8))
    small = write(plan, source, tmp_path / "small")
    tensors = json.loads((small / "model.safetensors.index.json").read_text())
    named = tensors["metadata"]["total_size"]
    # Up to the bytes set aside for headers, the table is exact.
    headers = sum(128 + 2 * len(name) for name in parent_names(source))
    assert table.bytes(table.full) - headers == open_parent(source).size.bytes
    assert table.bytes(Shape(8, width)) - headers == named
    assert files(small) <= table.bytes(Shape(8, width))


def test_narrow_experts_with_smaller_quantisation_groups_are_counted(tmp_path: Path) -> None:
    from moe_lens.compress import write
    from moe_lens.compress.calibration.channel_calibration import calibrate_channels
    from moe_lens.compress.pruning.channels import plan_channels
    from moe_lens.corpus import read_corpus

    text = read_corpus(write_words(tmp_path / "learn.jsonl", 2, 1, words=8))
    table = SizeTable.of(open_parent("demo"))
    calibration = calibrate_channels(ExpertRouter.from_pretrained("demo"), text)
    for width in (96, 128):  # groups of 32, and the parent's groups of 64
        small = write(plan_channels(calibration, width), "demo", tmp_path / str(width))
        index = json.loads((small / "model.safetensors.index.json").read_text())
        expected = table.bytes(Shape(16, width)) - table.bytes(table.full)
        assert index["metadata"]["total_size"] - open_parent("demo").size.bytes == expected


def test_a_number_of_experts(place: Path, tmp_path: Path) -> None:
    found = run(place, tmp_path / "small", experts=6, method="reap")
    assert found.plan.num_experts == 6
    assert found.plan.settings["experts"] == 6
    assert load(str(found.output))[0].args.num_experts == 6
    assert run(place, None, experts=6, merge=True).plan.kind == "merge"


def test_gigabytes_are_the_most_that_fit(place: Path, tmp_path: Path) -> None:
    table = SizeTable.of(open_parent(place / "twins"))
    width = table.full.expert_width
    target = (table.bytes(Shape(9, width)) + 10) / 1e9
    found = run(place, tmp_path / "small", target_gb=target, method="reap")
    assert found.plan.num_experts == 9
    assert files(tmp_path / "small") <= target * 1e9
    narrow = run(place, None, target_gb=target, method="channels").plan
    assert narrow.kind == "channels"
    assert table.bytes(Shape(16, narrow.expert_width)) <= target * 1e9
    assert table.bytes(Shape(16, narrow.expert_width + 1)) > target * 1e9
    both = run(place, None, target_gb=target, method="reap", expert_width=width // 2).plan
    assert both.num_experts == table.most_experts(int(target * 1e9), width // 2, range(2, 16))
    merged = run(place, None, target_gb=target, merge=True).plan
    assert (merged.kind, merged.num_experts) == ("merge", 9)


def test_a_size_that_cannot_be_reached_names_the_smallest(place: Path) -> None:
    with pytest.raises(UsageError, match="smallest possible model") as refusal:
        run(place, None, target_gb=1e-6, method="reap")
    smallest = float(str(refusal.value).rpartition("takes ")[2].partition(" GB")[0])
    assert run(place, None, target_gb=smallest, method="reap").plan.num_experts == 2
    with pytest.raises(UsageError, match="smallest possible model"):
        run(place, None, target_gb=smallest - 1e-6, method="reap")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ratio": 0.5, "experts": 4}, "in one way"),
        ({"experts": 16, "method": "reap"}, "give a number from 1 to 15"),
        ({"experts": 0}, "at least 1"),
        ({"target_gb": 0.0}, "above 0"),
        ({"target_gb": float("nan")}, "above 0"),
        ({"target_gb": 5.0, "method": "reap"}, "nothing has to go"),
        ({"expert_width": 0.5, "method": "reap"}, "belongs to --ratio"),
        ({"ratio": 0.5, "expert_width": 0.5, "method": "auto"}, "leave --expert-width out"),
        ({"ratio": 0.5, "method": "auto", "protect": True}, "a method that removes experts"),
        ({"ratio": 0.5, "repair_router": 0}, "at least 1"),
        ({"plan": "plan.json", "ratio": 0.5, "merge": True}, "leave --ratio, --merge out"),
    ],
)
def test_what_cannot_be_is_refused(options: dict[str, Any], message: str, place: Path) -> None:
    with pytest.raises(UsageError, match=message):
        run(place, None, **options)


def test_a_saved_plan_gives_the_same_bytes(place: Path, tmp_path: Path) -> None:
    first = run(place, tmp_path / "first", experts=8, merge=True)
    again = run(place, tmp_path / "again", plan=tmp_path / "first" / "plan.json")
    assert again.plan == first.plan
    for name in ("model.safetensors", "plan.json", "config.json"):
        one, two = ((tmp_path / which / name).read_bytes() for which in ("first", "again"))
        assert hashlib.sha256(one).digest() == hashlib.sha256(two).digest()
    assert again.verification is not None


def test_an_edited_plan_is_applied_or_refused(place: Path, tmp_path: Path) -> None:
    plan: Plan = run(place, None, experts=8, method="reap").plan
    content = plan.to_dict()
    layer = content["layers"][0]
    kept, gone = layer["groups"][0]["experts"][0], layer["removed"][0]
    layer["groups"][0]["experts"], layer["removed"][0] = [gone], kept
    edited = tmp_path / "edited.json"
    edited.write_text(json.dumps(content))
    assert run(place, None, plan=edited).plan == read_plan(edited) != plan
    layer["removed"].append(gone)
    edited.write_text(json.dumps(content))
    with pytest.raises(UsageError, match="twice"):
        run(place, None, plan=edited)
    with pytest.raises(UsageError, match="there is no plan at"):
        run(place, None, plan=tmp_path / "missing.json")


def test_a_plan_for_another_model_is_refused(place: Path, tmp_path: Path) -> None:
    plan = run(place, None, experts=8, method="reap").plan
    other = save_checkpoint("qwen3_moe", tmp_path / "other", experts=16)
    with pytest.raises(UsageError, match="another checkpoint"):
        compress(other, plan=plan, dry_run=True)
