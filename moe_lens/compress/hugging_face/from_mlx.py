"""The tensors of the smaller model, taken back from mlx-lm's layout to that of the hub.

For a parent that was converted for MLX and is not quantised. Everything is lazy but the few
vectors that mlx-lm adds 1 to: whether that can be taken back exactly depends on their values.
"""

from __future__ import annotations

import mlx.core as mx

from moe_lens.compress.tensors.parent import LayerTensors, Parent
from moe_lens.errors import UnsupportedModelError

from .expert_layout import LayoutError, Tensors
from .layouts import Layout

_KEYS, _VALUES = ".embed_q.weight", ".unembed_out.weight"

REMEDY = "leave --format hf out, or start from the checkpoint on the hub that it was converted from"


def from_mlx(parent: Parent, smaller: Tensors, layout: Layout) -> tuple[Tensors, frozenset[str]]:
    """All tensors of the smaller model, under the names that they have on the hub.

    Args:
        parent: In mlx-lm's layout.
        smaller: The parameters of the smaller model, under mlx-lm's names; emptied.
        layout: Of the model type.

    Returns:
        The tensors, and the names of those that belong to experts and routers.

    Raises:
        UnsupportedModelError: They cannot be taken back, with the reason.
    """
    blocks = [layer.path for layer in parent.layers]
    experts = {layer.path: stacked_experts(layer, smaller) for layer in parent.layers}
    owners = {name: layer.path for layer in parent.layers for name in _names(layer, smaller)}
    made: Tensors = {}
    routed: set[str] = set()
    routers = {name for layer in parent.layers for name in layer.routers}
    for name in list(smaller):
        if name not in smaller:
            continue
        if (path := owners.get(name)) is not None:
            if path in experts:
                place = layout.rename(path, blocks)
                unstacked = _unstacked(parent, layout, experts.pop(path))
                new = {f"{place}.{each}": value for each, value in unstacked.items()}
                made |= new
                routed |= set(new)
            del smaller[name]
            continue
        renamed = layout.rename(name, blocks)
        value = smaller.pop(name)
        if layout.latent and name.endswith(_KEYS):
            place = name.removesuffix(_KEYS)
            value = _latent(value, smaller.pop(place + _VALUES))
            renamed = f"{place}.kv_b_proj.weight"
        elif name.endswith(layout.convolutions):
            value = value.swapaxes(1, 2)
        elif name.endswith(layout.one_plus):
            value = _less_one(name, value)
        made[renamed] = value
        if name in routers:
            routed.add(renamed)
    return made, frozenset(routed)


def stacked_experts(layer: LayerTensors, smaller: Tensors) -> Tensors:
    """The experts of a layer as stacks [E, ...], by projection and leaf (``gate_proj.weight``)."""
    place = f"{layer.experts_path}."
    if layer.listed is None:
        return {name.removeprefix(place): smaller[name] for name in layer.experts}
    rows: dict[str, list[mx.array]] = {}
    for name in _names(layer, smaller):
        _, _, rest = name.removeprefix(place).partition(".")
        rows.setdefault(rest, []).append(smaller[name])
    return {name: mx.stack(values) for name, values in rows.items()}


def _names(layer: LayerTensors, smaller: Tensors) -> list[str]:
    """The names of the experts of a layer in the smaller model, by number."""
    if layer.listed is None:
        return list(layer.experts)
    place = f"{layer.experts_path}."
    return [name for name in smaller if name.startswith(place)]


def _unstacked(parent: Parent, layout: Layout, stacked: Tensors) -> Tensors:
    try:
        return layout.experts[0].unstack(stacked)
    except LayoutError as error:
        raise UnsupportedModelError(
            f"Hugging Face checkpoints of {parent.config['model_type']} that mlx-lm reads do not "
            f"store such experts ({error}); {REMEDY}"
        ) from error


def _latent(embed: mx.array, unembed: mx.array) -> mx.array:
    """The projection [heads x (keys + values), rank] that mlx-lm splits into these two."""
    both = mx.concatenate([embed.swapaxes(-1, -2), unembed], axis=1)
    return both.flatten(0, 1)


def _less_one(name: str, value: mx.array) -> mx.array:
    found = value - 1.0
    if not bool(mx.array_equal(found + 1.0, value)):
        raise UnsupportedModelError(
            f"{name} is 1 more than on the hub, and {value.dtype} has lost bits of it beyond "
            f"return; {REMEDY}"
        )
    return found
