"""Cosines of the experts of a layer with each other, from one vector or all weights of each."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from moe_lens.families import MoELayer

from .matrices import expert_modules

Floats = NDArray[np.float64]

_CHUNK_BYTES = 256 << 20


def cosines(vectors: Floats) -> Floats:
    """[E, E] cosines of [E, n] vectors; 0 where one is zero, 1 on the diagonal."""
    return gram_cosines(vectors @ vectors.T)


def gram_cosines(gram: Floats) -> Floats:
    """[E, E] cosines from the Gram matrix of the vectors."""
    lengths = np.sqrt(np.maximum(np.diag(gram), 0))
    scale = lengths[:, None] * lengths[None, :]
    found = np.divide(gram, scale, out=np.zeros_like(gram), where=scale > 0)
    found = np.clip((found + found.T) / 2, -1, 1)
    np.fill_diagonal(found, 1.0)
    return found


def weight_gram(layer: MoELayer) -> Floats:
    """[E, E] inner products of all weight matrices of two experts, in chunks of 256 MiB."""
    with layer.reading():
        return sum(weight_grams(layer).values(), np.zeros((layer.num_experts,) * 2))


def weight_grams(layer: MoELayer) -> dict[str, Floats]:
    """By projection [E, E] inner products of the matrices of two experts.

    Call it inside of `MoELayer.reading`. At most 256 MiB of unpacked weights are held.
    """
    experts = layer.num_experts
    every = [expert_modules(layer, expert) for expert in range(experts)]
    found = {}
    for name, first in every[0].items():
        gram = np.zeros((experts, experts))
        rows, columns = first.shape
        step = max(1, _CHUNK_BYTES // (4 * experts * columns))
        for start in range(0, rows, step):
            part = mx.stack([each[name].rows(start, start + step) for each in every])
            flat = part.reshape(experts, -1)
            gram += np.array(flat @ flat.T, np.float64)
        found[name] = gram
    return found
