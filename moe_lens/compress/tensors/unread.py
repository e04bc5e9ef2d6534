"""Tensors of the parent's files that mlx-lm drops while it loads: towers and prediction heads.

A vision or audio tower has no routed experts, so it fits the smaller model as it fits the parent
and is carried along, byte for byte. A head that predicts further tokens (MTP) is a layer with the
parent's experts and its router, made for what the layers before it answered; it is left out.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from moe_lens.checkpoint_files.folder import open_tensors, stored_tensors, weight_files
from moe_lens.checkpoint_files.header import StoredTensor

_TOWERS = re.compile(
    r"(?:^|\.)(?:visual|vision|vision_\w+|audio_\w+|aligner|embed_(?:vision|audio)|image_\w+"
    r"|(?:multi_modal|mm)_projector|patch_merge_mlp)(?:\.|$)"
)
_HEADS = re.compile(r"(?:^|\.)(?:mtp\w*|nextn\w*)(?:\.|$)")
_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")

_HEAD_KEYS = frozenset(
    "num_nextn_predict_layers mtp_num_hidden_layers num_mtp_modules mtp_num_layers num_mtp_layers "
    "mtp_transformer_layers".split()
)
"""Keys of config.json that say how many prediction heads there are."""


@dataclass(frozen=True)
class Unread:
    """What the files of a checkpoint hold besides the model that mlx-lm builds of them."""

    towers: tuple[StoredTensor, ...] = ()
    """Go into the smaller model as they are."""
    stranded: tuple[StoredTensor, ...] = ()
    """Towers that do not: beside parameters under mlx-lm's names, mlx-lm would not drop them."""
    heads: tuple[StoredTensor, ...] = ()
    """Do not go into the smaller model."""

    @property
    def carried_bytes(self) -> int:
        """What goes along."""
        return sum(each.size for each in self.towers)

    def carried(self) -> dict[str, mx.array]:
        """The towers by name, lazily, their bytes as MLX reads them."""
        found = open_tensors({each.file for each in self.towers})
        return {each.name: found[each.name] for each in self.towers}

    def notes(self, layout: str) -> list[str]:
        """What becomes of them, for people.

        Args:
            layout: ``mlx``, or ``hf`` where tensors keep the names that the parent has for them.
        """
        found = []
        towers = self.towers if layout == "mlx" else (*self.towers, *self.stranded)
        if towers:
            size = sum(each.size for each in towers) / 1e6
            found.append(
                f"{_named(towers)}, {size:.3g} MB, is carried along as it is: mlx-lm does not read "
                "it, other programs do"
            )
        if self.stranded and layout == "mlx":
            found.append(
                f"{_named(self.stranded)} is left out: mlx-lm does not read it, and would not open "
                "a folder that has it beside its own names"
            )
        if self.heads:
            found.append(
                f"the head that predicts further tokens, {_named(self.heads)}, is left out: it was "
                "made for the parent's experts, and mlx-lm does not read it"
            )
        return found


def find_unread(model: nn.Module, folder: Path) -> Unread:
    """The towers and heads in the files of a checkpoint that mlx-lm does not read.

    Names suggest them; that mlx-lm drops them is tried: without them its own `sanitize` must give
    the same tensors.

    Args:
        model: As mlx-lm built it, with its parameters.
        folder: Of the checkpoint.
    """
    stored = stored_tensors(folder)
    read: dict[str, mx.array] = dict(tree_flatten(model.parameters()))
    depth = len(model.layers)
    kinds = {name: _kind(name, depth) for name in stored if name not in read}
    if not any(kinds.values()) or not hasattr(model, "sanitize"):
        return Unread()
    weights = open_tensors(weight_files(folder))
    found: dict[str, list[StoredTensor]] = {"tower": [], "stranded": [], "head": []}
    for (kind, _), names in _groups(kinds).items():
        rest = {name: value for name, value in weights.items() if name not in names}
        if not _same(model, rest, weights):
            continue  # mlx-lm reads it
        if kind == "tower" and not _same(model, read, read | {n: weights[n] for n in names}):
            kind = "stranded"
        found[kind] += [stored[name] for name in names]
    return Unread(tuple(found["tower"]), tuple(found["stranded"]), tuple(found["head"]))


def without_heads(config: dict[str, Any]) -> None:
    """Make a config say that there are no prediction heads, wherever it says how many."""
    for key, value in config.items():
        if isinstance(value, dict):
            without_heads(value)
        elif key in _HEAD_KEYS and type(value) is int:
            config[key] = 0


def _kind(name: str, depth: int) -> str | None:
    """What a tensor belongs to by its name; None: the language model."""
    if _TOWERS.search(name):
        return "tower"
    layer = _LAYER.search(name)
    beyond = layer is not None and int(layer[1]) >= depth
    return "head" if beyond or _HEADS.search(name) else None


def _groups(kinds: dict[str, str | None]) -> dict[tuple[str, str], set[str]]:
    """Tensors that come and go together: of one kind, under one beginning of their names."""
    groups: dict[tuple[str, str], set[str]] = {}
    for name, kind in kinds.items():
        if kind is not None:
            groups.setdefault((kind, _beginning(name)), set()).add(name)
    return groups


def _same(model: nn.Module, one: dict[str, mx.array], other: dict[str, mx.array]) -> bool:
    """Whether mlx-lm makes the same parameters of both."""
    try:
        made = [model.sanitize(dict(each)) for each in (one, other)]
    except Exception:
        return False  # an architecture that fails over them does not drop them
    shapes = [{name: (v.shape, v.dtype) for name, v in each.items()} for each in made]
    return shapes[0] == shapes[1]


def _beginning(name: str) -> str:
    """The first words of a name, up to the one that tells towers and heads apart."""
    words = name.split(".")
    for count in range(1, len(words)):
        beginning = ".".join(words[:count])
        if _TOWERS.search(beginning) or _HEADS.search(beginning):
            return beginning
    layer = _LAYER.search(name)
    return words[0] if layer is None else name[: layer.end() - 1]


def _named(tensors: tuple[StoredTensor, ...]) -> str:
    """The beginnings of their names, and how many there are."""
    found = sorted({_beginning(each.name) for each in tensors})
    named = " and ".join(found) if len(found) < 4 else f"{', '.join(found[:3])} and others"
    return f"{named} ({len(tensors)} tensor{'s' if len(tensors) > 1 else ''})"
