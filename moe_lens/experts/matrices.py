"""The weights of single experts of a live model, one matrix at a time, and of its routers."""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from moe_lens.families import MoELayer

from .quantisation import Leaves, Quantisation, unpack


@dataclass(frozen=True)
class Matrix:
    """One Linear of one expert; nothing is unpacked until it is asked for."""

    leaves: Leaves
    """Without an expert axis, except `global_scale`."""
    quantisation: Quantisation | None

    @property
    def shape(self) -> tuple[int, int]:
        """Outputs and inputs."""
        rows, columns = self.leaves["weight"].shape
        if self.quantisation is not None:
            columns = self.leaves["scales"].shape[-1] * self.quantisation.group_size
        return rows, columns

    def rows(self, start: int = 0, stop: int | None = None) -> mx.array:
        """Rows of the weight [outputs, inputs] in float32."""
        part = {
            name: value[start:stop] if value.ndim == 2 else value
            for name, value in self.leaves.items()
        }
        if self.quantisation is None:
            return part["weight"].astype(mx.float32)
        return unpack(part, self.quantisation)

    @property
    def bias(self) -> mx.array | None:
        """[outputs] in float32, where there is one."""
        bias = self.leaves.get("bias")
        return None if bias is None else bias.astype(mx.float32)


def expert_modules(layer: MoELayer, expert: int) -> dict[str, Matrix]:
    """The matrices of one expert by the name of their Linear."""
    if layer.list_experts:
        modules = layer.experts[expert].named_modules()
    else:
        modules = [
            each for each in layer.experts.named_modules() if hasattr(each[1], "num_experts")
        ]
    found = {}
    for path, module in modules:
        leaves = {name: value for name, value in module.items() if isinstance(value, mx.array)}
        if "weight" not in leaves or leaves["weight"].ndim < 2:
            continue
        if not layer.list_experts:
            leaves = {name: value[expert] for name, value in leaves.items()}
        found[path.rpartition(".")[2]] = Matrix(leaves, Quantisation.of(module))
    return dict(sorted(found.items()))


def router_weights(layer: MoELayer) -> tuple[NDArray[np.float64], NDArray[np.float64] | None]:
    """[router width, hidden] the router's rows, and its biases [router width] where it has any."""
    router = layer.router
    leaves = {name: value for name, value in router.items() if isinstance(value, mx.array)}
    packed = Quantisation.of(router)
    weight = leaves["weight"] if packed is None else unpack(leaves, packed)
    bias = leaves.get("bias")
    return (
        np.array(weight.astype(mx.float32), np.float64),
        None if bias is None else np.array(bias.astype(mx.float32), np.float64),
    )
