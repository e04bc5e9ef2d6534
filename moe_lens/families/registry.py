"""Every block class that moe-lens knows, and how the MoE layers of a live model are found."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from difflib import get_close_matches
from typing import Any

import mlx.nn as nn
from mlx_lm.utils import MODEL_REMAPPING

from moe_lens.errors import UnsupportedModelError

from . import (
    bailing_moe,
    dbrx,
    deepseek_v2,
    deepseek_v3,
    gemma4_text,
    llama4,
    longcat_flash,
    minimax,
    mixtral,
    muse_spark,
    phimoe,
    qwen3_moe,
)
from .declaration import OVERRIDES, VALUES, Block
from .layer import MoELayer, enclosing
from .unknown import find_unknown

FAMILIES = {
    module.__name__.rpartition(".")[2]: module.BLOCKS
    for module in (
        qwen3_moe,
        mixtral,
        gemma4_text,
        minimax,
        deepseek_v3,
        deepseek_v2,
        bailing_moe,
        llama4,
        dbrx,
        longcat_flash,
        phimoe,
        muse_spark,
    )
}
"""The blocks of each family, by the model type that names it."""

_BY_CLASS: dict[tuple[str, str], Block] = {
    (block.model_type, block.name): block for blocks in FAMILIES.values() for block in blocks
}


def _declared(module: nn.Module) -> Block | None:
    for cls in type(module).__mro__:
        block = _BY_CLASS.get((cls.__module__.rpartition(".")[2], cls.__name__))
        if block is not None and cls.__module__.startswith("mlx_lm."):
            return block
    return None


def _has_experts(module: nn.Module, block: Block) -> bool:
    """Whether this instance routes: Gemma 4's decoder layer also comes without experts."""
    return block.experts.partition(".")[0] in module


def find_moe_layers(model: nn.Module) -> list[MoELayer]:
    """The MoE layers of a model that ``mlx_lm.load`` returned, by layer index.

    Raises:
        UnsupportedModelError: If no module of the model holds routed experts.
    """
    modules = dict(model.named_modules())
    layers = []
    for path, module in modules.items():
        block = _declared(module)
        if block is None or not _has_experts(module, block):
            continue
        parent = enclosing(modules, path)
        index = next((int(part) for part in path.split(".") if part.isdigit()), -1)
        layers.append(MoELayer(index, path, module, parent, block))
    layers += find_unknown(model, {layer.path for layer in layers})
    if not layers:
        raise UnsupportedModelError(
            f"{type(model).__module__.rpartition('.')[2]} is a dense model: none of its layers "
            "has routed experts, so there is no routing to see or change "
            "(`moe-lens families` lists the model types that have)"
        )
    return sorted(layers, key=lambda layer: layer.index)


@dataclass(frozen=True)
class Support:
    """What moe-lens can do with one model type of mlx-lm."""

    model_type: str
    alias_of: str | None
    """The model type whose code mlx-lm runs for this name; None: its own."""
    family: str
    block: str
    seam: str
    values: tuple[str, ...]
    overrides: tuple[str, ...]
    without: dict[str, str]
    """What is missing, each with the reason."""
    experts_key: str
    k_key: str
    note: str

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def _support(model_type: str, family: str, block: Block) -> Support:
    without = dict(block.without)
    if block.shared is None:
        without.setdefault("shared_output", "the architecture has no shared expert")
    return Support(
        model_type=model_type,
        alias_of=MODEL_REMAPPING.get(model_type),
        family=family,
        block=block.name,
        seam=block.seam,
        values=tuple(value for value in VALUES[:6] if value not in without),
        overrides=tuple(name for name in OVERRIDES if name not in without),
        without=without,
        experts_key=block.experts_key,
        k_key=block.k_key,
        note=block.note,
    )


def all_supported() -> list[Support]:
    """Every model type of mlx-lm that moe-lens knows, by name."""
    found = [
        _support(model_type, family, block)
        for family, blocks in FAMILIES.items()
        for block in blocks
        for model_type in block.model_types
    ]
    return sorted(found, key=lambda support: support.model_type.lower())


def support(model_type: str) -> Support:
    """What moe-lens can do with `model_type`.

    Raises:
        UnsupportedModelError: If no family declares it.
    """
    known = {found.model_type: found for found in all_supported()}
    if model_type in known:
        return known[model_type]
    near = get_close_matches(model_type, known, n=1)
    raise UnsupportedModelError(
        f"{model_type} is not a model type that moe-lens knows"
        + (f" (did you mean {near[0]}?)" if near else "")
        + "; a block with a Switch layer can still be captured, but not overridden "
        "(`moe-lens families` lists the known ones)"
    )
