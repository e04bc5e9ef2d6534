"""Where the nodes of a drawing stand: in columns by layer, or on a circle for each layer."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from .plain import Scalar

if TYPE_CHECKING:
    from networkx import Graph

__all__ = ["Layout", "Place", "circles", "columns"]

Place = tuple[float, float]

_COLUMN, _ROW = 190.0, 34.0
_ARC = 30.0  # of the circle for each node
_LEAST_RADIUS = 150.0
_GAP = 170.0  # between circles, for the names outside them
_MARGIN = 40.0
_SWEEPS = 12


@dataclass(frozen=True)
class Layout:
    """Places of nodes in a drawing.

    Attributes:
        width: Of the drawing.
        height: Of the drawing.
        places: x and y of each node.
        titles: Texts of columns or circles, with where they begin.
        middles: x of the middle of the circle that a node stands on.
    """

    width: float
    height: float
    places: dict[str, Place]
    titles: tuple[tuple[float, float, str], ...]
    middles: dict[str, float] = field(default_factory=dict)


def columns(graph: Graph[Any]) -> Layout:
    """A column for each layer, ordered so that lines cross little.

    Within a column nodes are ordered by the mean place of their neighbours, heavier edges counting
    more, sweeping to and fro (Sugiyama, Tagawa and Toda 1981).
    """
    layers = list(_by_layer(graph).values())
    names = list(_by_layer(graph))
    near: dict[str, dict[str, float]] = {node: {} for node in graph}
    for one, two, weight in graph.edges(data="weight"):
        near[one][two] = near[one].get(two, 0.0) + weight
        near[two][one] = near[two].get(one, 0.0) + weight
    height = {node: _centred(row, members) for members in layers for row, node in _rows(members)}
    for sweep in range(_SWEEPS):
        for place in range(len(layers)) if sweep % 2 == 0 else reversed(range(len(layers))):
            members = layers[place]
            wanted = {node: _mean(near[node], height, height[node]) for node in members}
            members.sort(key=lambda node: wanted[node])  # stable: ties keep their order
            height.update({node: _centred(row, members) for row, node in _rows(members)})
    tallest = max((len(members) for members in layers), default=0)
    middle = _MARGIN + 30.0 + _ROW * tallest / 2
    places = {
        node: (_MARGIN + 20.0 + _COLUMN * place, middle + _ROW * height[node])
        for place, members in enumerate(layers)
        for node in members
    }
    titles = tuple(
        (_MARGIN + _COLUMN * place, _MARGIN - 8.0, _title(name)) for place, name in enumerate(names)
    )
    width = 2 * _MARGIN + _COLUMN * max(1, len(layers))
    return Layout(width, 2 * _MARGIN + 40.0 + _ROW * tallest, places, titles)


def circles(graph: Graph[Any]) -> Layout:
    """A circle for each layer; experts of one group, and strong pairs, stand side by side."""
    layers = _by_layer(graph)
    most = max((len(members) for members in layers.values()), default=1)
    radius = max(_LEAST_RADIUS, _ARC * most / (2 * math.pi))
    across = max(1, math.ceil(math.sqrt(len(layers) * 1.6)))
    side = 2 * radius + _GAP
    places: dict[str, Place] = {}
    middles: dict[str, float] = {}
    titles = []
    for number, (name, members) in enumerate(layers.items()):
        left, top = _MARGIN + (number % across) * side, _MARGIN + (number // across) * side
        titles.append((left, top, _title(name)))
        center = (left + side / 2, top + side / 2)
        for step, node in enumerate(_chain(graph, members)):
            turn = 2 * math.pi * step / len(members) - math.pi / 2
            middles[node] = center[0]
            places[node] = (
                center[0] + radius * math.cos(turn),
                center[1] + radius * math.sin(turn),
            )
    down = max(1, math.ceil(len(layers) / across))
    width = 2 * _MARGIN + min(across, max(1, len(layers))) * side
    return Layout(width, 2 * _MARGIN + down * side, places, tuple(titles), middles)


def _chain(graph: Graph[Any], members: list[str]) -> list[str]:
    """`members` so that each is followed by the one it has the heaviest edge to, group by group."""
    near = {node: dict(graph[node]) for node in members}
    strength = {node: sum(edge["weight"] for edge in near[node].values()) for node in members}
    groups: dict[Scalar | None, list[str]] = {}
    for node in members:
        groups.setdefault(graph.nodes[node].get("group"), []).append(node)
    ordered: list[str] = []
    for group in sorted(groups.values(), key=len, reverse=True):
        left = dict.fromkeys(group)
        node = max(left, key=lambda each: strength[each])
        while True:
            del left[node]
            ordered.append(node)
            if not left:
                break
            edges = {each: near[node].get(each, {}).get("weight", 0.0) for each in left}
            node = max(left, key=lambda each: (edges[each], strength[each]))
    return ordered


def _by_layer(graph: Graph[Any]) -> dict[Scalar | None, list[str]]:
    layers: dict[Scalar | None, list[str]] = {}
    for node, layer in graph.nodes(data="layer"):
        layers.setdefault(layer, []).append(node)
    return layers


def _rows(members: list[str]) -> Iterable[tuple[int, str]]:
    return enumerate(members)


def _centred(row: int, members: list[str]) -> float:
    return row - (len(members) - 1) / 2


def _mean(near: dict[str, float], height: dict[str, float], own: float) -> float:
    total = sum(near.values())
    return sum(height[node] * weight for node, weight in near.items()) / total if total else own


def _title(layer: Scalar | None) -> str:
    return "" if layer is None else f"layer {layer}"
