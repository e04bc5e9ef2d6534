"""Where each token stands: the number of its prompt and its position there, forward by forward."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


class Places:
    """Numbers sequences as they come, and follows a generation from forward to forward.

    Whoever drives the model may `announce` which prompts the rows of the next forward are.
    """

    def __init__(self) -> None:
        self._announced: list[int] | None = None
        self._prompts = np.zeros(0, dtype=np.int64)
        self._lengths = np.zeros(0, dtype=np.int64)

    def announce(self, prompts: Sequence[int]) -> None:
        """Say which prompts are the rows of the next forward."""
        self._announced = list(prompts)

    def of(
        self, shape: tuple[int, int], valid: NDArray[np.bool_], *, continues: bool
    ) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        """Prompt and position [valid tokens] of the next forward.

        Args:
            shape: (B, L) of its batch.
            valid: [B * L] False where a token is a pad.
            continues: Whether it goes on with the sequences of the forward before.
        """
        batch, length = shape
        if self._announced is not None:
            self._prompts = np.asarray(self._announced)
            self._lengths = np.zeros(batch, dtype=np.int64)
            self._announced = None
        elif not continues or len(self._lengths) != batch:
            first = int(self._prompts.max(initial=-1)) + 1
            self._prompts = np.arange(first, first + batch)
            self._lengths = np.zeros(batch, dtype=np.int64)
        rows = valid.reshape(batch, length)
        position = (self._lengths[:, None] + np.cumsum(rows, axis=1) - 1)[rows]
        self._lengths = self._lengths + rows.sum(axis=1)
        prompt = np.repeat(self._prompts, length)[valid]
        return prompt.astype(np.int32), position.astype(np.int32)
