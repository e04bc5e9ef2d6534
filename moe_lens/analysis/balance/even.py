"""What an evenly random router would show on as many tokens: counts are never quite equal.

It chooses k distinct experts for each token, all sets alike and every token for itself. Its counts
are simulated and measured as the real ones are. Where each expert expects many tokens, counts are
drawn from the normal distribution with their mean N k / E, variance N k / E (1 - k / E) and
correlation -1 / (E - 1); where it expects few, token by token.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from moe_lens.analysis import distributions

__all__ = ["even_counts", "even_dead", "even_measures"]

ROUNDS = 200
_MANY = 100
"""Tokens expected by an expert from which on counts are as good as normal."""

_SCORES = 20_000_000
"""Random numbers drawn token by token at most, as far as 20 rounds allow."""


@lru_cache(maxsize=512)
def even_measures(tokens: int, k: int, experts: int, seed: int) -> dict[str, float]:
    """Mean of each measure of load over simulated counts."""
    counts = even_counts(tokens, k, experts, seed)
    p = distributions.shares(counts)
    entropy = distributions.entropy(p) / np.log2(experts) if experts > 1 else np.ones(len(p))
    return {
        "cv": float(distributions.variation(counts).mean()),
        "gini": float(distributions.gini(counts).mean()),
        "entropy": float(entropy.mean()),
        "max_violation": float(distributions.max_violation(counts).mean()),
    }


def even_dead(tokens: int, k: float, experts: int) -> float:
    """Experts expected to be never chosen: E (1 - k / E)^N."""
    return float(experts * (1 - min(1.0, k / experts)) ** tokens)


def even_counts(tokens: int, k: int, experts: int, seed: int) -> NDArray[np.float64]:
    """[rounds, experts] counts of simulated routers."""
    generator = np.random.default_rng(seed)
    expected = tokens * k / experts
    if expected >= _MANY:
        noise = generator.normal(size=(ROUNDS, experts))
        noise -= noise.mean(axis=1, keepdims=True)
        size = expected * (1 - k / experts) * experts / max(1, experts - 1)
        return np.maximum(expected + np.sqrt(size) * noise, 0.0)
    rounds = int(np.clip(_SCORES // (tokens * experts), 20, ROUNDS))
    counts = np.empty((rounds, experts))
    for place in range(rounds):
        scores = generator.random((tokens, experts), dtype=np.float32)
        chosen = np.argpartition(scores, k - 1, axis=1)[:, :k]
        counts[place] = np.bincount(chosen.ravel(), minlength=experts)
    return counts
