"""How checkpoints of Hugging Face store the experts of a layer, and what mlx-lm's stacks become.

mlx-lm has one tensor with an expert axis for each projection. Its loaders make that out of one
tensor for each expert, or of stacks in which two projections are joined; here is the way back.
Names are those inside the block: ``experts.3.w1.weight``. Everything is lazy.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import mlx.core as mx

Tensors = dict[str, mx.array]

_FP4_BLOCK_BYTES = 16
"""32 numbers of 4 bits."""


class LayoutError(Exception):
    """The experts cannot be stored like this; the message says why."""


@dataclass(frozen=True)
class Numbered:
    """One tensor for each expert and projection, such as ``experts.3.w1.weight``.

    `names` are the projections that are called differently than in mlx-lm.
    """

    place: str = "experts"
    names: Mapping[str, str] = field(default_factory=dict)

    def holds(self, name: str) -> bool:
        """Whether a tensor of the block belongs to its experts."""
        return self._number(name) is not None

    def expected(self, names: Iterable[str], count: int) -> set[str]:
        """Of the parent's names, those that a layer of `count` experts has."""
        return {name for name in names if (self._number(name) or 0) < count}

    def unstack(self, stacked: Mapping[str, mx.array]) -> Tensors:
        """The tensors of mlx-lm's stacks, by projection and leaf (``gate_proj.weight``)."""
        made: Tensors = {}
        for name, value in stacked.items():
            projection, _, leaf = name.rpartition(".")
            own = self.names.get(projection, projection)
            made |= {f"{self.place}.{e}.{own}.{leaf}": value[e] for e in range(value.shape[0])}
        return made

    def move(self, tensors: Mapping[str, mx.array], kept: Sequence[int], count: int) -> Tensors:
        """The tensors of the experts that stay, under their new numbers, byte for byte."""
        new = {old: number for number, old in enumerate(kept)}
        moved: Tensors = {}
        for name, value in tensors.items():
            number = self._number(name)
            assert number is not None
            if number in new:
                rest = name[len(f"{self.place}.{number}.") :]
                moved[f"{self.place}.{new[number]}.{rest}"] = value
        return moved

    def _number(self, name: str) -> int | None:
        found = re.match(rf"{re.escape(self.place)}\.(\d+)\.", name)
        return None if found is None else int(found[1])


@dataclass(frozen=True)
class Stack:
    """One tensor with an expert axis, and the projections of mlx-lm that it joins.

    Args:
        name: Of the tensor.
        parts: The tensors of mlx-lm, joined along the outputs in this order.
        interleaved: Rows of the parts take turns.
        transposed: Inputs come before outputs.
        blocks: Packed 4-bit numbers lie in blocks of 16 bytes, not in words.
        flat: The expert axis is joined with the next one.
    """

    name: str
    parts: tuple[str, ...]
    interleaved: bool = False
    transposed: bool = False
    blocks: bool = False
    flat: bool = False

    def join(self, parts: Sequence[mx.array]) -> mx.array:
        """The tensor made of its parts [E, outputs, ...]."""
        if self.interleaved:
            value = mx.stack(list(parts), axis=2).flatten(1, 2)
        else:
            value = mx.concatenate(list(parts), axis=1) if len(parts) > 1 else parts[0]
        if self.transposed:
            value = value.swapaxes(1, 2)
        if self.blocks:
            value = mx.unflatten(value.view(mx.uint8), -1, (-1, _FP4_BLOCK_BYTES))
        return value.flatten(0, 1) if self.flat else value


@dataclass(frozen=True)
class Stacked:
    """Tensors with an expert axis, such as ``experts.gate_up_proj``."""

    stacks: tuple[Stack, ...]

    def holds(self, name: str) -> bool:
        """Whether a tensor of the block belongs to its experts, scales of stacks included."""
        return any(name.startswith(each.name.removesuffix(".weight")) for each in self.stacks)

    def expected(self, names: Iterable[str], count: int) -> set[str]:
        """All of the parent's names."""
        return set(names)

    def unstack(self, stacked: Mapping[str, mx.array]) -> Tensors:
        """The tensors of mlx-lm's stacks, by projection and leaf (``gate_proj.weight``)."""
        made: Tensors = {}
        joined: set[str] = set()
        for each in self.stacks:
            if all(part in stacked for part in each.parts):
                made[each.name] = each.join([stacked[part] for part in each.parts])
                joined |= set(each.parts)
        if left := sorted(set(stacked) - joined):
            raise LayoutError(f"nothing holds {left[0]}")
        return made

    def move(self, tensors: Mapping[str, mx.array], kept: Sequence[int], count: int) -> Tensors:
        """The rows of the experts that stay, byte for byte."""
        flat = {each.name for each in self.stacks if each.flat}
        rows = mx.array(list(kept))
        moved: Tensors = {}
        for name, value in tensors.items():
            if value.ndim == 0:
                moved[name] = value  # one scale for all of them
            elif name in flat:
                moved[name] = mx.unflatten(value, 0, (count, -1))[rows].flatten(0, 1)
            elif value.shape[0] == count:
                moved[name] = value[rows]
            else:
                raise LayoutError(f"{name} has no row for each expert")
        return moved


ExpertLayout = Numbered | Stacked
