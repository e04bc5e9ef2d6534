"""Random models from the tiny configurations, in memory or as a checkpoint folder."""

from __future__ import annotations

import contextlib
import copy
import io
import json
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.utils import _get_classes, quantize_model, save_config, save_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tiny_models.configs import CONFIGS
from tiny_models.sizes import EXPERTS, VOCAB, Config

GROUP_SIZE = 32
"""Quantisation group: the widths of the tiny models are multiples of 32, not of 64."""

_ROUTERS = ("gate", "router", "wg", "classifier")
_EXPERT_COUNT_KEYS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")


def config_of(name: str, *, experts: int | None = None) -> Config:
    """The ``config.json`` of a tiny model; ``experts`` asks for another number than 8."""
    config = copy.deepcopy(CONFIGS[name])
    if experts is not None and experts != EXPERTS:
        _set_expert_count(config, experts)
    return config


def _set_expert_count(config: Config, experts: int) -> None:
    for key, value in config.items():
        if isinstance(value, dict):
            _set_expert_count(value, experts)
        elif key in _EXPERT_COUNT_KEYS:
            config[key] = experts


def build(
    name: str,
    *,
    dtype: mx.Dtype | None = None,
    quantise: int | None = None,
    seed: int = 0,
    experts: int | None = None,
) -> tuple[nn.Module, Config]:
    """Builds the tiny model ``name`` with random weights.

    Args:
        name: a key of :data:`tiny_models.CONFIGS`.
        dtype: floating-point type of the weights; None leaves float32. Parameters that the model
            itself protects from casts (its ``cast_predicate``) keep their type.
        quantise: bits per weight, quantised after the cast, under the model's own predicate.
        seed: the same seed gives the same weights.
        experts: another number of experts than the configuration's 8.

    Returns:
        the model, evaluated, and its configuration (with ``quantization`` where quantised).
    """
    config = config_of(name, experts=experts)
    model_class, arguments_class = _get_classes(config)
    mx.random.seed(seed)
    model = model_class(arguments_class.from_dict(copy.deepcopy(config)))
    _randomise(model, seed)
    if dtype is not None:
        _cast(model, dtype)
    if quantise is not None:
        with contextlib.redirect_stdout(io.StringIO()):
            model, config = quantize_model(model, config, GROUP_SIZE, quantise)
    model.eval()
    mx.eval(model.parameters())
    return model, config


def _randomise(model: nn.Module, seed: int) -> None:
    """Fills what constructors leave at zero or one value, which would hide mistakes.

    Raw router weights and correction biases start as zeros: every expert would tie.
    """
    mx.random.seed(seed)
    changed = []
    for name, value in tree_flatten(model.parameters()):
        parent = name.split(".")[-2:-1]
        if mx.issubdtype(value.dtype, mx.floating) and value.size > 1 and not mx.any(value).item():
            spread = 0.1 if value.ndim == 1 else 0.25
            changed.append((name, (mx.random.normal(value.shape) * spread).astype(value.dtype)))
        elif name.endswith("per_expert_scale"):
            changed.append((name, mx.random.uniform(0.5, 1.5, value.shape)))
        elif value.ndim == 2 and parent and parent[0] in _ROUTERS:
            changed.append((name, mx.random.normal(value.shape) * 0.25))
    model.update(tree_unflatten(changed))


def _cast(model: nn.Module, dtype: mx.Dtype) -> None:
    may_cast = getattr(model, "cast_predicate", lambda _: True)
    cast = [
        (name, value.astype(dtype))
        for name, value in tree_flatten(model.parameters())
        if may_cast(name) and mx.issubdtype(value.dtype, mx.floating)
    ]
    model.update(tree_unflatten(cast))


def save_checkpoint(
    name: str,
    folder: str | Path,
    quantise: int | None = None,
    experts: int | None = None,
    *,
    dtype: mx.Dtype | None = None,
    seed: int = 0,
) -> Path:
    """Writes the tiny model ``name`` as a folder that stock ``mlx_lm.load`` opens.

    It holds ``config.json``, the weights, a ``generation_config.json`` and a tokenizer of whole
    words: ``"w17 w3"`` is the tokens 17 and 3, anything else is ``<unk>``.

    Returns:
        the folder.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    model, config = build(name, dtype=dtype, quantise=quantise, seed=seed, experts=experts)
    save_model(folder, model, donate_model=True)
    save_config(config, folder / "config.json")
    generation = {"eos_token_id": VOCAB - 1, "do_sample": False}
    (folder / "generation_config.json").write_text(json.dumps(generation))
    _tokenizer().save_pretrained(folder)
    return folder


def _tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {f"w{i}": i for i in range(VOCAB - 2)}
    vocabulary |= {"<unk>": VOCAB - 2, "</s>": VOCAB - 1}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", eos_token="</s>")
