"""How many bytes a smaller model takes, for every number and width of its experts.

Counted exactly from the parent's tensors, which are not read for it: what belongs to every expert
and every router row enters as often as it stays, what belongs to every channel likewise, and all
else stays as it is.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

import mlx.core as mx
from mlx.utils import tree_flatten

from moe_lens.errors import UsageError
from moe_lens.experts.quantisation import Quantisation

from .parent import LayerTensors, Parent
from .regroup import checked_groups

_HEADER_BYTES = 128
"""At most what a tensor takes in the header of a safetensors file, beside its name twice."""


@dataclass(frozen=True)
class Shape:
    """The numbers that make a model smaller: experts of a layer, channels of an expert."""

    num_experts: int
    expert_width: int


@dataclass(frozen=True)
class SizeTable:
    """Bytes of the weight files of a smaller model.

    `fixed` bytes stay whatever goes (attention, embeddings, shared experts, and the headers of
    the files); each expert takes `per_expert` bytes, its router rows included, and `per_channel`
    bytes for each of its channels, over all layers. `scales` are the bytes for each channel of
    what goes with the groups of quantised down projections, of which there are more where a width
    needs smaller groups (`regroup`).
    """

    full: Shape
    fixed: int
    per_expert: Fraction
    per_channel: Fraction
    scales: tuple[tuple[Quantisation, Fraction], ...] = ()
    by_layer: tuple[tuple[int, int], ...] = ()
    """For every layer what one expert of full width takes, its router rows included."""

    @classmethod
    def of(cls, parent: Parent, *, named_apart: bool = False) -> SizeTable:
        """Count the tensors of an opened checkpoint.

        Args:
            parent: Nothing of it is read.
            named_apart: Every expert is written under names of its own, which take room as well.
        """
        arrays: dict[str, mx.array] = dict(tree_flatten(parent.model.parameters()))
        experts = {name: layer for layer in parent.layers for name in layer.experts}
        routers = {name: layer for layer in parent.layers for name in layer.routers}
        width = parent.layers[0].width
        count = _num_experts(parent.layers[0], arrays)
        fixed, each, channel = parent.unread.carried_bytes, Fraction(0), Fraction(0)
        layers: dict[int, Fraction] = defaultdict(Fraction)
        scales: dict[Quantisation, Fraction] = defaultdict(Fraction)
        for name in (*arrays, *(tower.name for tower in parent.unread.towers)):
            fixed += _HEADER_BYTES + 2 * len(name)
        for name, value in arrays.items():
            if name in experts:
                if named_apart:
                    each += _HEADER_BYTES + 2 * len(name)
                share = Fraction(value.nbytes, count)
                layers[experts[name].layer] += share
                packed = _grouped_by_channels(name, experts[name], parent)
                if packed is not None:
                    scales[packed] += share / width
                elif _has_channels(name, experts[name]):
                    channel += share / width
                else:
                    each += share
            elif name in routers:
                row = value.nbytes // value.shape[0]
                each += row
                layers[routers[name].layer] += row
                fixed += row * (value.shape[0] - count)  # identity experts stay
            else:
                fixed += value.nbytes
        own = tuple((layer, math.ceil(size)) for layer, size in layers.items())
        return cls(Shape(count, width), fixed, each, channel, tuple(scales.items()), own)

    def bytes(self, shape: Shape) -> int:
        """Of the weight files, headers included; never less than what is written."""
        width = shape.expert_width
        channel = self.per_channel
        for packed, each in self.scales:
            channel += each * Fraction(packed.group_size, checked_groups(packed, width).group_size)
        return self.fixed + math.ceil(shape.num_experts * (self.per_expert + channel * width))

    def of_counts(self, counts: Mapping[int, int]) -> int:
        """Like `bytes`, where each layer keeps its own number of experts of full width."""
        return self.fixed + sum(counts[layer] * size for layer, size in self.by_layer)

    def share(self, shape: Shape) -> float:
        """Bytes of the experts (and their router rows) as a share of the parent's."""
        return (self.bytes(shape) - self.fixed) / (self.bytes(self.full) - self.fixed)

    def most_experts(self, limit: int, width: int, possible: Iterable[int]) -> int | None:
        """The largest number of `possible` with which experts of `width` fit into `limit` bytes."""
        fitting = (n for n in possible if self.bytes(Shape(n, width)) <= limit)
        return max(fitting, default=None)

    def widest(self, limit: int, num_experts: int, possible: Iterable[int]) -> int | None:
        """The largest width of `possible` with which that many experts fit into `limit` bytes."""
        fitting = (w for w in possible if self.bytes(Shape(num_experts, w)) <= limit)
        return max(fitting, default=None)

    def too_small(self, limit: int, shapes: Sequence[Shape]) -> UsageError:
        """The refusal of a size that none of `shapes` fits; names the smallest that is possible."""
        smallest = min(shapes, key=lambda shape: (self.bytes(shape), shape.expert_width))
        return UsageError(
            f"{limit / 1e9:g} GB cannot be reached: what stays in any case takes "
            f"{self.fixed / 1e9:.4g} GB, and the smallest possible model (experts "
            f"{self.full.num_experts} -> {smallest.num_experts}, channels in each "
            f"{self.full.expert_width} -> {smallest.expert_width}) takes "
            f"{_up(self.bytes(smallest)):g} GB; give at least that"
        )


def _num_experts(layer: LayerTensors, arrays: dict[str, mx.array]) -> int:
    if layer.listed is None:
        return int(arrays[layer.experts[0]].shape[0])
    numbers = {name.removeprefix(f"{layer.listed}.").partition(".")[0] for name in layer.experts}
    return len(numbers)


def _has_channels(name: str, layer: LayerTensors) -> bool:
    """Whether a tensor of the experts shrinks with their width."""
    module, _, leaf = name.rpartition(".")
    if leaf == "global_scale":
        return False
    return module.rpartition(".")[2] != layer.down or leaf != "bias"


def _grouped_by_channels(name: str, layer: LayerTensors, parent: Parent) -> Quantisation | None:
    """How the down projection is packed, if the tensor has a number for each of its groups."""
    module, _, leaf = name.rpartition(".")
    if module.rpartition(".")[2] != layer.down or leaf not in ("scales", "biases"):
        return None
    return parent.quantisations[module]


def _up(size: int) -> float:
    """Gigabytes, rounded up to 6 places, so that the number shown is one that works."""
    return float(-(-size // 1000)) / 1e6
