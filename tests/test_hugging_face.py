"""``format="hf"``: the layout of Hugging Face, from checkpoints in either layout, bit for bit."""

from __future__ import annotations

import gc
import json
import re
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.utils import load_model

from hugging_face_cases import (
    exported,
    in_pairs,
    opened,
    parameters,
    pruned,
    rewrite,
    same,
    stored_bytes,
    tensors,
    write,
)
from moe_lens import compress
from moe_lens.compress.checkpoint.checkpoint import write_checkpoint
from moe_lens.compress.checkpoint.same_parameters import check_same_parameters
from moe_lens.compress.hugging_face import layouts
from moe_lens.compress.hugging_face.expert_layout import Stack, Stacked
from moe_lens.compress.plan.router_row import RouterRow
from moe_lens.compress.tensors.parent import Parent
from moe_lens.errors import MoeLensError, UnsupportedModelError, UsageError
from tiny_models import BASE, save_checkpoint
from twins import narrow_plan, write_words

REFUSED = {
    "gpt_oss": "only where its experts are in mxfp4",
    "hunyuan": "joined projections of its attention",
    "kimi_k3": "projections of its attention are joined",
    "muse_spark": "fixed gates are computed once",
    "deepseek_v41": "packed weights are laid out anew",
    "deepseek_v41/softmax": "packed weights are laid out anew",
    "kimi_vl": "mlx-lm does not read",
    "qwen3_5": "mlx-lm does not read",
    "ernie4_5_moe/sigmoid": "mlx-lm does not read",
    "olmoe/norm": "mlx-lm does not read",
}
"""Models in mlx-lm's layout that have no way back, and a piece of the reason."""


STORED = ("qwen3_moe", "mixtral", "granitemoe")
"""Three ways of storing experts: by number, under other names, and in stacks."""


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(set(BASE) - set(REFUSED)))
def test_every_model_type_goes_there_and_stays_there(name: str, tmp_path: Path) -> None:
    """From mlx-lm's layout, and then from that of Hugging Face: the models are the same."""
    source = save_checkpoint(name, tmp_path / "mlx", experts=16)
    plan = pruned(source, 8)
    there = write(plan, source, tmp_path / "there")
    stayed = write(plan, source, tmp_path / "stayed", "mlx")
    assert same(parameters(there), parameters(stayed))
    merged = write(in_pairs(there), there, tmp_path / "merged")
    assert set(tensors(merged)) <= set(tensors(there))
    assert json.loads((merged / "config.json").read_text()).get("quantization") is None


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_what_has_no_way_back_is_refused(name: str, tmp_path: Path) -> None:
    source = save_checkpoint(name, tmp_path / "mlx", experts=16)
    plan = pruned(source, 8)
    with pytest.raises(UnsupportedModelError, match=REFUSED[name]) as caught:
        write(plan, source, tmp_path / "there")
    assert "leave --format hf out" in str(caught.value)


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
@pytest.mark.parametrize("name", STORED)
def test_experts_that_stay_keep_their_bytes(name: str, dtype: mx.Dtype, tmp_path: Path) -> None:
    source = exported(name, tmp_path, dtype)
    plan = pruned(source, 4)
    before = stored_bytes(source)
    after = stored_bytes(write(plan, source, tmp_path / "smaller"))
    assert len(after) < len(before) or name == "granitemoe"
    for tensor, (kind, content) in after.items():
        layer = (
            plan.layer(int(found[1])) if (found := re.search(r"layers\.(\d+)", tensor)) else None
        )
        kept = [] if layer is None else [group.experts[0] for group in layer.groups]
        if numbered := re.search(r"experts\.(\d+)\.", tensor):
            old = tensor.replace(numbered[0], f"experts.{kept[int(numbered[1])]}.")
            assert before[old] == (kind, content)
        elif re.search(r"(_linear|\.gate|router\.layer)\.weight$", tensor):
            rows = len(before[tensor][1]) // 8
            pieces = [before[tensor][1][rows * e : rows * (e + 1)] for e in kept]
            assert (kind, content) == (before[tensor][0], b"".join(pieces))
        else:
            assert before[tensor] == (kind, content)


@pytest.mark.parametrize("name", [*STORED, "gemma4_text", "deepseek_v3"])
def test_narrower_experts(name: str, tmp_path: Path) -> None:
    source = exported(name, tmp_path)
    plan = narrow_plan(opened(source), 32)
    there = write(plan, source, tmp_path / "there")
    assert same(parameters(there), parameters(write(plan, source, tmp_path / "stayed", "mlx")))
    assert set(tensors(there)) == set(tensors(source))


def test_router_rows_that_a_plan_brings(tmp_path: Path) -> None:
    source = exported("deepseek_v3", tmp_path)
    plan = pruned(source, 4)
    row = RouterRow.of(np.arange(64) / 64)
    layers = tuple(
        replace(layer, groups=tuple(replace(group, router_row=row) for group in layer.groups))
        for layer in plan.layers
    )
    there = write(replace(plan, layers=layers), source, tmp_path / "there")
    rows = tensors(there)["model.layers.1.mlp.gate.weight"]
    assert bool(mx.array_equal(rows, mx.broadcast_to(mx.arange(64) / 64, (4, 64))))


def test_quantised_for_mlx_is_refused_with_the_way_out(tmp_path: Path) -> None:
    source = save_checkpoint("qwen3_moe", tmp_path / "mlx", 4, experts=16)
    with pytest.raises(UnsupportedModelError, match=r"mlx_lm\.convert .* --dequantize") as caught:
        compress.write(pruned(source, 8), source, tmp_path / "there", format="hf")
    assert "4 bits" in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["mlx"]


def test_a_tower_that_was_converted_for_mlx_is_refused(tmp_path: Path) -> None:
    source = save_checkpoint("gemma4", tmp_path / "mlx", experts=16)
    tower = {"vision_tower.encoder.layers.0.mlp.gate_proj.weight": mx.ones((8, 3))}
    rewrite(source, lambda found: found | tower)
    with pytest.raises(UnsupportedModelError, match="together with vision_tower"):
        write(pruned(source, 8), source, tmp_path / "there")


@pytest.mark.parametrize(
    "wrong",
    [
        Stacked(
            (Stack("experts.gate_up_proj", (layouts.UP, layouts.GATE)), layouts.GATE_UP.stacks[1])
        ),
        Stacked((replace(layouts.GATE_UP.stacks[0], interleaved=True), layouts.GATE_UP.stacks[1])),
    ],
)
def test_a_layout_that_is_wrong_is_found_out(
    wrong: Stacked, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = save_checkpoint("gemma4_text", tmp_path / "mlx", experts=16)
    monkeypatch.setitem(layouts.LAYOUTS, "gemma4_text", layouts.Layout((wrong,)))
    with pytest.raises(MoeLensError, match=r"not the smaller model: .*whose bits differ"):
        compress.write(pruned(source, 8), source, tmp_path / "there", format="hf")
    assert not (tmp_path / "there").exists()


def test_norms_that_cannot_be_taken_back_are_refused(tmp_path: Path) -> None:
    source = save_checkpoint("qwen3_next", tmp_path / "mlx", experts=16)
    name = "model.norm.weight"
    rewrite(source, lambda found: found | {name: mx.full((64,), 1e-8, mx.float32)})
    with pytest.raises(UnsupportedModelError, match="lost bits of it"):
        write(pruned(source, 8), source, tmp_path / "there")


def test_unknown_names_are_refused(tmp_path: Path) -> None:
    source = exported("qwen3_moe", tmp_path)
    plan = pruned(source, 4)
    with pytest.raises(UsageError, match="no format 'gguf'"):
        compress.write(plan, source, tmp_path / "there", format="gguf")
    first = replace(plan.layers[0], groups=plan.layers[0].groups[1:])
    gone = plan.layers[0].groups[0].experts
    first = replace(first, removed=tuple(sorted({*first.removed, *gone})))
    unequal = replace(plan, per_layer=True, layers=(first, *plan.layers[1:]))
    with pytest.raises(UsageError, match="leave out either --per-layer or --format hf"):
        compress.write(unequal, source, tmp_path / "there", format="hf")


def test_shards_and_report(tmp_path: Path) -> None:
    source = exported("qwen3_moe", tmp_path)
    output = compress.write(
        pruned(source, 4), source, tmp_path / "there", format="hf", shard_bytes=50_000
    )
    index = json.loads((output / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 3
    assert set(index["weight_map"]) == set(tensors(output))
    card = (output / "README.md").read_text()
    assert "AutoModelForCausalLM" in card
    assert "--format hf" in card


def test_memory_holds_one_stack_at_a_time(tmp_path: Path) -> None:
    source = save_checkpoint("qwen3_moe", tmp_path / "mlx", experts=64)
    there = write(pruned(source, 32), source, tmp_path / "there")
    for folder, name, keep in ((source, "from-mlx", 32), (there, "from-own", 16)):
        plan, stored = pruned(folder, keep), tensors(folder)
        total = sum(value.nbytes for value in stored.values())
        largest = max(value.nbytes for value in parameters(folder).values())
        del stored
        model, config = load_model(folder, lazy=True)
        parent = Parent.of(model, None, config, folder)
        (tmp_path / name).mkdir()
        mx.clear_cache()
        start = mx.get_active_memory()
        mx.reset_peak_memory()
        gc.disable()  # what waits for the garbage collection must hold no tensor
        try:
            write_checkpoint(parent, plan, tmp_path / name, format="hf")
            check_same_parameters(tmp_path / name, folder, plan)
        finally:
            gc.enable()
        assert mx.get_peak_memory() - start < 3 * largest + 200_000 < total


def test_the_size_that_was_asked_for_counts_every_name(tmp_path: Path) -> None:
    source = save_checkpoint("qwen3_moe", tmp_path / "mlx", experts=64)
    texts = write_words(tmp_path / "a.jsonl", 4, 0), write_words(tmp_path / "b.jsonl", 4, 1)
    larger = write(pruned(source, 48), source, tmp_path / "larger") / "model.safetensors"
    too_much = larger.stat().st_size
    found = compress.compress(
        source,
        target_gb=(too_much - 1) / 1e9,
        method="frequency",
        calibration=texts[0],
        evaluation=texts[1],
        format="hf",
        output=tmp_path / "smaller",
    )
    assert found.plan.num_experts == 47
    assert (tmp_path / "smaller" / "model.safetensors").stat().st_size < too_much
