"""Every model type, pruned and written, loads in stock mlx-lm and equals the masked original."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.utils import load, load_model, quantize_model, save_config, save_model

from moe_lens.compress import Plan, write
from moe_lens.compress.checkpoint.checkpoint import write_checkpoint
from moe_lens.compress.tensors.parent import Parent
from moe_lens.errors import UsageError
from moe_lens.families import find_moe_layers
from moe_lens.families.declaration import attribute
from moe_lens.override import Override
from moe_lens.router import ExpertRouter
from tiny_models import CONFIGS, save_checkpoint
from twins import kept_per_layer, merge_plan, prune_plan

TOKENS = mx.array([[1, 5, 9, 3, 7, 2, 8, 4, 6, 11] * 4, [3] * 20 + [9, 1] * 10])


NO_TOKENIZER = {"muse_spark", "deepseek_v3/noshared"}
"""transformers refuses these tiny configurations when it looks for their tokenizer class, so
their weights are loaded without one."""


ROUNDS_ITS_OUTPUT = {"muse_spark"}
"""Its last hidden state is rounded to bfloat16: where a BLAS adds in another order for another
number of experts, one unit in the last place upstream moves a logit by a bfloat16 step."""

NOT_IN_4_BIT = {"muse_spark"}
"""Its own quantisation rule leaves experts in half precision, which the CPU cannot multiply."""


def open_router(name: str, folder: Path) -> ExpertRouter:
    if name not in NO_TOKENIZER:
        return ExpertRouter.from_pretrained(folder)
    model, config = load_model(folder)
    return ExpertRouter(model, None, config, path=folder)


def write_smaller(name: str, plan: Plan, source: Path, folder: Path) -> Path:
    if name not in NO_TOKENIZER:
        return write(plan, source, folder)
    model, config = load_model(source, lazy=True)
    folder.mkdir()
    write_checkpoint(Parent.of(model, None, config, source), plan, folder)
    return folder


def stock_load(name: str, folder: Path) -> nn.Module:
    return load_model(folder)[0] if name in NO_TOKENIZER else load(str(folder))[0]


def pruned_and_masked(name: str, folder: Path, quantise: int | None) -> tuple[mx.array, mx.array]:
    """Logits of the written model of 8 experts, and of the original with the other 8 masked."""
    source = save_checkpoint(name, folder / "source", quantise, experts=16)
    router = open_router(name, source)
    kept = kept_per_layer(router, 8)
    masks = {
        layer: Override(mask=[e for e in range(16) if e not in experts])
        for layer, experts in kept.items()
    }
    with router.override(masks):
        masked = router.forward(TOKENS)
        mx.eval(masked)
    output = write_smaller(name, prune_plan(router, kept), source, folder / "smaller")
    model = stock_load(name, output)
    assert {layer.num_experts for layer in find_moe_layers(model)} == {8}
    logits = model(TOKENS)
    mx.eval(logits)
    return logits, masked


@pytest.mark.slow
@pytest.mark.parametrize("name", CONFIGS)
def test_pruned_model_equals_the_masked_original(name: str, tmp_path: Path) -> None:
    pruned, masked = pruned_and_masked(name, tmp_path, None)
    tolerance = 2**-8 if name in ROUNDS_ITS_OUTPUT else 1e-5
    scale = float(mx.abs(masked).max())
    np.testing.assert_allclose(np.array(pruned), np.array(masked), atol=tolerance * scale, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in CONFIGS if name not in NOT_IN_4_BIT])
def test_pruned_4_bit_model_equals_the_masked_original(name: str, tmp_path: Path) -> None:
    pruned, masked = pruned_and_masked(name, tmp_path, 4)
    scale = float(mx.abs(masked).max())
    np.testing.assert_allclose(np.array(pruned), np.array(masked), atol=1e-5 * scale, rtol=0)


MERGED = (
    "qwen3_moe",
    "gpt_oss",
    "deepseek_v3",
    "mixtral",
    "gemma4",
    "lfm2_moe",
    "nemotron_h",
    "minimax",
    "dbrx",
    "longcat_flash",
    "llama4",
    "phimoe",
)


def save_in_mode(name: str, folder: Path, mode: str | None, *, routers_too: bool = False) -> Path:
    """The tiny model with 16 experts, quantised as ``mlx_lm.convert`` does it.

    With `routers_too`, everything is quantised that can be.
    """
    source = save_checkpoint(name, folder, experts=16)
    if mode is None:
        return source
    model, config = load_model(source)
    with contextlib.redirect_stdout(io.StringIO()):
        model, config = quantize_model(
            model,
            config,
            32,
            4,
            mode=mode,
            quant_predicate=(lambda path, module: True) if routers_too else None,
        )
    save_model(source, model, donate_model=True)
    save_config(config, source / "config.json")
    return source


def unpacked(module: nn.Module, rows: dict[str, mx.array]) -> np.ndarray:
    """The weight of some rows as float64, unpacked by MLX where it is packed."""
    weight = rows["weight"]
    if "scales" in rows:
        weight = mx.dequantize(
            weight,
            rows["scales"],
            rows.get("biases"),
            module.group_size,
            module.bits,
            module.mode,
            dtype=mx.float32,
        )
    return np.array(weight.astype(mx.float32)).astype(np.float64)


def repacked(module: nn.Module, rows: dict[str, mx.array], values: np.ndarray) -> np.ndarray:
    """What is left of `values` in the storage format of `module`."""
    if "scales" not in rows:
        return values
    kind = rows["scales"].dtype if module.mode == "affine" else mx.float32
    parts = mx.quantize(
        mx.array(values.astype(np.float32)).astype(kind),
        module.group_size,
        module.bits,
        mode=module.mode,
    )
    return unpacked(module, dict(zip(("weight", "scales", "biases"), parts, strict=False)))


def check_module(before: nn.Module, after: nn.Module, groups: Sequence[tuple[int, ...]]) -> None:
    """Rows of `after` against a float64 mean of rows of `before`; kept rows to the last bit."""
    old = {name: value for name, value in before.items() if isinstance(value, mx.array)}
    new = {name: value for name, value in after.items() if isinstance(value, mx.array)}
    assert set(old) == set(new)
    for number, group in enumerate(groups):
        made = {name: value[number : number + 1] for name, value in new.items()}
        parts = [{n: v[e : e + 1] for n, v in old.items()} for e in group]
        assert {n: v.dtype for n, v in made.items()} == {n: v.dtype for n, v in parts[0].items()}
        if len(group) == 1:
            assert all(bool(mx.array_equal(made[name], parts[0][name])) for name in made)
            continue
        shares = [0.5, *[0.5 / (len(group) - 1)] * (len(group) - 1)]
        mean = sum(s * unpacked(before, p) for s, p in zip(shares, parts, strict=True))
        expected = repacked(before, parts[0], mean)
        # A mean on the edge between two codes may fall to the other side in float32.
        close = np.isclose(unpacked(after, made), expected, rtol=1e-5, atol=1e-6)
        assert close.mean() > 0.999
        for name in set(made) - {"weight", "scales", "biases"}:
            values = [np.array(p[name].astype(mx.float32)) for p in parts]
            mean = sum(s * v for s, v in zip(shares, values, strict=True))
            np.testing.assert_allclose(np.array(made[name].astype(mx.float32)), mean, rtol=1e-5)


def check_vector(
    before: nn.Module, after: nn.Module, name: str, groups: Sequence[tuple[int, ...]]
) -> None:
    """A selection bias or per-expert scale: the same shares, one value for each new expert."""
    old = np.array(dict(tree_flatten(before.parameters()))[name]).astype(np.float64)
    new = np.array(dict(tree_flatten(after.parameters()))[name])
    assert len(new) == len(groups)
    for value, group in zip(new, groups, strict=True):
        shares = [1.0] if len(group) == 1 else [0.5, *[0.5 / (len(group) - 1)] * (len(group) - 1)]
        np.testing.assert_allclose(value, np.dot(shares, old[list(group)]), rtol=1e-5, atol=1e-7)


def groups_of_each_layer(router: ExpertRouter) -> dict[int, list[tuple[int, ...]]]:
    """10 new experts of 16, with groups of 1, 2 and 3, other ones in every layer."""
    groups = {}
    for number, layer in enumerate(router.layers):
        if layer.groups is None:
            shift = number
            ids = [(e + shift) % 16 for e in range(16)]
            cuts = [ids[0:3], ids[3:5], ids[5:7], ids[7:9], ids[9:10], *[[e] for e in ids[10:15]]]
            cuts[4] = [*cuts[4], ids[15]]
            groups[layer.index] = sorted(tuple(sorted(cut)) for cut in cuts)
        else:
            groups[layer.index] = [
                group
                for start in range(0, 16, 4)
                for group in ((start, start + 2), (start + 1,), (start + 3,))
            ]
    return groups


@pytest.mark.slow
@pytest.mark.parametrize("mode", [None, "affine", "mxfp4"])
@pytest.mark.parametrize("name", MERGED)
def test_merged_rows_are_the_weighted_mean(name: str, mode: str | None, tmp_path: Path) -> None:
    source = save_in_mode(name, tmp_path / "source", mode, routers_too=True)
    router = ExpertRouter.from_pretrained(source)
    groups = groups_of_each_layer(router)
    output = write(merge_plan(router, groups), source, tmp_path / "smaller")
    smaller = ExpertRouter.from_pretrained(output)
    for before, after in zip(router.layers, smaller.layers, strict=True):
        here = groups[before.index]
        identity = [(row,) for row in range(before.num_experts, before.router_width)]
        check_module(before.router, after.router, [*here, *identity])
        for extra in (before.selection_bias_name, before.per_expert_scale_name):
            if extra is not None:
                check_vector(router.model, smaller.model, extra, [*here, *identity])
        if before.list_experts:
            for projection in ("w1", "v1", "w2"):
                check_module(
                    stack(before.experts, projection), stack(after.experts, projection), here
                )
            continue
        for path, module in before.experts.named_modules():
            if hasattr(module, "num_experts"):
                check_module(module, attribute(after.experts, path or "."), here)
    assert bool(mx.isfinite(smaller.forward(TOKENS)).all())


def stack(experts: Sequence[nn.Module], projection: str) -> nn.Module:
    """One module with an expert axis out of a list of experts (DBRX)."""
    modules = [expert[projection] for expert in experts]
    stacked = nn.Module()
    for name, value in modules[0].items():
        if isinstance(value, mx.array):
            stacked[name] = mx.stack([module[name] for module in modules])
    for name in ("group_size", "bits", "mode"):
        if hasattr(modules[0], name):
            setattr(stacked, name, getattr(modules[0], name))
    return stacked


def test_layers_of_one_expert_are_refused_where_mlx_lm_builds_a_dense_layer(
    tmp_path: Path,
) -> None:
    router = ExpertRouter.from_pretrained(save_checkpoint("jamba", tmp_path / "source"))
    one = {layer.index: [0] for layer in router.layers}
    plan = replace(prune_plan(router, one), experts_per_token=1)
    with pytest.raises(UsageError, match="at least 2"):
        write(plan, tmp_path / "source", tmp_path / "smaller")
    assert not (tmp_path / "smaller").exists()
