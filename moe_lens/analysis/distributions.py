"""How uneven one distribution over experts is, and how different several are. Arrays in and out.

Experts are the last axis, distributions to compare the first; axes between are kept, so that all
layers, or all draws of a bootstrap, go through at once.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "entropy",
    "gini",
    "information",
    "jensen_shannon",
    "max_violation",
    "mean_jensen_shannon",
    "shares",
    "specialisation",
    "total_variation",
    "variation",
]

Array = NDArray[np.float64]

OFFSET = 1e-4
"""Added to both rates of a specialisation score, so that an unused expert has one, too."""


def shares(counts: NDArray[np.number]) -> Array:
    """Counts as parts of their sum over experts; NaN where nothing was counted."""
    if counts.dtype != np.float32:
        counts = counts.astype(np.float64, copy=False)
    total = counts.sum(axis=-1, keepdims=True)
    return np.divide(counts, total, out=np.full_like(counts, np.nan), where=total > 0)


def entropy(p: Array) -> Array:
    """- sum p log2 p over experts, in bits; 0 log 0 = 0."""
    return -(p * np.log(np.maximum(p, 1e-30))).sum(axis=-1) / np.log(2)


def variation(counts: NDArray[np.number]) -> Array:
    """Coefficient of variation: standard deviation over experts (divided by E) over the mean."""
    return _over_mean(counts.std(axis=-1), counts)


def gini(counts: NDArray[np.number]) -> Array:
    """Gini coefficient: sum over i of (2 i - E - 1) x_i / (E sum x), x ascending, i from 1.

    Half the mean absolute difference of two experts drawn with replacement, over the mean. Experts
    that were never chosen are in it as zeros: 0 if all are equal, (E - 1) / E if one has all.
    """
    experts = counts.shape[-1]
    rank = 2 * np.arange(1, experts + 1) - experts - 1
    return _over_mean((np.sort(counts, axis=-1) * rank).sum(axis=-1) / experts**2, counts)


def max_violation(counts: NDArray[np.number]) -> Array:
    """MaxVio: (largest - mean) / mean over experts (arXiv 2408.15664, section 3)."""
    return _over_mean(counts.max(axis=-1), counts) - 1


def jensen_shannon(p: Array) -> Array:
    """[n, n, ...] divergence of every two of [n, ..., E] distributions, in bits: 0 to 1."""
    own = entropy(p)
    found = np.zeros((len(p), *own.shape))
    for one in range(len(p)):
        for two in range(one):
            found[one, two] = found[two, one] = _pair(p, own, one, two)
    return found


def mean_jensen_shannon(p: Array) -> Array:
    """Mean of `jensen_shannon` over all pairs of different distributions."""
    own = entropy(p)
    pairs = [(one, two) for one in range(len(p)) for two in range(one)]
    total = np.zeros(own.shape[1:])
    for one, two in pairs:
        total += _pair(p, own, one, two)
    return total / max(1, len(pairs))


def information(p: Array) -> Array:
    """Mutual information, in bits, of expert and distribution if each of `p` is as likely.

    Entropy of the mean distribution less the mean entropy; at most log2 of their number.
    """
    return np.maximum(entropy(p.mean(axis=0)) - entropy(p).mean(axis=0), 0.0)


def total_variation(p: Array) -> Array:
    """[n, ...] half the sum over experts of |p - mean of all n|: tokens that go elsewhere."""
    return 0.5 * np.abs(p - p.mean(axis=0)).sum(axis=-1)


def specialisation(rate: Array) -> Array:
    """log2((rate + 1e-4) / (mean rate over the first axis + 1e-4)), 0 where nothing prefers."""
    return np.log2((rate + OFFSET) / (rate.mean(axis=0) + OFFSET))


def _pair(p: Array, own: Array, one: int, two: int) -> Array:
    """Divergence of two; rounding must not make it negative."""
    return np.maximum(entropy((p[one] + p[two]) / 2) - (own[one] + own[two]) / 2, 0.0)


def _over_mean(values: Array, counts: NDArray[np.number]) -> Array:
    mean = counts.mean(axis=-1)
    return np.divide(values, mean, out=np.full(np.shape(mean), np.nan), where=mean > 0)
