"""How much each expert matters on the calibration text, for removing the least of them.

With g the weight the block itself gives an expert (renormalised or not, sigmoid with a selection
bias, whatever the family does), f the expert's output before that weight and X the calibration
tokens routed to it. All of it comes from the sums of one calibration; only AIMER (`weight_shape`)
and the greedy choice (`greedy`) need the model again.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from moe_lens.errors import UsageError

from .blending import Blend, worst_label_order
from .routed_sums import RoutedSums
from .statistics import LayerStatistics

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Formula:
    """A saliency as a sum of `RoutedSums`, divided by nothing, by all tokens, or by those of X."""

    numerator: str
    per: Literal["sum", "token", "routed token"]

    def value(self, parts: list[tuple[float, RoutedSums]]) -> Floats:
        """[E] the saliency of sums that enter with these factors; NaN where X is empty."""
        top = _sum(parts, self.numerator)
        if self.per == "sum":
            return top
        if self.per == "token":
            return top / max(1e-300, sum(factor * sums.tokens for factor, sums in parts))
        counts = _sum(parts, "counts")
        return np.divide(top, counts, out=np.full_like(top, np.nan), where=counts > 0)


def _sum(parts: list[tuple[float, RoutedSums]], name: str) -> Floats:
    return np.sum([factor * getattr(sums, name) for factor, sums in parts], axis=0)


FORMULAS: dict[str, Formula] = {
    "reap": Formula("weighted_norm_sums", "routed token"),
    "gated-sum": Formula("weighted_norm_sums", "sum"),
    "ean-mean": Formula("norm_sums", "routed token"),
    "ean-sum": Formula("norm_sums", "sum"),
    "msan": Formula("square_sums", "routed token"),
    "gate-sum": Formula("weight_sums", "sum"),
    "frequency": Formula("counts", "token"),
}
"""The saliencies that come from the sums alone."""

DEFINITIONS: dict[str, str] = {
    "reap": "mean over the tokens routed to the expert of weight x L2 norm of its output "
    "(REAP, arXiv:2510.13999)",
    "gated-sum": "sum over the tokens routed to the expert of weight x L2 norm of its output",
    "ean-mean": "mean L2 norm of the expert's outputs over the tokens routed to it, weights left "
    "out (MAN, arXiv:2606.15716)",
    "ean-sum": "sum of the L2 norms of the expert's outputs over the tokens routed to it",
    "msan": "mean squared L2 norm of the expert's outputs over the tokens routed to it "
    "(MSAN, arXiv:2606.15716)",
    "gate-sum": "sum of the weights the block gave the expert",
    "frequency": "share of the calibration tokens that are routed to the expert",
    "aimer": "1 - mean absolute weight / root mean square of the expert's weights, no text needed "
    "(AIMER, arXiv:2603.18492, which removes those where the ratio is high)",
    "greedy": "squared change of the block's output, relative to its square, once the expert and "
    "all removed before it are gone and their tokens routed to the rest",
    "random": "a random number: what any method must beat",
}
"""What each method judges an expert by; the least goes first."""

METHODS: tuple[str, ...] = tuple(DEFINITIONS)

NEEDS_MODEL = frozenset({"aimer", "greedy"})
"""Methods that no sum of a calibration decides."""

WITHOUT_TEXT = frozenset({"aimer", "random"})
"""Methods that are the same whatever the text."""


def check_method(method: str) -> None:
    """Raise UsageError unless there is such a method."""
    if method not in METHODS:
        raise UsageError(f"there is no method {method!r}; choose one of {', '.join(METHODS)}")


def saliency(
    statistics: LayerStatistics, method: str, *, blend: Blend | None = None, seed: int = 0
) -> Floats:
    """[E] the saliency of every expert of a layer; NaN where it is unknown.

    Unknown are means over the tokens of an expert that no token reached.

    Args:
        statistics: The layer's sums.
        method: One of `FORMULAS`, or ``random``.
        blend: How the labels of the text count; None for each token alike.
        seed: Of ``random``, which gives every layer numbers of its own.

    Raises:
        UsageError: There is no such method, it needs the model, or the blend names a label that
            the text does not have.
    """
    check_method(method)
    if method in NEEDS_MODEL:
        raise UsageError(f"{method} is not decided by statistics; give `plan_prune` the model")
    if method == "random":
        return np.random.default_rng([seed, statistics.layer]).random(statistics.num_experts)
    formula = FORMULAS[method]
    if blend is None:
        return formula.value([(1.0, statistics.routed)])
    if blend.worst_label:
        return worst_label_order(
            np.stack([formula.value([(1.0, sums)]) for sums in statistics.labels.values()])
        )
    return formula.value(blend.factors(statistics.labels))


def least_salient(values: Floats, experts: tuple[int, ...], count: int) -> set[int]:
    """The `count` experts of `experts` that go first: unreached ones, then by rising saliency.

    Equal values are decided by the lower id, so that the choice is reproducible.
    """
    order = sorted(experts, key=lambda e: (-np.inf if np.isnan(values[e]) else values[e], e))
    return set(order[:count])
