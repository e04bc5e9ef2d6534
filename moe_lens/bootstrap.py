"""How sure a mean over tokens is, when tokens of one prompt are alike.

Prompts, not tokens, are drawn again and again with replacement (Efron and Tibshirani 1993,
chapter 6): tokens of one text depend on each other, and intervals from single tokens would be too
narrow.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 1000


@dataclass(frozen=True)
class Measure:
    """A number, its standard error, and the middle 95 % of the bootstrap.

    With a single prompt there is nothing to draw from: `standard_error`, `low` and `high` are None.
    """

    value: float
    standard_error: float | None = None
    low: float | None = None
    high: float | None = None

    def to_dict(self) -> dict[str, float | None]:
        """Plain values for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        if self.standard_error is None:
            return f"{self.value:.4g}"
        return f"{self.value:.4g} ± {self.standard_error:.2g}"


class Bootstrap:
    """Draws prompts for one set of tokens; the same draws serve every measure, so ratios pair up.

    Args:
        prompt: [tokens] which prompt each token is of.
        seed: Of the draws.
        resamples: How many.
    """

    def __init__(
        self, prompt: NDArray[np.int64], *, seed: int = 0, resamples: int = RESAMPLES
    ) -> None:
        _, self._prompt = np.unique(prompt, return_inverse=True)
        self.prompts = int(self._prompt.max()) + 1 if len(prompt) else 0
        generator = np.random.default_rng(seed)
        even = np.full(max(1, self.prompts), 1 / max(1, self.prompts))
        self._draws = generator.multinomial(self.prompts, even, size=resamples)
        self._tokens = self._sums(np.ones(len(prompt)))

    def measure(
        self,
        *columns: NDArray,
        transform: Callable[..., Any] | None = None,
    ) -> Measure:
        """`transform` of the token means of `columns`, with its uncertainty.

        Args:
            columns: [tokens] values; each is averaged over all tokens.
            transform: From means to the measure; None for the mean of the one column.
        """
        apply: Callable[..., Any] = transform or _same
        sums = [self._sums(column) for column in columns]
        total = self._tokens.sum()
        value = float(apply(*(each.sum() / total for each in sums)))
        if self.prompts < 2:
            return Measure(value)
        drawn = self._draws @ self._tokens
        resampled = np.asarray(apply(*(self._draws @ each / drawn for each in sums)))
        low, high = np.quantile(resampled, (0.025, 0.975))
        return Measure(value, float(resampled.std(ddof=1)), float(low), float(high))

    def _sums(self, column: NDArray) -> NDArray[np.float64]:
        sums = np.bincount(self._prompt, column.astype(np.float64), minlength=self.prompts)
        return sums.astype(np.float64)


def _same(mean: Any) -> Any:
    return mean
