"""How narrow experts can be, and checkpoints of narrower ones, whole and quantised."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.utils import load

from moe_lens.compress import (
    calibrate_channels,
    in_memory,
    plan_channels,
    plan_prune,
    simulated,
    write,
)
from moe_lens.compress.calibration.calibration import calibrate
from moe_lens.compress.checkpoint.expert_width import WidthKeys, Widths, width_for
from moe_lens.compress.tensors.regroup import regrouped
from moe_lens.corpus import read_corpus
from moe_lens.errors import UnsupportedModelError, UsageError
from moe_lens.experts.quantisation import Quantisation
from moe_lens.router import ExpertRouter
from tiny_models import save_checkpoint
from twins import merge_plan, narrow_plan, write_words

TOKENS = [[(7 * i + 3 * j) % 126 for i in range(30 + 7 * j)] for j in range(5)]


def open_tiny(name: str, folder: Path, quantise: int | None = None) -> ExpertRouter:
    return ExpertRouter.from_pretrained(save_checkpoint(name, folder / "source", quantise))


def text(folder: Path, prompts: int = 12, words: int = 40) -> Any:
    return read_corpus(write_words(folder / "words.jsonl", prompts, 0, words=words))


# Widths ------------------------------------------------------------------------------------

AFFINE = Quantisation(64, 8, "affine")
MXFP4 = Quantisation(32, 4, "mxfp4")
KEYS = WidthKeys("moe_intermediate_size")


@pytest.mark.parametrize(
    ("width", "packed", "asked", "expected"),
    [
        (192, (), 0.5, 96),
        (192, (), 0.3, 64),  # 57.6: the nearest multiple of 32
        (192, (), 57, 57),
        (40, (), 0.5, 32),
        (24, (), 0.5, 12),  # no multiple of 32 below 24
        (192, (AFFINE,), 0.5, 96),  # in groups of 32
        (192, (AFFINE,), 0.65, 128),  # whole groups of 64 are near
        (768, (AFFINE,), 0.64, 512),  # 491.5: 480 is nearer, 512 keeps the groups
        (192, (AFFINE,), 160, 160),
        (2880, (MXFP4,), 0.5, 1440),
        (192, (), 0.75, 160),  # 144: as far from 128, the larger goes first
    ],
)
def test_width_for_what_is_asked(width: int, packed: Any, asked: float, expected: int) -> None:
    assert Widths(width, KEYS, packed).choose(asked) == expected


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (100, "cannot have 100; the nearest possible width is 96 or 128 .*groups of 32"),
        (192, "the nearest possible width is 160 .*below 192"),
        (0, "a share of the channels below 1"),
        (1, "a share of the channels below 1"),
        (-0.5, "a share of the channels below 1"),
        (2.5, "a whole number"),
        (float("nan"), "a whole number"),
    ],
)
def test_impossible_widths_are_refused_with_the_nearest(asked: float, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Widths(192, KEYS, (AFFINE,)).choose(asked)


def test_nothing_below_one_group() -> None:
    with pytest.raises(UsageError, match=r"no smaller number .*remove whole experts"):
        Widths(32, KEYS, (MXFP4,)).choose(0.5)


def test_groups_shrink_only_as_far_as_needed() -> None:
    assert regrouped(AFFINE, 128) == AFFINE
    assert regrouped(AFFINE, 96) == Quantisation(32, 8, "affine")
    assert regrouped(Quantisation(128, 4, "affine"), 192) == Quantisation(64, 4, "affine")
    assert regrouped(AFFINE, 80) is None
    assert regrouped(MXFP4, 48) is None


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("jamba", "intermediate_size in config.json, which also sets"),
        ("llama4", "shared_expert"),
        ("deepseek_v41", "shared_experts"),
        ("phixtral", "no number in config.json"),
    ],
)
def test_models_whose_width_is_no_number_of_its_own_are_refused(
    name: str, reason: str, tmp_path: Path
) -> None:
    router = open_tiny(name, tmp_path)
    with pytest.raises(UnsupportedModelError, match=f"{reason}.*--ratio"):
        width_for(router.config, router.layers, 0.5)


def test_a_shared_expert_made_of_expert_widths_keeps_its_own(tmp_path: Path) -> None:
    router = open_tiny("deepseek_v3", tmp_path)
    with pytest.raises(UsageError, match=r"16 or 32 .*n_shared_experts"):
        width_for(router.config, router.layers, 24)
    output = write(narrow_plan(router, 16), tmp_path / "source", tmp_path / "smaller")
    config = json.loads((output / "config.json").read_text())
    before = router.config["n_shared_experts"]
    assert (config["moe_intermediate_size"], config["n_shared_experts"]) == (16, 4 * before)


# Checkpoints -------------------------------------------------------------------------------


def stock_logits(folder: Path) -> mx.array:
    logits = load(str(folder))[0](mx.array([TOKENS[4]]))
    mx.eval(logits)
    return logits


def close(one: mx.array, other: mx.array, tolerance: float = 1e-5) -> bool:
    return float(mx.abs(one - other).max()) <= tolerance * float(mx.abs(other).max())


@pytest.mark.parametrize("name", ["qwen3_moe", "dbrx", "gpt_oss"])
@pytest.mark.parametrize("experts", [8, 6], ids=["all experts", "fewer experts"])
def test_the_simulated_plan_is_the_written_model(name: str, experts: int, tmp_path: Path) -> None:
    router = open_tiny(name, tmp_path)
    corpus = text(tmp_path)
    fewer = None
    if experts < 8:
        fewer = plan_prune(calibrate(router, corpus, similarity=False), 0.25)
    plan = plan_channels(calibrate_channels(router, corpus), 24, fewer)
    plain = router.forward([TOKENS[4]])
    with simulated(router, plan):
        tried = router.forward([TOKENS[4]])
        mx.eval(tried)
    assert bool(mx.array_equal(plain, router.forward([TOKENS[4]])))
    assert not close(tried, plain, 1e-2)
    output = write(plan, tmp_path / "source", tmp_path / "smaller")
    assert close(stock_logits(output), tried)
    assert close(in_memory(router, plan).forward([TOKENS[4]]), tried)
    info = ExpertRouter.from_pretrained(output).info
    assert (info.num_experts, info.expert_width) == (experts, 24)


def test_a_merge_is_not_simulated(tmp_path: Path) -> None:
    router = open_tiny("qwen3_moe", tmp_path)
    pairs = [(0, 1), (2,), (3,), (4,), (5,), (6,), (7,)]
    plan = merge_plan(router, dict.fromkeys(router.info.moe_layers, pairs))
    with pytest.raises(UsageError, match="masks cannot simulate"), simulated(router, plan):
        pass


def weights(folder: Path) -> Mapping[str, mx.array]:
    return mx.load(str(folder / "model.safetensors"))


def test_a_plan_file_is_applied_bit_for_bit(tmp_path: Path) -> None:
    router = open_tiny("qwen3_moe", tmp_path, 4)
    first = write(
        plan_channels(calibrate_channels(router, text(tmp_path)), 32),
        tmp_path / "source",
        tmp_path / "first",
    )
    second = write(first / "plan.json", tmp_path / "source", tmp_path / "second")
    for name in ("model.safetensors", "config.json", "plan.json"):
        assert (first / name).read_bytes() == (second / name).read_bytes()


def test_rows_that_lead_to_kept_channels_are_the_parents_bytes(tmp_path: Path) -> None:
    router = open_tiny("qwen3_moe", tmp_path, 4)
    plan = narrow_plan(router, 32)
    output = write(plan, tmp_path / "source", tmp_path / "smaller")
    old, new = weights(tmp_path / "source"), weights(output)
    for layer, planned in zip(router.layers, plan.layers, strict=True):
        for projection in ("gate_proj", "up_proj"):
            for leaf in ("weight", "scales", "biases"):
                name = f"{layer.path}.{layer.family.experts}.{projection}.{leaf}"
                for expert, kept in enumerate(planned.channels or ()):
                    assert mx.array_equal(new[name][expert], old[name][expert][mx.array(kept)])
    untouched = [name for name in old if ".switch_mlp." not in name]
    assert len(untouched) > 20
    assert all(mx.array_equal(old[name], new[name]) for name in untouched)


def unpacked(tensors: Mapping[str, mx.array], module: str, group: int, bits: int) -> np.ndarray:
    leaves = (tensors[f"{module}.{leaf}"] for leaf in ("weight", "scales", "biases"))
    return np.array(mx.dequantize(*leaves, group, bits, dtype=mx.float32)).astype(np.float64)


def test_whole_groups_keep_their_bytes(tmp_path: Path) -> None:
    """The tiny models are quantised in groups of 32: each expert keeps one of its two."""
    router = open_tiny("qwen3_moe", tmp_path, 4)
    plan = narrow_plan(router, 32, whole_groups_of=32)
    with simulated(router, plan):
        tried = router.forward([TOKENS[4]])
        mx.eval(tried)
    output = write(plan, tmp_path / "source", tmp_path / "smaller")
    old, new = weights(tmp_path / "source"), weights(output)
    for layer, planned in zip(router.layers, plan.layers, strict=True):
        module = f"{layer.path}.{layer.family.experts}.down_proj"
        before, after = unpacked(old, module, 32, 4), unpacked(new, module, 32, 4)
        for expert, kept in enumerate(planned.channels or ()):
            np.testing.assert_array_equal(after[expert], before[expert][:, list(kept)])
    assert close(stock_logits(output), tried)


def test_halves_of_larger_groups_keep_their_codes_and_scales(tmp_path: Path) -> None:
    """`demo` has 192 channels in groups of 64; 96 of them are three halves of groups."""
    router = ExpertRouter.from_pretrained("demo")
    plan = narrow_plan(router, 96, whole_groups_of=32)
    output = write(plan, "demo", tmp_path / "smaller")
    assert router.path is not None
    old, new = weights(router.path), weights(output)
    for layer, planned in zip(router.layers, plan.layers, strict=True):
        module = f"{layer.path}.{layer.family.experts}.down_proj"
        before, after = unpacked(old, module, 64, 8), unpacked(new, module, 32, 8)
        for expert, kept in enumerate(planned.channels or ()):
            np.testing.assert_array_equal(after[expert], before[expert][:, list(kept)])


@pytest.mark.parametrize(("width", "group"), [(128, 64), (96, 32)])
def test_other_groups_are_quantised_again_to_half_a_step(
    width: int, group: int, tmp_path: Path
) -> None:
    """`demo` has 192 channels in groups of 64, of 8 bits."""
    router = ExpertRouter.from_pretrained("demo")
    plan = narrow_plan(router, width)
    assert router.path is not None
    output = write(plan, "demo", tmp_path / "smaller")
    config = json.loads((output / "config.json").read_text())
    old, new = weights(router.path), weights(output)
    for layer, planned in zip(router.layers, plan.layers, strict=True):
        module = f"{layer.path}.{layer.family.experts}.down_proj"
        assert config["quantization"].get(module, {"group_size": 64})["group_size"] == group
        before, after = unpacked(old, module, 64, 8), unpacked(new, module, group, 8)
        step = np.array(new[f"{module}.scales"].astype(mx.float32)).astype(np.float64)
        steps = np.repeat(np.abs(step), group, axis=-1)
        for expert, kept in enumerate(planned.channels or ()):
            gathered = before[expert][:, list(kept)]
            # Half a step for the code, and the end of the range is rounded to 16 bits itself.
            assert (np.abs(after[expert] - gathered) <= 1.1 * steps[expert]).all()
            error = np.linalg.norm(after[expert] - gathered) / np.linalg.norm(gathered)
            assert error < 0.006
    tokens = mx.array([router.encode("def add(a, b):\n    return a + b\n")])
    logits = load(str(output))[0](tokens)
    assert close(in_memory(router, plan).forward(tokens), logits)
    with simulated(router, plan):
        assert close(router.forward(tokens), logits, 0.05)


def test_a_width_that_is_no_whole_group_is_refused(tmp_path: Path) -> None:
    router = open_tiny("qwen3_moe", tmp_path, 4)
    with pytest.raises(UsageError, match="24 channels cannot be stored in affine quantisation"):
        write(narrow_plan(router, 24), tmp_path / "source", tmp_path / "smaller")
    assert not (tmp_path / "smaller").exists()


def test_a_plan_for_experts_of_another_width_is_refused(tmp_path: Path) -> None:
    router = open_tiny("qwen3_moe", tmp_path)
    plan = narrow_plan(router, 24)
    plan = replace(plan, model=replace(plan.model, expert_width=80))
    with pytest.raises(UsageError, match="those of layer 1 have 64"):
        write(plan, tmp_path / "source", tmp_path / "smaller")
