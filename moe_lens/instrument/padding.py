"""Which tokens of a batch are real: pads are routed like any token, and must not be recorded."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import mlx.core as mx
import numpy as np

from moe_lens.errors import CaptureError


def valid_tokens(
    shape: tuple[int, int], lengths: np.ndarray | None, cache: Any, *, continues: bool
) -> np.ndarray:
    """[B, L] True where a token is no pad.

    Args:
        shape: (B, L) of the batch.
        lengths: [B] the real lengths of right-padded rows, where the caller knows them.
        cache: The model's per-layer caches before the forward. mlx-lm's batch caches know the
            padding on the left, and, in a form of their own each, the padding on the right.
        continues: Whether this is another piece of the batch before it.

    Raises:
        CaptureError: If pads on the right cannot be told from tokens.
    """
    columns = np.arange(shape[1])
    valid = np.ones(shape, dtype=bool)
    if lengths is not None:
        return columns < lengths[:, None]
    padding: Any = None
    right_known = False
    for part in _parts(cache):
        offset = getattr(part, "offset", None)
        if isinstance(offset, mx.array) and offset.ndim == 1:
            positions = np.array(offset)[:, None] + columns
            valid &= positions >= 0
            if getattr(part, "_lengths", None) is not None:  # BatchRotatingKVCache: absolute
                valid &= positions < np.array(part._lengths)[:, None]
                right_known = True
            elif getattr(part, "_right_padding", None) is not None:  # BatchKVCache: of the whole
                padding = part
        elif isinstance(getattr(part, "lengths", None), mx.array):  # ArraysCache: what is left
            valid &= columns < np.array(part.lengths)[:, None]
            right_known = True
    if padding is not None and not right_known:
        if continues and padding._idx > 0:
            raise CaptureError(
                "a batch padded on the right was fed in several pieces, so pads cannot be told "
                "from tokens: raise prefill_step_size above the longest prompt"
            )
        valid &= columns < shape[1] - np.array(padding._right_padding)[:, None]
    return valid


def _parts(cache: Any) -> Iterator[Any]:
    """One cache of each kind among the layers: layers of one kind are padded alike."""
    seen = set()
    for each in cache or ():
        for part in getattr(each, "caches", (each,)):
            if type(part) not in seen:
                seen.add(type(part))
                yield part
