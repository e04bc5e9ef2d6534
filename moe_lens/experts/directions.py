"""What an expert can write at all: the directions that its down projection amplifies most."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moe_lens.errors import UnsupportedModelError, UsageError
from moe_lens.families import MoELayer

from .matrices import expert_modules

__all__ = ["WriteDirections", "write_directions"]

_DOWN = ("down_proj", "fc2", "w2")


@dataclass(frozen=True, eq=False)
class WriteDirections:
    """Left singular vectors of a down projection W = U S V^T, the strongest first.

    The sign of a singular vector is arbitrary: -u is as good as u, so both ends mean something.

    Attributes:
        vectors: [n, width] float64, unit vectors u.
        shares: [n] float64, part of the squared Frobenius norm of W that each holds, s^2 / sum s^2.
        even: What each share were if all singular values were equal: 1 / their number.
        bias: [width] float64, what the expert adds whatever it reads; None: it has no bias.
    """

    vectors: NDArray[np.float64]
    shares: NDArray[np.float64]
    even: float
    bias: NDArray[np.float64] | None


def write_directions(layer: MoELayer, expert: int, number: int) -> WriteDirections:
    """The `number` strongest write directions of one expert; its weights are unpacked for it.

    Raises:
        UsageError: There is no such expert, or it has no weights.
        UnsupportedModelError: The down projection is not where experts have it.
    """
    if not 0 <= expert < layer.num_experts:
        zero = f" ({layer.zero_experts} more only return what they read)"
        raise UsageError(
            f"layer {layer.index} has the experts 0 to {layer.num_experts - 1} with weights"
            f"{zero if layer.zero_experts else ''}; {expert} is not one of them"
        )
    with layer.reading():
        found = expert_modules(layer, expert)
        name = next((name for name in _DOWN if name in found), None)
        if name is None:
            raise UnsupportedModelError(
                f"layer {layer.index} keeps the down projection of its experts in a form that "
                f"moe-lens does not know ({', '.join(found)}); leave out the directions"
            )
        matrix = np.array(found[name].rows()).astype(np.float64)
        bias = None if found[name].bias is None else np.array(found[name].bias, dtype=np.float64)
    # The eigenvectors of W W^T: the cost is that of the output side, and memory that of W.
    values, vectors = np.linalg.eigh(matrix @ matrix.T)
    order = np.argsort(-values)[: min(number, *matrix.shape)]
    total = max(float(values.sum()), np.finfo(np.float64).tiny)
    return WriteDirections(
        vectors=vectors.T[order],
        shares=values[order] / total,
        even=1 / min(matrix.shape),
        bias=bias,
    )
