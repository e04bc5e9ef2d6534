"""The tensors of the smaller model, made of the parent's own files in the layout of the hub.

What a plan only moves (experts that stay) is moved in the parent's own tensors, so it keeps its
bytes however it is packed. What a plan computes (merged or narrower experts) comes from mlx-lm's
parameters of the smaller model. All else, vision towers included, is copied, but for heads that
predict further tokens, which have experts of their own.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import mlx.core as mx
from mlx.utils import tree_flatten

from moe_lens.checkpoint_files.folder import open_tensors, stored_tensors
from moe_lens.checkpoint_files.header import StoredTensor
from moe_lens.compress.plan.plan import LayerPlan, Plan
from moe_lens.compress.tensors.parameters import router_rows
from moe_lens.compress.tensors.parent import LayerTensors, Parent
from moe_lens.errors import UnsupportedModelError

from .expert_layout import ExpertLayout, LayoutError, Tensors
from .from_mlx import stacked_experts
from .layouts import Layout

_LAYER = re.compile(r"(?:^|\.)(?:layers|blocks|h)\.\d+(?=\.|$)")
_OTHER_LAYERS = re.compile(r"(?:^|\.)(?:mtp\w*|vis\w*|audio\w*)(?:\.|$)")
_REMEDY = "remove experts only (a size with --method reap, say), or leave --format hf out"


@dataclass(frozen=True)
class OwnFiles:
    """The tensors of a checkpoint as its files have them."""

    stored: Mapping[str, StoredTensor]
    tensors: Tensors

    @classmethod
    def of(cls, parent: Parent) -> OwnFiles:
        """Open them; nothing is read."""
        stored = stored_tensors(parent.path)
        loaded = open_tensors({each.file for each in stored.values()})
        return cls(stored, {name: loaded[name] for name in stored})

    def in_mlx_layout(self, parent: Parent) -> bool:
        """Whether its experts are called as in mlx-lm."""
        return all(name in self.stored for layer in parent.layers for name in layer.experts)


def check_known(parent: Parent, files: OwnFiles, layout: Layout, *, changed: bool) -> None:
    """Refuse files that are not laid out as `layout` says.

    Args:
        parent: Nothing of it is read.
        files: Of the parent.
        layout: Of the model type.
        changed: Whether experts may get weights that none of the parent's has.

    Raises:
        UnsupportedModelError: With the reason and what can be done.
    """
    finder = Finder(parent, files, layout)
    parameters: Tensors = dict(tree_flatten(parent.model.parameters())) if changed else {}
    for layer in parent.layers:
        inside = finder.block(layer)
        kind, old = _layout_of(finder, layer, inside)
        if changed:
            with _unchangeable(parent):
                new = kind.unstack(stacked_experts(layer, parameters))
                _check_complete(finder, set(old), new, inside)
        for name in layer.routers:
            finder.name(name)


def from_own(
    parent: Parent, plan: Plan, files: OwnFiles, smaller: Tensors, layout: Layout
) -> tuple[Tensors, frozenset[str]]:
    """All tensors of the smaller model under names of the parent's files.

    Args:
        parent: In the layout of the hub.
        plan: What to make.
        files: Of the parent.
        smaller: The parameters of the smaller model, under mlx-lm's names.
        layout: Of the model type.

    Returns:
        The tensors, and the names of those that belong to experts and routers.

    Raises:
        UnsupportedModelError: The layout is not known, or holds no merged or narrower experts.
    """
    finder = Finder(parent, files, layout)
    made: dict[str, Tensors] = {each.name: {} for each in parent.unread.heads}
    routed: set[str] = set()
    for layer in parent.layers:
        layer_plan = plan.layer(layer.layer)
        assert layer_plan is not None
        for old, new in (
            _experts(finder, layer, layer_plan, smaller),
            _router(finder, layer, layer_plan, plan, smaller),
        ):
            first = next(iter(old))
            made |= {name: {} for name in old}
            made[first] = new
            routed |= set(new)
    found: Tensors = {}
    for name, value in files.tensors.items():
        found |= made.pop(name, {name: value})
    _check_dtypes(found, files)
    return found, frozenset(routed)


class Finder:
    """Finds the files' names of what mlx-lm names otherwise."""

    def __init__(self, parent: Parent, files: OwnFiles, layout: Layout) -> None:
        self.parent = parent
        self.files = files
        self.layout = layout
        self._blocks = [layer.path for layer in parent.layers]
        self._known = {
            each
            for name, _ in tree_flatten(parent.model.parameters())
            for each in (_inside(name), _inside(layout.rename(name, self._blocks)))
        }
        self._by_layer: dict[str, list[str]] = {}
        for name in files.stored:
            self._by_layer.setdefault(_layer(name), []).append(name)
        self.prefix = self._find_prefix()

    def name(self, name: str) -> str:
        """The name in the files of one tensor of mlx-lm."""
        options = self.options(name)
        for each in options:
            if each in self.files.stored:
                return each
        raise self.unknown(options[0])

    def options(self, name: str) -> list[str]:
        """What a tensor, or a block, of mlx-lm may be called in the files."""
        renamed = self.layout.rename(name, self._blocks)
        return [self.prefix + _inside(renamed), self.prefix + _inside(name)]

    def block(self, layer: LayerTensors) -> dict[str, str]:
        """The tensors of a routed block: names inside it, and in the files."""
        place = f"{self.options(layer.path)[0]}."
        names = self._by_layer.get(_layer(place), [])
        return {name.removeprefix(place): name for name in names if name.startswith(place)}

    def known(self, name: str) -> bool:
        """Whether mlx-lm has this tensor of the files, under this or its own name."""
        return _inside(name) in self._known

    def unknown(self, name: str) -> UnsupportedModelError:
        """The refusal of files in which something is missing."""
        kind = self.parent.config["model_type"]
        return UnsupportedModelError(
            f"{self.parent.path} is in a layout that is not known of {kind} (it has no {name}), so "
            "it cannot be exported in it; leave --format hf out"
        )

    def _find_prefix(self) -> str:
        """What stands before ``layers.3`` in the language model."""
        router = self.parent.layers[0].routers[0]
        for each in (self.layout.rename(router, self._blocks), router):
            inside = _inside(each)
            found = {
                name.removesuffix(inside)
                for name in self.files.stored
                if name == inside or name.endswith(f".{inside}")
            }
            found = {prefix for prefix in found if not _OTHER_LAYERS.search(prefix)}
            if len(found) == 1:
                return found.pop()
        raise self.unknown(self.layout.rename(router, self._blocks))


def _layer(name: str) -> str:
    """The name up to the number of its layer; nothing outside of the layers."""
    found = _LAYER.search(name)
    return "" if found is None else name[: found.end()]


def _inside(name: str) -> str:
    """The name from the number of the layer on; all of it outside of the layers."""
    found = _LAYER.search(name)
    return name if found is None else name[found.start() :].lstrip(".")


def _experts(
    finder: Finder, layer: LayerTensors, plan: LayerPlan, smaller: Tensors
) -> tuple[list[str], Tensors]:
    """The names that go, and the tensors that come in their place."""
    inside = finder.block(layer)
    kind, old = _layout_of(finder, layer, inside)
    place = f"{finder.options(layer.path)[0]}."
    count = len(plan.groups)
    with _unchangeable(finder.parent):
        if not plan.changes_experts:
            kept = [group.experts[0] for group in plan.groups]
            values = {name: finder.files.tensors[inside[name]] for name in old}
            new = kind.move(values, kept, _num_experts(plan))
        else:
            new = kind.unstack(stacked_experts(layer, smaller))
            _check_complete(finder, kind.expected(old, count), new, inside)
    return [inside[name] for name in old], {place + name: value for name, value in new.items()}


@contextmanager
def _unchangeable(parent: Parent) -> Iterator[None]:
    try:
        yield
    except LayoutError as error:
        raise UnsupportedModelError(
            f"the experts of {parent.path} are stored in a way in which those of the smaller model "
            f"cannot be written ({error}); {_REMEDY}"
        ) from error


def _layout_of(
    finder: Finder, layer: LayerTensors, inside: Mapping[str, str]
) -> tuple[ExpertLayout, list[str]]:
    for kind in finder.layout.experts:
        if old := [name for name in inside if kind.holds(name)]:
            return kind, old
    raise finder.unknown(f"{finder.options(layer.path)[0]}.experts")


def _num_experts(plan: LayerPlan) -> int:
    return len(plan.removed) + sum(len(group.experts) for group in plan.groups)


def _check_complete(
    finder: Finder, expected: set[str], new: Tensors, inside: Mapping[str, str]
) -> None:
    """What is computed must stand exactly where the parent has its experts, in the same dtype."""
    if left := sorted(expected - set(new)):
        raise LayoutError(f"they have {left[0]}")
    if extra := sorted(set(new) - expected):
        raise LayoutError(f"they have no {extra[0]}")
    for name, value in new.items():
        old = finder.files.tensors[inside[name]]
        if old.dtype != value.dtype:
            raise LayoutError(f"{inside[name]} is {old.dtype}, what is computed {value.dtype}")


def _router(
    finder: Finder, layer: LayerTensors, layer_plan: LayerPlan, plan: Plan, smaller: Tensors
) -> tuple[list[str], Tensors]:
    """The rows of the router, and of what mlx-lm leaves out that has a number for each."""
    made = {finder.name(name): smaller[name] for name in layer.routers}
    rows = router_rows(layer_plan.groups, plan)
    width = plan.model.router_width
    for inside, name in finder.block(layer).items():
        value = finder.files.tensors[name]
        own = any(kind.holds(inside) for kind in finder.layout.experts)
        if name in made or own or finder.known(name) or value.size != width:
            continue
        if any(group.merged for group in rows):
            raise UnsupportedModelError(
                f"{name} has a number for each expert, and mlx-lm does not read it, so what it "
                f"becomes for merged ones is not known; {_REMEDY}"
            )
        kept = mx.array([group.experts[0] for group in rows])
        made[name] = mx.take(value, kept, axis=value.shape.index(width))
    return list(made), made


def _check_dtypes(found: Tensors, files: OwnFiles) -> None:
    """Every tensor must be what the parent's file says of the same name."""
    for name, value in found.items():
        old = files.tensors.get(name)
        if old is None or old.dtype != value.dtype or old.ndim != value.ndim:
            raise UnsupportedModelError(
                f"{name} would not be stored as the parent stores it; leave --format hf out"
            )
