"""What calibration remembers of each layer: sums and counts, so that two runs add up.

Nothing here depends on how the tokens were batched. Counts are exact integers; the float sums are
kept in float64.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moe_lens.errors import UsageError

from .identity import CorpusIdentity, ModelIdentity

NOT_AN_EXPERT = 65535
"""Fills the slots of `sampled_ids` that hold an identity expert or nothing."""


@dataclass(frozen=True)
class LayerStatistics:
    """Additive statistics of one MoE layer with E experts.

    All but `compared_*` and `sampled_ids` are over every calibration token; those three are over
    the sampled tokens on which every expert was evaluated.
    """

    layer: int
    counts: NDArray[np.int64]
    """[E] tokens that were routed to the expert."""
    weight_sums: NDArray[np.float64]
    """[E] sum of the weights the block gave the expert."""
    norm_sums: NDArray[np.float64]
    """[E] sum of the L2 norms of the expert's outputs, before the weights."""
    weighted_norm_sums: NDArray[np.float64]
    """[E] sum of weight x L2 norm, the numerator of REAP."""
    together: NDArray[np.int64]
    """[E, E] tokens routed to both; the diagonal is `counts`."""
    cosine_sums: NDArray[np.float64]
    """[E, E] sum of max(0, cosine) of both outputs, over sampled tokens routed to either."""
    cosine_counts: NDArray[np.int64]
    """[E, E] how many sampled tokens that sum has."""
    sampled_ids: NDArray[np.uint16]
    """[sampled tokens, k] the experts of every sampled token, `NOT_AN_EXPERT` where none."""

    @classmethod
    def empty(cls, layer: int, experts: int, k: int) -> LayerStatistics:
        """The statistics of no token at all: the neutral element of the addition."""
        return cls(
            layer=layer,
            counts=np.zeros(experts, np.int64),
            weight_sums=np.zeros(experts),
            norm_sums=np.zeros(experts),
            weighted_norm_sums=np.zeros(experts),
            together=np.zeros((experts, experts), np.int64),
            cosine_sums=np.zeros((experts, experts)),
            cosine_counts=np.zeros((experts, experts), np.int64),
            sampled_ids=np.zeros((0, k), np.uint16),
        )

    @property
    def num_experts(self) -> int:
        """E."""
        return len(self.counts)

    def __add__(self, other: LayerStatistics) -> LayerStatistics:
        """The statistics of both texts together."""
        if self.layer != other.layer or self.num_experts != other.num_experts:
            raise UsageError("statistics of different layers or models cannot be added")
        return LayerStatistics(
            layer=self.layer,
            counts=self.counts + other.counts,
            weight_sums=self.weight_sums + other.weight_sums,
            norm_sums=self.norm_sums + other.norm_sums,
            weighted_norm_sums=self.weighted_norm_sums + other.weighted_norm_sums,
            together=self.together + other.together,
            cosine_sums=self.cosine_sums + other.cosine_sums,
            cosine_counts=self.cosine_counts + other.cosine_counts,
            sampled_ids=np.concatenate([self.sampled_ids, other.sampled_ids]),
        )


@dataclass(frozen=True)
class Calibration:
    """The statistics of all MoE layers of one model on one text."""

    model: ModelIdentity
    corpus: CorpusIdentity
    layers: tuple[LayerStatistics, ...]

    @property
    def tokens(self) -> int:
        """Calibration tokens, pads not counted."""
        return self.corpus.tokens

    def layer(self, index: int) -> LayerStatistics:
        """The statistics of the layer with this index in the model."""
        for statistics in self.layers:
            if statistics.layer == index:
                return statistics
        raise UsageError(f"layer {index} has no routed experts in {self.model.name}")

    def unreached(self) -> dict[int, tuple[int, ...]]:
        """Layer -> experts that no calibration token was routed to; layers without any left out."""
        found = {s.layer: tuple(np.flatnonzero(s.counts == 0).tolist()) for s in self.layers}
        return {layer: experts for layer, experts in found.items() if experts}

    def __add__(self, other: Calibration) -> Calibration:
        """The calibration on both texts; the models must be the same."""
        if self.model.fingerprint != other.model.fingerprint:
            raise UsageError(
                f"calibrations of two models ({self.model.name}, {other.model.name}) "
                "cannot be added; calibrate both texts on the same checkpoint"
            )
        layers = tuple(a + b for a, b in zip(self.layers, other.layers, strict=True))
        return Calibration(self.model, self.corpus + other.corpus, layers)

    def summary(self) -> dict[str, Any]:
        """What the calibration read, in a few numbers, for a report."""
        return {
            "model": self.model.to_dict(),
            "corpus": self.corpus.to_dict(),
            "layers": [s.layer for s in self.layers],
            "sampled_tokens": len(self.layers[0].sampled_ids) if self.layers else 0,
            "unreached": {str(layer): list(ids) for layer, ids in self.unreached().items()},
        }
