"""Checkpoints in the layouts people have give the same smaller model, and keep their bytes."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.utils import load, load_model, quantize_model, save_config, save_model

from moe_lens.checkpoint_files.folder import open_tensors, stored_tensors, weight_files
from moe_lens.compress import Plan, write
from moe_lens.compress.checkpoint.tensor_file import write_shards
from moe_lens.router import ExpertRouter
from tiny_models import save_checkpoint
from twins import kept_per_layer, merge_plan, prune_plan

Tensors = dict[str, mx.array]
TOKENS = mx.array([[1, 5, 9, 3, 7, 2]])


def tensors(folder: Path) -> Tensors:
    found = open_tensors(weight_files(folder))
    mx.eval(list(found.values()))
    return found


def rewrite(folder: Path, found: Tensors, dtypes: dict[str, str] | None = None) -> None:
    """Replace the weight files of a folder by one with these tensors."""
    for file in folder.glob("model*.safetensors*"):
        file.unlink()
    write_shards(folder, dict(found), 1, dtypes=dtypes)


def change_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text()) | changes
    kept = {key: value for key, value in config.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(kept))


def plans(source: Path) -> dict[str, Plan]:
    """A removal, and a merge of half of the experts, for any checkpoint of this shape."""
    router = ExpertRouter.from_pretrained(source)
    groups = [(0, 5), *[(e,) for e in range(1, 16) if e not in (5, 6)], (6,)]
    made = {
        "prune": prune_plan(router, kept_per_layer(router, 8)),
        "merge": merge_plan(router, {layer.index: sorted(groups) for layer in router.layers}),
    }
    return {
        name: replace(plan, model=replace(plan.model, fingerprint=""))
        for name, plan in made.items()
    }


def in_own_tensors(found: Tensors, block: str, names: dict[str, str]) -> Tensors:
    """Stacked experts as one tensor for each expert and projection."""
    apart: Tensors = {}
    for name, value in found.items():
        if f".{block}.switch_mlp." not in name:
            apart[name] = value
            continue
        for expert in range(len(value)):
            place = name.replace("switch_mlp", f"experts.{expert}")
            for ours, theirs in names.items():
                place = place.replace(ours, theirs)
            apart[place] = mx.contiguous(value[expert])
    return apart


def fused(found: Tensors, stack: str, to: str, *, inputs_first: bool) -> Tensors:
    """Gate and up projections of all experts in one tensor."""
    made = dict(found)
    for name in [name for name in found if name.endswith(f"{stack}.gate_proj.weight")]:
        block = name.removesuffix(f"{stack}.gate_proj.weight")
        gate, up, down = (
            made.pop(f"{block}{stack}.{part}_proj.weight") for part in ("gate", "up", "down")
        )
        both = mx.concatenate([gate, up], axis=1)
        made[f"{block}{to}.gate_up_proj"] = mx.contiguous(_turned(both, inputs_first))
        made[f"{block}{to}.down_proj"] = mx.contiguous(_turned(down, inputs_first))
    return made


def _turned(value: mx.array, inputs_first: bool) -> mx.array:
    return value.swapaxes(1, 2) if inputs_first else value


def in_blocks(found: Tensors) -> Tensors:
    """gpt-oss as it is published: mxfp4 blocks, rows of gate and up by turns."""
    made: Tensors = {}
    for name, value in found.items():
        block, _, leaf = name.partition(".experts.")
        part, _, kind = leaf.partition(".")
        if part == "up_proj":
            continue
        if part == "gate_proj":
            up = found[name.replace("gate_proj", "up_proj")]
            value = mx.flatten(mx.stack([value, up], axis=2), 1, 2)
            part = "gate_up_proj"
        if not leaf:
            made[name] = value
        elif kind == "weight":
            value = mx.unflatten(mx.contiguous(value).view(mx.uint8), -1, (-1, 16))
            made[f"{block}.experts.{part}_blocks"] = value
        else:
            ending = {"scales": "_scales", "bias": "_bias"}[kind]
            made[f"{block}.experts.{part}{ending}"] = mx.contiguous(value)
    return made


W123 = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}

HUB: dict[str, Callable[[Tensors], Tensors]] = {
    "qwen3_moe": lambda found: in_own_tensors(found, "mlp", {}),
    "mixtral": lambda found: in_own_tensors(found, "block_sparse_moe", W123),
    "qwen3_vl_moe": lambda found: fused(found, "switch_mlp", "experts", inputs_first=True),
    "qwen3_5_moe": lambda found: fused(found, "switch_mlp", "experts", inputs_first=False),
    "llama4": lambda found: fused(found, "experts", "experts", inputs_first=True),
    "gpt_oss": in_blocks,
}
"""What stands in the files of the hub, from what stands in those of mlx-lm."""

SAME_BYTES = ("qwen3_moe", "mixtral", "qwen3_5_moe")
"""Where the bytes of an expert's projection follow one another in the file of the hub."""


def in_both_layouts(name: str, folder: Path) -> tuple[Path, Path]:
    """The same model as mlx-lm and as the hub has it, in bfloat16 or mxfp4."""
    ours = save_checkpoint(name, folder / "ours", experts=16, dtype=mx.bfloat16)
    if name == "gpt_oss":
        quantise(ours, 4, "mxfp4", experts_only=True)
    theirs = Path(shutil.copytree(ours, folder / "theirs"))
    rewrite(theirs, HUB[name](tensors(ours)))
    if name == "gpt_oss":
        change_config(theirs, quantization=None, quantization_config={"quant_method": "mxfp4"})
    return ours, theirs


def quantise(folder: Path, bits: int, mode: str, *, experts_only: bool = False) -> None:
    model, config = load_model(folder)
    chosen = (lambda path, _: ".experts." in path) if experts_only else None
    size = 16 if mode == "nvfp4" else 32
    with contextlib.redirect_stdout(io.StringIO()):
        model, config = quantize_model(model, config, size, bits, mode=mode, quant_predicate=chosen)
    save_model(folder, model, donate_model=True)
    save_config(config, folder / "config.json")


def check_same(one: Path, other: Path) -> None:
    """Both folders hold the same tensors to the last bit, and stock mlx-lm opens them."""
    first, second = tensors(one), tensors(other)
    assert set(first) == set(second)
    for name, value in first.items():
        assert value.dtype == second[name].dtype, name
        assert bytes(memoryview(value.reshape(-1).view(mx.uint8))) == bytes(
            memoryview(second[name].reshape(-1).view(mx.uint8))
        ), name
    assert set(stored_tensors(one)) == set(first)
    load(str(other))


@pytest.mark.slow
@pytest.mark.parametrize("name", HUB)
def test_layouts_of_the_hub(name: str, tmp_path: Path) -> None:
    ours, theirs = in_both_layouts(name, tmp_path)
    assert set(stored_tensors(theirs)) != set(stored_tensors(ours))
    for kind, plan in plans(ours).items():
        expected = write(plan, ours, tmp_path / f"{kind}-ours")
        check_same(expected, write(plan, theirs, tmp_path / f"{kind}-theirs"))


@pytest.mark.parametrize("name", SAME_BYTES)
def test_experts_that_stay_are_the_bytes_of_the_hub(name: str, tmp_path: Path) -> None:
    ours, theirs = in_both_layouts(name, tmp_path)
    content = (theirs / "model.safetensors").read_bytes()
    for kind, plan in plans(ours).items():
        made = tensors(write(plan, theirs, tmp_path / kind))
        for layer in plan.layers:
            for number, group in enumerate(layer.groups):
                part = next(
                    n for n in made if f"layers.{layer.layer}." in n and "switch_mlp.up_proj" in n
                )
                same = bytes(memoryview(made[part][number].view(mx.uint8))) in content
                assert same == (not group.merged)


@pytest.mark.parametrize("name", ["deepseek_v3/nogroup", "minimax"])
def test_fp8_with_scales_of_blocks(name: str, tmp_path: Path) -> None:
    """mlx-lm unpacks it to bfloat16, so that is what is written."""
    source = save_checkpoint(name, tmp_path / "fp8", experts=16, dtype=mx.bfloat16)
    block, names = ("mlp", {}) if name != "minimax" else ("block_sparse_moe", W123)
    found = in_own_tensors(tensors(source), block, names)
    dtypes = {}
    for place in [place for place in found if f".{block}.experts." in place]:
        found[place] = mx.to_fp8(found[place] * 4)
        found[f"{place}_scale_inv"] = mx.full((1, 1), 0.25, mx.float32)
        dtypes[place] = "F8_E4M3"
    rewrite(source, found, dtypes)
    change_config(source, quantization_config={"quant_method": "fp8", "fmt": "e4m3"})
    assert {each.dtype for each in stored_tensors(source).values()} >= {"F8_E4M3", "BF16", "F32"}
    plain = Path(shutil.copytree(source, tmp_path / "plain"))
    model, config = load_model(source)
    save_model(plain, model, donate_model=True)
    save_config({**config, "quantization_config": None}, plain / "config.json")
    change_config(plain, quantization_config=None)
    for kind, plan in plans(plain).items():
        expected = write(plan, plain, tmp_path / f"{kind}-plain")
        made = write(plan, source, tmp_path / f"{kind}-fp8")
        check_same(expected, made)
        assert "quantization_config" not in json.loads((made / "config.json").read_text())


MODES = [*(("affine", bits) for bits in (2, 3, 4, 5, 6, 8)), ("mxfp4", 4), ("mxfp8", 8)]
MODES += [("nvfp4", 4)]


@pytest.mark.parametrize(("mode", "bits"), MODES)
def test_every_quantisation_of_mlx(mode: str, bits: int, tmp_path: Path) -> None:
    source = save_checkpoint("qwen3_moe", tmp_path / "source", experts=16, dtype=mx.bfloat16)
    quantise(source, bits, mode)
    before = tensors(source)
    for kind, plan in plans(source).items():
        output = write(plan, source, tmp_path / kind)
        after = tensors(output)
        assert set(after) == set(before)
        for name, value in before.items():
            layer = plan.layer(int(name.split(".")[2])) if ".layers." in name else None
            if layer is None or ".mlp." not in name or len(value) != 16:
                assert bool(mx.array_equal(after[name], value)), name
                continue
            for number, group in enumerate(layer.groups):
                if not group.merged:
                    assert bool(mx.array_equal(after[name][number], value[group.experts[0]])), name
        check_merged(before, after, plan, mode, bits)
        config = json.loads((output / "config.json").read_text())
        for key in ("quantization", "quantization_config"):
            assert (config[key]["bits"], config[key].get("mode", "affine")) == (bits, mode)
        assert bool(mx.isfinite(ExpertRouter.from_pretrained(output).forward(TOKENS)).all())


def check_merged(before: Tensors, after: Tensors, plan: Plan, mode: str, bits: int) -> None:
    """Merged rows are what MLX packs of the mean of what it unpacks of the members."""
    size = 16 if mode == "nvfp4" else 32

    def unpacked(found: Tensors, place: str, row: int) -> np.ndarray:
        leaves = [found.get(f"{place}.{leaf}") for leaf in ("weight", "scales", "biases")]
        rows = [None if leaf is None else leaf[row] for leaf in leaves]
        weight = mx.dequantize(*rows, size, bits, mode, dtype=mx.float32)
        return np.array(weight).astype(np.float64)

    for layer in plan.layers:
        place = f"model.layers.{layer.layer}.mlp.switch_mlp.down_proj"
        for number, group in enumerate(layer.groups):
            if not group.merged:
                continue
            mean = sum(
                weight * unpacked(before, place, expert)
                for expert, weight in zip(group.experts, group.weights, strict=True)
            )
            kind = mx.bfloat16 if mode == "affine" else mx.float32
            parts = mx.quantize(mx.array(mean).astype(mx.float32).astype(kind), size, bits, mode)
            expected = np.array(
                mx.dequantize(
                    *parts, *(() if len(parts) > 2 else (None,)), size, bits, mode, dtype=mx.float32
                )
            )
            close = np.isclose(unpacked(after, place, number), expected, rtol=1e-5, atol=1e-6)
            assert close.mean() > 0.999


@pytest.mark.parametrize("quantised", [False, True])
def test_shards_give_the_same_as_one_file(quantised: bool, tmp_path: Path) -> None:
    source = save_checkpoint("qwen3_moe", tmp_path / "source", 4 if quantised else None, experts=16)
    sharded = Path(shutil.copytree(source, tmp_path / "sharded"))
    (sharded / "model.safetensors").unlink()
    write_shards(sharded, tensors(source), 1, shard_bytes=100_000)
    assert len(weight_files(sharded)) > 3
    for kind, plan in plans(source).items():
        expected = write(plan, source, tmp_path / f"{kind}-one")
        check_same(expected, write(plan, sharded, tmp_path / f"{kind}-many"))


def test_a_quantisation_that_only_its_old_name_tells(tmp_path: Path) -> None:
    source = save_checkpoint("qwen3_moe", tmp_path / "source", experts=16)
    quantise(source, 4, "mxfp4")
    renamed = Path(shutil.copytree(source, tmp_path / "renamed"))
    change_config(renamed, quantization=None, quantization_config={"quant_method": "mxfp4"})
    plan = plans(source)["prune"]
    expected = write(plan, source, tmp_path / "expected")
    check_same(expected, write(plan, renamed, tmp_path / "smaller"))


def test_tied_embeddings_stay_tied(tmp_path: Path) -> None:
    source = save_checkpoint("qwen3_moe", tmp_path / "source", experts=16)
    found = tensors(source)
    change_config(source, tie_word_embeddings=True)
    found["lm_head.weight"] = found["model.embed_tokens.weight"]  # as some checkpoints store it
    rewrite(source, found)
    without = Path(shutil.copytree(source, tmp_path / "without"))
    del found["lm_head.weight"]
    rewrite(without, found)
    plan = plans(source)["prune"]
    expected = write(plan, without, tmp_path / "expected")
    assert "lm_head.weight" not in stored_tensors(expected)
    check_same(expected, write(plan, source, tmp_path / "smaller"))
