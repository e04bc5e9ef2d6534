"""What ``format="hf"`` writes, loaded by Hugging Face transformers itself: the same logits.

Needs PyTorch (``pip install moe-lens[torch]``), which nothing else of the tests does.
"""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any
from unittest import mock

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.utils import load_model

from hugging_face_cases import gpt_oss, in_pairs, pruned, tensors, write
from tiny_models import CONFIGS, save_checkpoint

torch = pytest.importorskip(
    "torch", reason="PyTorch is not installed, so transformers cannot load what is exported"
)

TOLERANCE = 1e-4
"""Largest difference of two logits, as a share of the largest logit."""

TOKENS = [[1, 5, 9, 3, 7, 2, 8, 4, 6, 11] * 2]

ROPE = dict(rope_type="default", rope_theta=10000.0)
MULTIMODAL_ROPE = dict(
    ROPE, type="default", mrope_section=[2, 1, 1], mrope_interleaved=True, partial_rotary_factor=0.5
)
KIMI_TOWER = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
MISTRAL_TOWER = dict(KIMI_TOWER, model_type="pixtral", head_dim=16, image_size=28, patch_size=14)
QWEN_TOWER = dict(
    depth=1, hidden_size=32, num_heads=2, intermediate_size=32, deepstack_visual_indexes=[0]
)
"""Vision towers that are made in no time; they take no part."""

FULL_MULTIMODAL_ROPE = dict(ROPE, mrope_section=[4, 2, 2], mrope_interleaved=True)

MODELS: dict[str, dict[str, Any]] = {
    "qwen3_moe": {},
    "qwen3_moe/nonorm": {},
    "qwen2_moe": {},
    "qwen3_next": {},
    "qwen3_5_moe": dict(text_config=dict(rope_parameters=MULTIMODAL_ROPE)),
    "mixtral": {},
    "olmoe": {},
    "mellum": {},
    "deepseek_v2": {},
    "deepseek_v3": {},
    "deepseek_v32": {},
    "glm4_moe": {},
    "glm4_moe_lite": {},
    "glm_moe_dsa": {},
    "dots1": {},
    "ernie4_5_moe": {},
    "exaone_moe": dict(rope_parameters=ROPE),
    "granitemoe": dict(tie_word_embeddings=True),
    "lfm2_moe": {},
    "llama4": {},
    "minimax": dict(model_type="minimax_m2"),
    "mistral4": {},
    "nemotron_h": {},
    "kimi_linear": dict(pad_token_id=0),
    "kimi_k25": dict(vision_config=KIMI_TOWER),
    "mistral3(mistral4)": dict(vision_config=MISTRAL_TOWER),
    "dbrx": {},
}
"""Types that transformers has, and what config.json must say besides, where the tiny one leaves it
to a default that transformers and mlx-lm do not share."""

OTHER_LOGITS: dict[str, dict[str, Any]] = {
    "afmoe": {},
    "gemma4": {},
    "gemma4_text": {},
    "granitemoehybrid": dict(tie_word_embeddings=True),
    "jamba": dict(tie_word_embeddings=True),
    "laguna": {},
    "phimoe": dict(attention_bias=True, lm_head_bias=True),
}
"""Types whose tiny models have other logits in transformers than in mlx-lm."""

MERGED = ("qwen3_moe", "qwen2_moe", "mixtral", "olmoe", "deepseek_v3", "glm4_moe", "granitemoe")

SAVED_OTHERWISE = ("llama4", "kimi_linear")
"""transformers reads their names on the hub, and saves without a prefix or under new ones."""

ABSENT = ("vision_tower", "visual", "projector", "moe_statics")
"""What the tiny models lack and transformers makes at random: towers, and what mlx-lm drops."""

OTHER_CLASS = ("mistral4", "mistral3(mistral4)", "kimi_k25", "qwen3_vl_moe")
"""Those that transformers knows together with a vision tower."""


def with_keys(config: dict[str, Any], keys: dict[str, Any]) -> dict[str, Any]:
    changed = copy.deepcopy(config)
    for key, value in keys.items():
        inner = changed.get(key)
        changed[key] = with_keys(inner, value) if isinstance(inner, dict) else value
    return changed


def made(name: str, folder: Path) -> Path:
    """The tiny model with the keys that transformers needs."""
    keys = (MODELS | OTHER_LOGITS)[name]
    with mock.patch.dict(CONFIGS, {name: with_keys(CONFIGS[name], keys)}):
        return save_checkpoint(name, folder, experts=16)


def loaded(folder: Path, name: str, **options: Any) -> Any:
    """The model of transformers, which misses nothing and finds nothing that it does not know."""
    import transformers

    kind = transformers.AutoModelForCausalLM
    if name in OTHER_CLASS:
        kind = transformers.AutoModelForImageTextToText
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model, told = kind.from_pretrained(
            folder,
            dtype=torch.float32,
            attn_implementation="eager",
            output_loading_info=True,
            **options,
        )
    assert not told["unexpected_keys"]
    assert not told["mismatched_keys"]
    assert all(any(each in key for each in ABSENT) for key in told["missing_keys"])
    return model.float().eval()


def check_names(model: Any, folder: Path, again: Path) -> None:
    """transformers saves what it read under the same names, to the same bits."""
    model.save_pretrained(again)
    ours, theirs = tensors(folder), tensors(again)
    names = {name for name in theirs if not any(each in name for each in ABSENT)}
    assert names == set(ours)
    assert all(bool(mx.array_equal(ours[name], theirs[name])) for name in ours)


def logits_of_mlx(folder: Path) -> np.ndarray:
    model, _ = load_model(folder)
    model.set_dtype(mx.float32)
    return np.array(model(mx.array(TOKENS)))


def compare(folder: Path, model: Any) -> None:
    ours = logits_of_mlx(folder)
    with torch.no_grad():
        theirs = model(torch.tensor(TOKENS)).logits.numpy()
    assert np.abs(ours - theirs).max() <= TOLERANCE * np.abs(ours).max()


@pytest.mark.slow
@pytest.mark.parametrize("name", [*MODELS, *OTHER_LOGITS])
def test_pruned_models_are_what_transformers_has(name: str, tmp_path: Path) -> None:
    source = made(name, tmp_path / "mlx")
    there = write(pruned(source, 8), source, tmp_path / "hf")
    model = loaded(there, name)
    if name not in OTHER_LOGITS:
        compare(there, model)
    if name not in SAVED_OTHERWISE:
        check_names(model, there, tmp_path / "again")


@pytest.mark.slow
@pytest.mark.parametrize("name", MERGED)
def test_merged_models_give_the_logits_of_mlx_lm(name: str, tmp_path: Path) -> None:
    source = made(name, tmp_path / "mlx")
    there = write(in_pairs(source), source, tmp_path / "merged")
    compare(there, loaded(there, name))
    if "n_group" not in CONFIGS[name]:  # a group must keep two experts
        again = write(in_pairs(there), there, tmp_path / "merged-again")
        compare(again, loaded(again, name))


@pytest.mark.slow
def test_experts_in_stacks_with_inputs_first(tmp_path: Path) -> None:
    """transformers tells by its shape which way round a stack lies, so it must not be square."""
    name = "qwen3_vl_moe"
    text = dict(moe_intermediate_size=96, rope_scaling=FULL_MULTIMODAL_ROPE)
    keys = dict(text_config=text, vision_config=QWEN_TOWER)
    with mock.patch.dict(CONFIGS, {name: with_keys(CONFIGS[name], keys)}):
        source = save_checkpoint(name, tmp_path / "mlx", experts=16)
    there = write(pruned(source, 8), source, tmp_path / "hf")
    compare(there, loaded(there, name))


@pytest.mark.slow
def test_gpt_oss_in_fp4_blocks(tmp_path: Path) -> None:
    from transformers import Mxfp4Config

    with mock.patch.dict(CONFIGS["gpt_oss"], rope_scaling=ROPE, rope_parameters=ROPE):
        source = gpt_oss(tmp_path / "mlx")
    there = write(pruned(source, 8), source, tmp_path / "hf")
    merged = write(in_pairs(there), there, tmp_path / "merged")
    for folder in (there, merged):
        options = {"quantization_config": Mxfp4Config(dequantize=True)}
        compare(folder, loaded(folder, "gpt_oss", **options))
