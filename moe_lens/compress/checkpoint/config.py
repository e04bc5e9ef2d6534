"""config.json of the smaller model: a few numbers change, wherever the architecture keeps them."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from moe_lens.checkpoint_files.config import read_config
from moe_lens.compress.hugging_face.exported import Export
from moe_lens.compress.plan.plan import Plan
from moe_lens.compress.tensors.parent import Parent
from moe_lens.compress.tensors.regroup import checked_groups
from moe_lens.compress.tensors.unread import without_heads
from moe_lens.errors import MoeLensError

from .config_keys import change_number, parts
from .expert_width import find_width_keys
from .model_file import name_counts

EXPERTS_KEYS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
K_KEYS = (
    "num_experts_per_tok",
    "num_experts_per_token",
    "experts_per_token",
    "moe_top_k",
    "moe_topk",
    "moe_k",
    "top_k_experts",
)

_FP4_EXPERTS = {
    "quant_method": "mxfp4",
    "modules_to_not_convert": [
        "model.layers.*.self_attn",
        "model.layers.*.mlp.router",
        "model.embed_tokens",
        "lm_head",
    ],
}
"""What gpt-oss says of its experts on the hub; no other model type has them there."""


def smaller_config(parent: Parent, plan: Plan) -> dict[str, Any]:
    """A copy of the parent's config for the model that `plan` describes.

    The keys that the family names are changed, and their synonyms where they say the same number,
    so that other programs that read another name agree.

    Raises:
        MoeLensError: The config does not hold the number of experts where it should.
    """
    config = copy.deepcopy(parent.config)
    model = plan.model
    changed = change_number(
        config, {parent.experts_key, *EXPERTS_KEYS}, model.num_experts, plan.num_experts
    )
    if parent.experts_key not in changed:
        raise MoeLensError(
            f"config.json of {parent.path} does not say {parent.experts_key} = "
            f"{model.num_experts}, although the weights do; it cannot be changed safely"
        )
    if plan.per_layer:
        name_counts(config, parent, plan, changed)
    if plan.expert_width is not None:
        keys = find_width_keys(
            parent.config, [layer.experts_path for layer in parent.layers], model.expert_width
        )
        keys.apply(config, model.expert_width, plan.expert_width)
    if plan.experts_per_token != model.experts_per_token:
        _change_k(config, parent, plan)
    if parent.unread.heads:
        without_heads(config)
    for key in ("quantization", "quantization_config"):
        if isinstance(config.get(key), dict):
            config[key] = _renumber(_regroup(config[key], parent, plan), parent, plan)
    if not parent.quantisations:
        for part in parts(config):
            # mlx-lm unpacks fp8 while loading: what is written is no longer fp8.
            part.pop("quantization_config", None)
    return config


def exported_config(parent: Parent, plan: Plan, export: Export) -> dict[str, Any]:
    """The config of the smaller model in the layout of Hugging Face transformers.

    It is that of the parent's file, without what mlx-lm's loader and converter add: a quantisation
    stays where the bytes still are what it says.
    """
    own = read_config(parent.path)
    config = smaller_config(replace(parent, config=own), plan)
    for key in ("quantization", "quantization_config"):
        config.pop(key, None)
    if export.own:
        for part, before in zip(parts(config), parts(own), strict=True):
            if "quantization_config" in before:
                part["quantization_config"] = copy.deepcopy(before["quantization_config"])
    elif parent.quantisations:
        config["quantization_config"] = copy.deepcopy(_FP4_EXPERTS)
    if not export.own:
        without_heads(config)  # the converter left them out, if there were any
    if architecture := MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config["model_type"]):
        config.setdefault("architectures", [architecture])
    return config


def _change_k(config: dict[str, Any], parent: Parent, plan: Plan) -> None:
    old, new = plan.model.experts_per_token, plan.experts_per_token
    if parent.k_key in change_number(config, {parent.k_key, *K_KEYS}, old, new):
        return
    # The config leaves k to the architecture's default: say it where the experts are said.
    for part in parts(config):
        if parent.experts_key in part:
            part[parent.k_key] = new


def _regroup(quantization: dict[str, Any], parent: Parent, plan: Plan) -> dict[str, Any]:
    """Name the group size of down projections whose width is no multiple of their old one."""
    named = dict(quantization)
    if plan.expert_width is None:
        return named
    for place, packed in parent.down_quantisations().items():
        found = checked_groups(packed, plan.expert_width)
        if found != packed:
            named[place] = {"group_size": found.group_size, "bits": found.bits, "mode": found.mode}
    return named


def _renumber(quantization: dict[str, Any], parent: Parent, plan: Plan) -> dict[str, Any]:
    """Settings of single experts (DBRX's list) under the new numbers of those that stay."""
    renumbered = dict(quantization)
    for layer in parent.layers:
        layer_plan = plan.layer(layer.layer)
        if layer.listed is None or layer_plan is None:
            continue
        prefix = f"{layer.listed}."
        old = {key: renumbered.pop(key) for key in list(renumbered) if key.startswith(prefix)}
        for number, group in enumerate(layer_plan.groups):
            source = f"{prefix}{group.experts[0]}."
            renumbered |= {
                f"{prefix}{number}.{key.removeprefix(source)}": value
                for key, value in old.items()
                if key.startswith(source)
            }
    return renumbered
