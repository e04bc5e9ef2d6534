"""A batch of token ids as it is handed to a model: whole numbers, in its vocabulary, padded."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .errors import UsageError


def token_batch(token_ids: Any, vocabulary: int | None) -> NDArray[np.int32]:
    """[B, L] int32 of token ids [B, L] or [L].

    Args:
        token_ids: Whole numbers, all rows of one length.
        vocabulary: Ids from this number on are refused, because MLX would read beyond the
            embedding without a word; None: not known.

    Raises:
        UsageError: If they are no such batch.
    """
    try:
        tokens = np.atleast_2d(np.asarray(token_ids))
    except ValueError as error:
        raise UsageError(
            "the rows of token ids differ in length: pad them on the right and give `lengths`"
        ) from error
    if tokens.size == 0:
        raise UsageError("there are no tokens to run: the batch is empty")
    if tokens.ndim != 2 or not np.issubdtype(tokens.dtype, np.integer):
        raise UsageError(
            f"token ids are whole numbers of shape [batch, length], not {tokens.dtype} of shape "
            f"{list(tokens.shape)}"
        )
    if tokens.min() < 0 or (vocabulary is not None and tokens.max() >= vocabulary):
        outside = tokens.min() if tokens.min() < 0 else tokens.max()
        last = "" if vocabulary is None else f" to {vocabulary - 1}"
        raise UsageError(f"there is no token id {outside}: this model has 0{last}")
    return tokens.astype(np.int32)


def batch_lengths(lengths: Sequence[int] | None, shape: tuple[int, ...]) -> NDArray[Any] | None:
    """[B] the real lengths of the rows of a batch [B, L].

    Raises:
        UsageError: If there is not one for each row, or one is not from 1 to L.
    """
    if lengths is None:
        return None
    real = np.asarray(lengths)
    if real.shape != shape[:1] or not np.issubdtype(real.dtype, np.integer):
        raise UsageError(
            f"lengths must be {shape[0]} whole numbers, one for each row of the batch, not "
            f"{real.tolist()}"
        )
    if real.min() < 1 or real.max() > shape[1]:
        raise UsageError(
            f"every length must be from 1 to {shape[1]}, the columns of the batch, not "
            f"{real.tolist()}"
        )
    return real
