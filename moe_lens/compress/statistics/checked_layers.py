"""Whether the layers in a statistics file have the values and arrays that they must have."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import fields
from typing import Any

from numpy.typing import NDArray

from moe_lens.json_shape import fits

from .routed_sums import RoutedSums

LAYER = {"layer": int, "labels": {"*": int}, "halves": ([int], type(None))}

_SQUARES = {"together": "i", "cosine_sums": "f", "cosine_counts": "i"}
_SUMS = tuple(field.name for field in fields(RoutedSums) if field.name != "tokens")


def wrong_layers(
    layers: Any, arrays: Mapping[str, NDArray[Any]], num_experts: int, router_width: int
) -> str | None:
    """What is wrong with the layers of a file of this model; None: nothing."""
    if not fits(layers, [LAYER]) or not layers:
        return "its layers are missing or of the wrong kind"
    if len({layer["layer"] for layer in layers}) < len(layers):
        return "it has a layer twice"
    for layer in layers:
        for name, kind, shape in _expected(layer, num_experts, router_width):
            found = arrays.get(name)
            if found is None:
                return f"it has no {name}"
            if found.dtype.kind != kind or not _has_shape(found, shape):
                return f"{name} is {found.dtype} {list(found.shape)}, which cannot be"
        wrong = _wrong_further(layer, arrays, num_experts, router_width)
        if wrong is not None:
            return wrong
    return None


def _expected(
    layer: dict[str, Any], experts: int, width: int
) -> Iterator[tuple[str, str, tuple[int | None, ...]]]:
    """Name, kind of number and shape of every array that a layer must have; None: any size."""
    place = f"layers.{layer['layer']}"
    for name, kind in _SQUARES.items():
        yield f"{place}.{name}", kind, (experts, experts)
    yield f"{place}.sampled_ids", "u", (None, None)
    for part in _parts(layer):
        for name in _SUMS:
            if name != "output_sums":
                kind = "i" if name == "counts" else "f"
                yield f"{place}.{part}.{name}", kind, (experts,)


def _wrong_further(
    layer: dict[str, Any], arrays: Mapping[str, NDArray[Any]], experts: int, width: int
) -> str | None:
    """The same for arrays that need not be there, and for what arrays say."""
    place = f"layers.{layer['layer']}"
    further: dict[str, tuple[int | None, ...]] = {
        f"{place}.sampled_output_sums": (experts, None),
        f"{place}.logit_gram": (width, width),
        **{f"{place}.{part}.output_sums": (experts, None) for part in _parts(layer)},
    }
    for name, shape in further.items():
        found = arrays.get(name)
        if found is not None and (found.dtype.kind != "f" or not _has_shape(found, shape)):
            return f"{name} is {found.dtype} {list(found.shape)}, which cannot be"
    halves = layer["halves"]
    if halves is not None and len(halves) != 2:
        return f"layer {layer['layer']} has not two halves"
    sizes = [*layer["labels"].values(), *(halves or ())]
    ids = arrays[f"{place}.sampled_ids"]
    if min(sizes, default=0) < 0 or (ids.size and int(ids.max()) >= width):
        return f"layer {layer['layer']} counts what cannot be"
    return None


def _parts(layer: dict[str, Any]) -> list[str]:
    labels = [f"labels.{number}" for number in range(len(layer["labels"]))]
    return labels + [f"halves.{number}" for number in range(len(layer["halves"] or ()))]


def _has_shape(array: NDArray[Any], shape: tuple[int | None, ...]) -> bool:
    return array.ndim == len(shape) and all(
        size in (None, there) for size, there in zip(shape, array.shape, strict=True)
    )
