"""What the similarity of two experts can be read from, each between 0 and 1, and their mixtures.

`similarity` holds the two sources of the default. The others compare experts by a single vector
each: their mean answer, the column of their router logits, or all of their weights. They are
max(0, cosine), so that 0 is unrelated (or opposite) and 1 the same direction.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import mlx.core as mx
import numpy as np

from moe_lens.compress.statistics.similarity import Similarity
from moe_lens.compress.statistics.statistics import LayerStatistics
from moe_lens.errors import UsageError
from moe_lens.experts.answers import all_outputs
from moe_lens.experts.cosines import Floats, cosines, gram_cosines, weight_gram
from moe_lens.experts.layer_sample import LayerSample
from moe_lens.kernels.reference import expert_scores

SOURCES: dict[str, str] = {
    "outputs": "mean over tokens of max(0, cosine) of both outputs, on tokens routed to either",
    "overlap": "Jaccard index of the tokens routed to each",
    "mean-outputs": "max(0, cosine) of the mean outputs over all sampled tokens",
    "gated-outputs": "max(0, cosine) of the mean outputs over all sampled tokens, each output "
    "times the score that the router gives its expert",
    "router-logits": "max(0, cosine) of the router logits over all tokens",
    "weights": "max(0, cosine) of all weights, as they stand",
}

OURS: dict[str, float] = {"outputs": 0.5, "overlap": 0.5}
"""The similarity that a threshold is compared with."""

SAMPLED = frozenset(SOURCES) - frozenset(OURS)
"""Sources that need a sample of the layer."""


def parse_mixture(text: str) -> dict[str, float]:
    """Read ``outputs=0.5,overlap=0.5`` (or one source alone, which counts fully).

    Raises:
        UsageError: A part is no source with a number.
    """
    found: dict[str, float] = {}
    for part in text.split(","):
        name, sign, number = part.strip().partition("=")
        try:
            found[name] = float(number) if sign else 1.0
        except ValueError:
            raise UsageError(
                f"{part!r} is no share of a similarity; write for example outputs=0.5,overlap=0.5"
            ) from None
    check_mixture(found)
    return found


def check_mixture(mixture: Mapping[str, float]) -> None:
    """Raise UsageError unless these are sources whose shares add up to 1."""
    unknown = sorted(set(mixture) - set(SOURCES))
    if unknown:
        raise UsageError(
            f"there is no similarity {unknown[0]!r}; choose among {', '.join(SOURCES)}"
        )
    shares = list(mixture.values())
    if any(not share >= 0 for share in shares) or not math.isclose(sum(shares), 1, abs_tol=1e-9):
        raise UsageError(
            "the shares of a similarity must be 0 or more and add up to 1, not "
            + (" + ".join(f"{share:g}" for share in shares) or "nothing")
        )


@dataclass(frozen=True)
class Answers:
    """What the experts of one layer answer on average, and how their router asks for them.

    From the calibration where it has it, otherwise from a sample; the outputs of all experts are
    held only while they are summed.
    """

    statistics: LayerStatistics
    sample: LayerSample

    @cached_property
    def _means(self) -> tuple[Floats, Floats]:
        outputs = all_outputs(self.sample)
        gates = gate_scores(self.sample)[:, : outputs.shape[1]]
        plain = outputs.mean(axis=0)
        gated = mx.einsum("te,teh->eh", gates, outputs) / len(outputs)
        return np.array(plain, np.float64), np.array(gated, np.float64)

    @property
    def mean_outputs(self) -> Floats:
        """[E, width] mean output over all sampled tokens, routed there or not."""
        sums = self.statistics.sampled_output_sums
        return self._means[0] if sums is None else sums / len(self.statistics.sampled_ids)

    @property
    def gated_outputs(self) -> Floats:
        """[E, width] mean of score x output over all sampled tokens."""
        return self._means[1]

    @cached_property
    def logit_gram(self) -> Floats:
        """[E, E] sums over tokens of products of two router logits."""
        experts, gram = self.statistics.num_experts, self.statistics.logit_gram
        if gram is None:
            logits = np.array(self.sample.logits.astype(mx.float32), np.float64)
            gram = logits.T @ logits
        return gram[:experts, :experts]

    def source(self, name: str) -> Floats:
        """[E, E] one of the sources that need a sample."""
        if name == "mean-outputs":
            return np.clip(cosines(self.mean_outputs), 0, 1)
        if name == "gated-outputs":
            return np.clip(cosines(self.gated_outputs), 0, 1)
        if name == "router-logits":
            return np.clip(gram_cosines(self.logit_gram), 0, 1)
        assert name == "weights", name
        return np.clip(gram_cosines(weight_gram(self.sample.layer)), 0, 1)


def gate_scores(sample: LayerSample) -> mx.array:
    """[S, router width] float32 the score of every expert: softmax or sigmoid, as the block does.

    Where the block takes scores of the chosen experts only, or follows no rule, it is the softmax
    of all logits.
    """
    layer, logits = sample.layer, sample.logits.astype(mx.float32)
    if layer.family.route is None and layer.rule().score != "identity":
        return expert_scores(layer.rule(), logits).astype(mx.float32)
    return mx.softmax(logits, axis=-1, precise=True)


def mixed(mixture: Mapping[str, float], found: Similarity, answers: Answers | None) -> Floats:
    """[E, E] the stated mixture, 1 on the diagonal.

    Args:
        mixture: Sources and shares.
        found: The similarity from the calibration.
        answers: What a sample shows, where a source needs it.
    """
    total = np.zeros_like(found.total)
    for name, share in mixture.items():
        if name in OURS:
            total += share * (found.outputs if name == "outputs" else found.overlap)
            continue
        assert answers is not None
        total += share * answers.source(name)
    np.fill_diagonal(total, 1.0)
    return total
