"""Launches and bytes of a lazy computation, counted on its graph without running it.

MLX writes two records of a graph. `mx.export_to_dot` writes the one that would run, compiled
functions as one node each, without shapes; `mx.export_function` writes shapes and dtypes, and
custom Metal kernels even where there is no Metal, with compiled functions taken apart. So launches
are counted on the first where it can be had, and bytes on the second.

A node costs one launch on a GPU, with the exceptions below. They are read in the Metal backend of
MLX: a view moves no data, a scatter first copies what it scatters into, and a concatenation
copies its inputs one by one. Copies that MLX makes of strided inputs are not counted.
"""

from __future__ import annotations

import math
import re
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx

Arrays = dict[str, mx.array]

VIEWS = frozenset(
    "AsStrided Broadcast BroadcastAxes Contiguous Copy ExpandDims Flatten Reshape Slice Split "
    "Squeeze StopGradient Transpose Unflatten View".split()
)
SCATTERS = frozenset("MaskedScatter Scatter ScatterAxis SliceUpdate".split())
PRODUCTS = frozenset("AddMM GatherMM GatherQMM Matmul QuantizedMatmul".split())
"""Where a count stops: what the router's projection reads is not part of the routing."""


@dataclass(frozen=True)
class Node:
    """One operation of a graph."""

    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]

    @property
    def launches(self) -> int:
        """How many kernels a GPU runs for it."""
        if self.name in VIEWS:
            return 0
        if self.name == "Concatenate":
            return len(self.inputs)
        # A dot record adds how a scatter combines, as in "Scatter Sum".
        return 2 if self.name.split(" ")[0] in SCATTERS else 1


def launches(function: Callable[..., Arrays], *inputs: mx.array) -> int:
    """Launches of the arrays that `function` returns, compiled functions as one each."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "graph.dot"
        arrays = function(*inputs)
        mx.export_to_dot(str(path), **arrays)
        nodes = _read_dot(path.read_text())
    return sum(node.launches for node in _needed(nodes, arrays))


def traced(function: Callable[..., Arrays], *inputs: mx.array) -> tuple[int, int]:
    """Launches and bytes of the arrays that `function` returns, compiled functions taken apart.

    The bytes are those of every input and output of every launch: what goes through memory when
    no cache helps. A broadcast input counts with the bytes it is spread from.
    """
    records: list[dict[str, Any]] = []
    mx.export_function(records.append, lambda *given: list(function(*given).values()), *inputs)
    stored: dict[str, int] = {}
    nodes, named = [], []
    for record in records:
        if record["type"] == "outputs":
            named = [name for name, *_ in record["outputs"]]
        elif record["type"] == "inputs":
            stored.update((name, _bytes(shape, dtype)) for name, shape, dtype in record["inputs"])
        elif record["type"] == "constants":
            stored.update((name, array.nbytes) for name, array in record["constants"])
        elif record["type"] == "primitive":
            node = Node(
                record["name"],
                tuple(name for name, *_ in record["inputs"]),
                tuple(name for name, *_ in record["outputs"]),
            )
            nodes.append(node)
            for name, shape, dtype in record["outputs"]:
                own = _bytes(shape, dtype)
                is_view = node.name in VIEWS
                stored[name] = min(own, stored[node.inputs[0]]) if is_view else own
    needed = [node for node in _needed(nodes, named) if node.launches]
    moved = sum(stored[name] for node in needed for name in (*node.inputs, *node.outputs))
    return sum(node.launches for node in needed), moved


def _needed(nodes: Iterable[Node], wanted: Iterable[str]) -> list[Node]:
    """The nodes that the `wanted` arrays come from, back to products and inputs."""
    maker = {name: node for node in nodes for name in node.outputs}
    found: dict[Node, None] = {}
    waiting = list(wanted)
    while waiting:
        node = maker.get(waiting.pop())
        if node is not None and node not in found and node.name not in PRODUCTS:
            found[node] = None
            waiting.extend(node.inputs)
    return list(found)


def _read_dot(text: str) -> list[Node]:
    """Nodes are numbers with a label, arrays are quoted names, edges lead from one to another."""
    names = dict(re.findall(r'^\{ (\d+) \[label ="([^"]*)"', text, re.MULTILINE))
    inputs: dict[str, list[str]] = {key: [] for key in names}
    outputs: dict[str, list[str]] = {key: [] for key in names}
    for array, key in re.findall(r'^"([^"]*)" -> (\d+)$', text, re.MULTILINE):
        inputs[key].append(array)
    for key, array in re.findall(r'^(\d+) -> "([^"]*)"$', text, re.MULTILINE):
        outputs[key].append(array)
    return [Node(names[key], tuple(inputs[key]), tuple(outputs[key])) for key in names]


def _bytes(shape: Iterable[int], dtype: mx.Dtype) -> int:
    return math.prod(shape) * dtype.size
