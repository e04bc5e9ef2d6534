"""How wide the experts of a smaller model may be, and which numbers of config.json say so.

Architectures call the width by different names, and some build other modules from the same
number. So the key is not looked up in a table but found: a key that holds the width is changed,
mlx-lm builds the model from both configs (without any weights), and only the experts may differ.

DeepSeek and its relatives make the shared expert as wide as ``n_shared_experts`` experts. There
the width can be divided by a whole number if `n_shared_experts` grows by it: the shared expert
stays as it is.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mlx.utils import tree_flatten
from mlx_lm.utils import _get_classes

from moe_lens.compress.tensors.regroup import own_groups, smallest_group
from moe_lens.errors import UnsupportedModelError, UsageError
from moe_lens.experts.quantisation import Quantisation
from moe_lens.families import MoELayer

from .config_keys import change_number, parts

WIDTH_KEYS = (
    "moe_intermediate_size",
    "expert_ffn_hidden_size",
    "ffn_hidden_size",
    "intermediate_size",
)
SHARED_KEYS = (
    "n_shared_experts",
    "num_shared_experts",
    "moe_num_shared_experts",
    "num_shared_expert",
)

TIDY = 32
"""The smallest quantisation group of every mode, and the tile of MLX's quantised products."""

NEAR = 1 / 16

Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class WidthKeys:
    """Where config.json says how wide an expert is.

    `shared` is the number of shared experts, if their width is this number of experts' widths;
    `count` is what it says.
    """

    width: str
    shared: str | None = None
    count: int = 1

    def fits(self, old: int, new: int) -> bool:
        """Whether the shared expert can keep its width when the experts get the width `new`."""
        return self.shared is None or self.count * old % new == 0

    def apply(self, config: dict[str, Any], old: int, new: int) -> None:
        """Change `config` in place."""
        change_number(config, {self.width}, old, new)
        if self.shared is not None:
            change_number(config, {self.shared}, self.count, self.count * old // new)


def find_width_keys(config: Mapping[str, Any], experts: Sequence[str], width: int) -> WidthKeys:
    """The keys to change, found by building the model without weights.

    Args:
        config: Of the parent.
        experts: The paths of the modules of experts.
        width: Of an expert, as the weights have it.

    Raises:
        UnsupportedModelError: No single number sets the width of the experts and nothing else.
    """
    if config.get("model_file"):
        raise UnsupportedModelError(
            f"this model brings its own code ({config['model_file']}), so what its config means "
            "is not known; remove whole experts instead (--ratio)"
        )
    before = _shapes(config)
    narrow = width // 2 if width % 2 == 0 else 1
    also: list[str] = []
    for key in WIDTH_KEYS:
        for keys in (WidthKeys(key), *_with_shared(config, key)):
            changed = copy.deepcopy(dict(config))
            if key not in change_number(changed, {key}, width, width):
                continue
            keys.apply(changed, width, narrow)
            inside, outside = _differing(before, _shapes(changed), experts)
            if inside and not outside:
                return keys
            if inside and not also:
                also = [key, *outside]
    if also:
        raise UnsupportedModelError(
            f"the width of the experts is {also[0]} in config.json, which also sets {also[1]}"
            + (f" and {len(also) - 2} more tensors" if len(also) > 2 else "")
            + "; stock mlx-lm cannot load experts of another width, so remove whole experts "
            "instead (--ratio)"
        )
    raise UnsupportedModelError(
        f"no number in config.json sets the width of the experts ({width}), so stock mlx-lm "
        "cannot load experts of another width; remove whole experts instead (--ratio)"
    )


def _with_shared(config: Mapping[str, Any], key: str) -> list[WidthKeys]:
    return [
        WidthKeys(key, shared, part[shared])
        for part in parts(dict(config))
        for shared in SHARED_KEYS
        if type(part.get(shared)) is int and part[shared] > 0
    ]


def _shapes(config: Mapping[str, Any]) -> Shapes:
    """Name and shape of every parameter; they are never computed."""
    plain = copy.deepcopy(dict(config))
    model_class, arguments = _get_classes(plain)
    model = model_class(arguments.from_dict(plain))
    return {name: value.shape for name, value in tree_flatten(model.parameters())}


def _differing(
    before: Shapes, after: Shapes, experts: Sequence[str]
) -> tuple[list[str], list[str]]:
    """Names whose shapes differ: inside the experts, and elsewhere."""
    names = sorted(
        name for name in before.keys() | after.keys() if before.get(name) != after.get(name)
    )
    prefixes = tuple(f"{path}." for path in experts)
    inside = [name for name in names if name.startswith(prefixes)]
    return inside, [name for name in names if not name.startswith(prefixes)]


def width_for(config: Mapping[str, Any], layers: Sequence[MoELayer], asked: float) -> int:
    """The width to give the experts of a loaded model; see `Widths.choose` for `asked`.

    Raises:
        UnsupportedModelError: Stock mlx-lm cannot load experts of another width.
        UsageError: This width is not possible; the message names the nearest that are.
    """
    return widths_of(config, layers).choose(asked)


def widths_of(config: Mapping[str, Any], layers: Sequence[MoELayer]) -> Widths:
    """Which widths the experts of a loaded model can have.

    Raises:
        UnsupportedModelError: Stock mlx-lm cannot load experts of another width.
    """
    widths = {layer.expert_width for layer in layers}
    if len(widths) > 1:
        raise UnsupportedModelError(
            f"the experts of this model have different widths ({sorted(widths)}), which no single "
            "number describes; remove whole experts instead (--ratio)"
        )
    width = widths.pop()
    paths = [f"{layer.path}.{layer.family.experts}" for layer in layers]
    keys = find_width_keys(config, paths, width)
    return Widths(width, keys, tuple(down_quantisations(layers)))


def down_quantisations(layers: Sequence[MoELayer]) -> set[Quantisation]:
    """Every way in which the down projections of the experts are packed; none: they are not."""
    found = {Quantisation.of(down) for layer in layers for down in layer.down_projections}
    return {each for each in found if each is not None}


def check_asked_width(asked: float) -> None:
    """Raise UsageError unless `asked` is a share below 1 or a number of channels above it.

    1 could be meant as either.
    """
    if not math.isfinite(asked) or asked <= 0 or (asked >= 1 and asked != int(asked)) or asked == 1:
        raise UsageError(
            f"the expert width is {asked:g}; give a share of the channels below 1 (0.5 keeps half "
            "of them), or how many to keep, as a whole number of 2 or more"
        )


@dataclass(frozen=True)
class Widths:
    """Which widths the experts of one model can have.

    `width` is the parent's, `keys` those of its config, `packed` how its down projections are
    quantised (none: they are not). Their groups lie along the channels, so a width must be whole
    groups, if need be smaller ones than the parent's (`regroup`).
    """

    width: int
    keys: WidthKeys
    packed: tuple[Quantisation, ...] = ()

    @property
    def possible(self) -> list[int]:
        """Every smaller width that can be stored and loaded, ascending."""
        unit = math.lcm(*(smallest_group(each) for each in self.packed))
        return [each for each in range(unit, self.width, unit) if self.keys.fits(self.width, each)]

    def choose(self, asked: float) -> int:
        """The width to make.

        A whole number is taken as it is. A share becomes the nearest multiple of `TIDY` (so that
        the result can be quantised later, and GPU kernels run whole tiles), where there is one;
        among the widths within `NEAR` of the parent's width around it, one that keeps the
        parent's quantisation groups goes first. Of two equally near the larger is taken.

        Args:
            asked: A whole number of channels of 1 or more, or a share of `width` below 1.

        Raises:
            UsageError: Nothing is possible, or `asked` is not; the message names the neighbours.
        """
        check_asked_width(asked)
        possible = self.possible
        if not possible:
            raise UsageError(
                f"the experts have {self.width} channels, and no smaller number of them can be "
                f"stored: {self._why()}; remove whole experts instead (--ratio)"
            )
        if asked >= 1:
            return self._exactly(int(asked), possible)
        wanted = asked * self.width
        tidy = [each for each in possible if each % TIDY == 0] or possible
        own = [
            each
            for each in tidy
            if own_groups(each, self.packed) and abs(each - wanted) <= NEAR * self.width
        ]
        return min(own or tidy, key=lambda each: (abs(each - wanted), -each))

    def _exactly(self, asked: int, possible: Sequence[int]) -> int:
        if asked in possible:
            return asked
        below = [each for each in possible if each < asked][-1:]
        above = [each for each in possible if each > asked][:1]
        raise UsageError(
            f"the experts have {self.width} channels and cannot have {asked}; the nearest possible "
            f"width is {' or '.join(map(str, below + above))} ({self._why()})"
        )

    def _why(self) -> str:
        reasons = [f"it must be below {self.width}"]
        units = {smallest_group(each) for each in self.packed}
        if units:
            groups = " and ".join(map(str, sorted(units)))
            reasons.append(f"made of whole quantisation groups of {groups} channels")
        if self.keys.shared is not None:
            reasons.append(
                f"and a divisor of the {self.keys.count * self.width} channels of the shared "
                f"expert, whose width the config gives as {self.keys.shared} x {self.keys.width}"
            )
        return ", ".join(reasons)
