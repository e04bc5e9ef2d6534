"""How the labels (domains) of a calibration text count, decided after the calibration.

The sums are kept by label, so another blend costs nothing. With T(l) the tokens of label l:

- By weights: the sums of label l enter times ``weight(l) / T(l)``, as if the text held that share
  of it. A mean over routed tokens is taken of numerator and denominator alike.
- ``max-min``: the worst-off label keeps as much as possible. Each label's saliencies are divided
  by their sum over the layer; experts go one after another, each time the one whose absence
  leaves the label that has least with most (ties: the smaller sum over labels, the lower id).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moe_lens.errors import UsageError

from .routed_sums import RoutedSums

MAX_MIN = "max-min"


@dataclass(frozen=True)
class Blend:
    """Weights by label, or the worst label in place of any weights."""

    weights: Mapping[str, float] | None = None
    worst_label: bool = False

    @classmethod
    def parse(cls, text: str) -> Blend:
        """Read ``max-min`` or ``code=2,prose=1``; labels that are not named count nothing.

        Raises:
            UsageError: It is neither.
        """
        if text.strip() == MAX_MIN:
            return cls(worst_label=True)
        weights: dict[str, float] = {}
        for part in text.split(","):
            label, equals, number = part.rpartition("=")
            try:
                weight = float(number)
            except ValueError:
                weight = math.nan
            if not equals or not math.isfinite(weight) or weight < 0:
                raise UsageError(
                    f"{text!r} is no blend of labels; give {MAX_MIN}, or a weight for each label "
                    "such as code=2,prose=1"
                )
            weights[label.strip()] = weight
        if sum(weights.values()) == 0:
            raise UsageError(f"all weights of {text!r} are 0; give at least one label a weight")
        return cls(weights)

    def __str__(self) -> str:
        if self.worst_label or self.weights is None:
            return MAX_MIN
        return ",".join(f"{label}={weight:g}" for label, weight in self.weights.items())

    def check(self, labels: tuple[str, ...]) -> None:
        """Raise UsageError unless the text has labels, and all that this names."""
        if not any(labels):
            raise UsageError(
                "the calibration text has no labels to blend; give each prompt a `label` (JSONL), "
                "or put prompts into sub-folders"
            )
        missing = sorted(set(self.weights or ()) - set(labels))
        if missing:
            raise UsageError(
                f"the calibration text has no label {missing[0]!r}; it has "
                f"{', '.join(label or 'prompts without one' for label in labels)}"
            )

    def factors(self, labels: Mapping[str, RoutedSums]) -> list[tuple[float, RoutedSums]]:
        """The sums of each label and what they are multiplied with."""
        self.check(tuple(labels))
        weights = self.weights or {}
        return [
            (weights[label] / sums.tokens, sums)
            for label, sums in labels.items()
            if weights.get(label, 0.0) > 0 and sums.tokens > 0
        ]


def worst_label_order(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """[E] the place of every expert in the order of removal, 1 first; NaN where no token came.

    Args:
        values: [labels, E] the saliencies in each label; NaN where no token of it came.
    """
    known = np.nan_to_num(values, nan=0.0)
    sums = known.sum(axis=1, keepdims=True)
    shares = np.divide(known, sums, out=np.zeros_like(known), where=sums > 0)
    gone, left = np.zeros(len(shares)), list(range(values.shape[1]))
    places = np.zeros(values.shape[1])
    for place in range(1, len(left) + 1):
        worst = (gone[:, None] + shares[:, left]).max(axis=0)
        best = min(range(len(left)), key=lambda i: (worst[i], shares[:, left[i]].sum(), left[i]))
        expert = left.pop(best)
        gone = gone + shares[:, expert]
        places[expert] = place
    return np.where(np.isnan(values).all(axis=0), np.nan, places)
