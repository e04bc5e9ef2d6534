"""AIMER: an expert judged by the shape of its weights alone, without any text.

The absolute mean over the root mean square of all weights of an expert is sqrt(2 / pi) = 0.80 for
Gaussian weights and smaller where few weights carry most; experts with a high ratio are removed
first (AIMER, arXiv:2603.18492). Here 1 - ratio is the saliency, so that the least goes first.
"""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from moe_lens.experts.matrices import expert_modules
from moe_lens.families import MoELayer


def aimer(layers: Sequence[MoELayer]) -> dict[int, NDArray[np.float64]]:
    """By layer, [E] 1 - mean |w| / sqrt(mean w^2) over all weight matrices of each expert.

    Biases and quantisation scales are no weights. A packed matrix is unpacked for one expert at a
    time; memory is one matrix of one expert in float32. An expert of zeros has saliency 0.
    """
    found = {}
    for layer in layers:
        with layer.reading():
            scores = [_score(layer, expert) for expert in range(layer.num_experts)]
        found[layer.index] = np.array(scores)
    return found


def _score(layer: MoELayer, expert: int) -> float:
    absolute = square = 0.0
    size = 0
    for matrix in expert_modules(layer, expert).values():
        weight = matrix.rows()
        # Rows are summed in float32, the sums of rows in float64.
        rows = mx.abs(weight).sum(axis=-1), mx.square(weight).sum(axis=-1)
        mx.eval(rows)
        absolute += float(np.array(rows[0]).sum(dtype=np.float64))
        square += float(np.array(rows[1]).sum(dtype=np.float64))
        size += weight.size
    if square == 0:
        return 0.0
    return 1.0 - absolute / size / float(np.sqrt(square / size))
