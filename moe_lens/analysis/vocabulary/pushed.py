"""Logits of a vocabulary in standard deviations, and the tokens at their ends."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moe_lens.trace import TokenTexts

__all__ = [
    "SHARP",
    "PushedTokens",
    "beyond_others",
    "correlation",
    "real_tokens",
    "sharpness",
    "standardised",
]

SHARP = 10
"""Tokens whose mean z is the sharpness."""


@dataclass(frozen=True, eq=False)
class PushedTokens:
    """The ends of rows of z.

    Attributes:
        up: [..., top] int64, ids with the highest z, highest first.
        up_z: [..., top] float64.
        down: [..., top] int64, ids with the lowest z, lowest first.
        down_z: [..., top] float64.
    """

    up: NDArray[np.int64]
    up_z: NDArray[np.float64]
    down: NDArray[np.int64]
    down_z: NDArray[np.float64]

    @classmethod
    def of(cls, z: NDArray[np.floating], top: int) -> PushedTokens:
        """Of rows [..., vocabulary]; where z is NaN, there is -1 instead of an id."""
        ends = []
        for sign in (1, -1):
            ids = _ends(np.nan_to_num(sign * z, nan=-np.inf), top)
            values = np.take_along_axis(z, ids, axis=-1).astype(np.float64)
            ends += [np.where(np.isnan(values), -1, ids), values]
        return cls(*ends)

    @staticmethod
    def stack(parts: Sequence[PushedTokens]) -> PushedTokens:
        """One more axis in front."""
        names = ("up", "up_z", "down", "down_z")
        return PushedTokens(**{name: np.stack([getattr(p, name) for p in parts]) for name in names})

    def ids(self) -> NDArray[np.int64]:
        """The distinct ids."""
        found = np.unique(np.concatenate([self.up.ravel(), self.down.ravel()]))
        return found[found >= 0]


def real_tokens(vocabulary: int, texts: TokenTexts) -> NDArray[np.bool_]:
    """[vocabulary] which logits are of tokens; others are padding of the head."""
    real = np.zeros(vocabulary, dtype=bool)
    real[[each for each in (*texts.pieces, *texts.special) if each < vocabulary]] = True
    return real


def standardised(logits: NDArray[np.floating], texts: TokenTexts) -> NDArray[np.float32]:
    """[n, vocabulary] logits in standard deviations over the tokens; NaN where there is none."""
    real = real_tokens(logits.shape[1], texts)
    among = logits[:, real].astype(np.float32)
    among -= among.mean(axis=1, keepdims=True)
    spread = among.std(axis=1, keepdims=True)
    z = np.full(logits.shape, np.nan, dtype=np.float32)
    z[:, real] = np.divide(among, spread, out=np.zeros_like(among), where=spread > 0)
    return z


def correlation(one: NDArray, two: NDArray) -> NDArray[np.float64]:
    """[n] over the vocabulary, of rows [n, vocabulary]; NaN where a row has no values."""
    found = np.full(len(one), np.nan)
    for row, (a, b) in enumerate(zip(one, two, strict=True)):
        both = ~(np.isnan(a) | np.isnan(b))
        if both.any():
            a, b = (each[both] - each[both].mean() for each in (a, b))
            size = float(np.linalg.norm(a) * np.linalg.norm(b))
            found[row] = float(a @ b) / size if size > 0 else np.nan
    return found


def sharpness(z: NDArray[np.float32]) -> NDArray[np.float64]:
    """[n] mean of the highest values of each row."""
    z = np.nan_to_num(z, nan=-np.inf)
    most = min(SHARP, int((z > -np.inf).sum(axis=1).max(initial=1)) or 1)
    return np.partition(z, -most, axis=1)[:, -most:].mean(axis=1, dtype=np.float64)


def _ends(values: NDArray, top: int) -> NDArray[np.int64]:
    """[..., top] places of the highest values, highest first."""
    top = min(top, values.shape[-1])
    ids = np.argpartition(-values, top - 1, axis=-1)[..., :top]
    order = np.argsort(-np.take_along_axis(values, ids, axis=-1), axis=-1, kind="stable")
    return np.take_along_axis(ids, order, axis=-1).astype(np.int64)


def beyond_others(z: NDArray, beyond: NDArray, top: int) -> PushedTokens:
    up = PushedTokens.of(np.where(z > 1, beyond, np.nan), top)
    down = PushedTokens.of(np.where(z < -1, beyond, np.nan), top)
    return PushedTokens(up.up, up.up_z, down.down, down.down_z)
