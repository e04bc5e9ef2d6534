"""The checkpoint that is made smaller: loaded lazily by stock mlx-lm, in its own dtypes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_map

from moe_lens.experts.quantisation import Quantisation
from moe_lens.families import MoELayer, down_name, find_moe_layers
from moe_lens.loading import load

from .size import Size
from .unread import Unread, find_unread


@dataclass(frozen=True)
class LayerTensors:
    """The names of the parameters of one MoE layer that a plan changes.

    `experts` have one row for each expert and `routers` one for each router logit. Where experts
    are modules of their own, `listed` is the path of their list and `experts` the parameters of
    all of them. `down` is the last name of the down projection, whose input are the channels; the
    others lead to the channels. Of the `routers`, those in the module `projection` make the
    logits; `selection_bias` and `scale` are full names, or None.
    """

    layer: int
    path: str
    experts_path: str
    experts: tuple[str, ...]
    routers: tuple[str, ...]
    projection: str
    selection_bias: str | None
    scale: str | None
    listed: str | None
    down: str
    width: int

    @classmethod
    def of(cls, layer: MoELayer) -> LayerTensors:
        """Read them off the live layer."""
        experts_path = f"{layer.path}.{layer.family.experts}"
        return cls(
            layer=layer.index,
            path=layer.path,
            experts_path=experts_path,
            experts=tuple(layer.expert_parameters()),
            routers=tuple(layer.router_parameters()),
            projection=f"{layer.path}.{layer.family.logits}",
            selection_bias=layer.selection_bias_name,
            scale=layer.per_expert_scale_name,
            listed=experts_path if layer.list_experts else None,
            down=down_name(layer.experts[0] if layer.list_experts else layer.experts),
            width=layer.expert_width,
        )


@dataclass(frozen=True)
class Parent:
    """A checkpoint opened for compression; nothing of its weights is read yet."""

    path: Path
    config: dict[str, Any]
    model: nn.Module
    tokenizer: Any
    layers: tuple[LayerTensors, ...]
    quantisations: dict[str, Quantisation]
    """How packed weights are stored, by module path."""
    experts_key: str
    k_key: str
    size: Size
    unread: Unread

    @classmethod
    def of(cls, model: nn.Module, tokenizer: Any, config: dict[str, Any], path: Path) -> Parent:
        """Take what stock mlx-lm loaded lazily; its parameters will be taken from it."""
        layers = find_moe_layers(model)
        packed = {
            place: found
            for place, module in model.named_modules()
            if (found := Quantisation.of(module)) is not None
        }
        return cls(
            path=path,
            config=config,
            model=model,
            tokenizer=tokenizer,
            layers=tuple(LayerTensors.of(layer) for layer in layers),
            quantisations=packed,
            experts_key=layers[0].family.experts_key,
            k_key=layers[0].family.k_key,
            size=Size.of(model),
            unread=find_unread(model, path),
        )

    def down_quantisations(self) -> dict[str, Quantisation]:
        """How the down projections of the experts are packed, by module path; {}: they are not."""
        paths = [
            name.removesuffix(".weight")
            for layer in self.layers
            for name in layer.experts
            if name.endswith(f"{layer.down}.weight")
        ]
        return {path: self.quantisations[path] for path in paths if path in self.quantisations}

    def take_parameters(self) -> dict[str, mx.array]:
        """The parameters by name, which the model lets go of.

        Afterwards whoever drops an entry frees its memory. A second call has nothing to give:
        open the parent again.
        """
        parameters = dict(tree_flatten(self.model.parameters()))
        release(self.model)
        return parameters


def release(model: nn.Module) -> None:
    """Make a model let go of its parameters; its modules stay."""
    model.update(tree_map(lambda _: mx.zeros(()), model.parameters()))


def open_parent(
    name: str | Path, *, revision: str | None = None, trust_remote_code: bool = False
) -> Parent:
    """Open a checkpoint without reading its weights.

    Raises:
        UnsupportedModelError: The model has no routed experts.
    """
    model, tokenizer, config, path = load(
        name, revision=revision, trust_remote_code=trust_remote_code, lazy=True
    )
    return Parent.of(model, tokenizer, config, path)
