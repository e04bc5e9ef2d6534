"""What calibration remembers of each layer: sums and counts, so that two runs add up.

Nothing here depends on how the tokens were batched. Counts are exact integers; the float sums are
kept in float64.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moe_lens.compress.plan.identity import CorpusIdentity, ModelIdentity
from moe_lens.errors import UsageError

from .routed_sums import RoutedSums, added, total

NOT_AN_EXPERT = 65535
"""Fills the slots of `sampled_ids` that hold an identity expert or nothing."""

UNLABELLED = ""
"""The label of prompts that have none."""

FEW_TOKENS = 32
"""Routed tokens below which what is known of an expert is called uncertain: the standard error
of a mean over 32 tokens is already 18 % of one token's spread."""


@dataclass(frozen=True)
class LayerStatistics:
    """Additive statistics of one MoE layer with E experts.

    `labels`, `halves`, `together` and `logit_gram` are over every calibration token; `cosine_*`,
    `sampled_*` are over the sampled tokens on which every expert was evaluated.
    """

    layer: int
    labels: Mapping[str, RoutedSums]
    """Label of the prompts -> sums over their tokens; prompts without one are `UNLABELLED`."""
    together: NDArray[np.int64]
    """[E, E] tokens routed to both; the diagonal is `counts`."""
    cosine_sums: NDArray[np.float64]
    """[E, E] sum of max(0, cosine) of both outputs, over sampled tokens routed to either."""
    cosine_counts: NDArray[np.int64]
    """[E, E] how many sampled tokens that sum has."""
    sampled_ids: NDArray[np.uint16]
    """[sampled tokens, k] the experts of every sampled token, `NOT_AN_EXPERT` where none."""
    sampled_output_sums: NDArray[np.float64] | None = None
    """[E, width] sum of each expert's outputs over all sampled tokens, whoever was chosen; None
    where mean outputs were not asked for."""
    logit_gram: NDArray[np.float64] | None = None
    """[R, R] sum of l l^T over tokens, with l the R router logits (identity experts last); None
    where they were not asked for, or the layer does not show them."""
    halves: tuple[RoutedSums, RoutedSums] | None = None
    """The sums of two random halves of the prompts, whose agreement tells what more text would
    change (`convergence`). Without output sums."""

    @classmethod
    def empty(cls, layer: int, experts: int, k: int) -> LayerStatistics:
        """The statistics of no token at all: the neutral element of the addition."""
        return cls(
            layer=layer,
            labels={},
            together=np.zeros((experts, experts), np.int64),
            cosine_sums=np.zeros((experts, experts)),
            cosine_counts=np.zeros((experts, experts), np.int64),
            sampled_ids=np.zeros((0, k), np.uint16),
        )

    @property
    def num_experts(self) -> int:
        """E."""
        return len(self.together)

    @cached_property
    def routed(self) -> RoutedSums:
        """The sums over the tokens of all labels."""
        return total(self.labels.values(), self.num_experts)

    @property
    def counts(self) -> NDArray[np.int64]:
        """[E] tokens that were routed to the expert, over all labels."""
        return self.routed.counts

    def __add__(self, other: LayerStatistics) -> LayerStatistics:
        """The statistics of both texts together."""
        if self.layer != other.layer or self.num_experts != other.num_experts:
            raise UsageError("statistics of different layers or models cannot be added")
        return LayerStatistics(
            layer=self.layer,
            labels=joined(self.labels, other.labels),
            together=self.together + other.together,
            cosine_sums=self.cosine_sums + other.cosine_sums,
            cosine_counts=self.cosine_counts + other.cosine_counts,
            sampled_ids=np.concatenate([self.sampled_ids, other.sampled_ids]),
            sampled_output_sums=added(
                self.sampled_output_sums,
                other.sampled_output_sums,
                len(self.sampled_ids),
                len(other.sampled_ids),
            ),
            logit_gram=added(
                self.logit_gram, other.logit_gram, self.routed.tokens, other.routed.tokens
            ),
            halves=self._added_halves(other),
        )

    def _added_halves(self, other: LayerStatistics) -> tuple[RoutedSums, RoutedSums] | None:
        if self.halves is None or other.halves is None:
            known = self if self.halves is not None else other
            missing = other if known is self else self
            return None if missing.routed.tokens else known.halves
        (a, b), (c, d) = self.halves, other.halves
        return a + c, b + d

    def mean_sampled_outputs(self) -> NDArray[np.float64]:
        """[E, width] mean output of each expert over all sampled tokens, chosen or not.

        Raises:
            UsageError: The outputs were not summed, or no token was sampled.
        """
        if self.sampled_output_sums is None or not len(self.sampled_ids):
            raise UsageError("the outputs were not summed; calibrate with `mean_outputs=True`")
        return self.sampled_output_sums / len(self.sampled_ids)


def joined(
    first: Mapping[str, RoutedSums], second: Mapping[str, RoutedSums]
) -> dict[str, RoutedSums]:
    """The sums of every label of either, those of a shared label added; sorted by label."""
    found = dict(first)
    for label, sums in second.items():
        found[label] = found[label] + sums if label in found else sums
    return dict(sorted(found.items()))


@dataclass(frozen=True)
class Collected:
    """What a calibration was asked to collect, and how it read the text."""

    similarity: bool = False
    """Output similarities and router-logit Gram matrices."""
    similarity_tokens: int = 0
    """Tokens, at most, on which every expert was evaluated."""
    mean_outputs: bool = False
    chat_template: bool = False
    stop_at: float | None = None
    """The rank stability at which reading stopped, if it was allowed to."""
    cpu_experts: str = "stock"
    """How the experts were computed: `RoutedModel.cpu_experts`."""

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Calibration:
    """The statistics of all MoE layers of one model on one text."""

    model: ModelIdentity
    corpus: CorpusIdentity
    layers: tuple[LayerStatistics, ...]
    collected: Collected = Collected()

    @property
    def tokens(self) -> int:
        """Calibration tokens, pads not counted."""
        return self.corpus.tokens

    @property
    def labels(self) -> tuple[str, ...]:
        """The labels of the text, sorted; `UNLABELLED` among them if some prompts have none."""
        return tuple(self.layers[0].labels) if self.layers else ()

    def layer(self, index: int) -> LayerStatistics:
        """The statistics of the layer with this index in the model."""
        for statistics in self.layers:
            if statistics.layer == index:
                return statistics
        raise UsageError(f"layer {index} has no routed experts in {self.model.name}")

    def unreached(self) -> dict[int, tuple[int, ...]]:
        """Layer -> experts that no calibration token was routed to; layers without any left out."""
        return self.reached_by(0, 0)

    def uncertain(self, fewer_than: int = FEW_TOKENS) -> dict[int, tuple[int, ...]]:
        """Layer -> experts with at least one routed token, but fewer than `fewer_than`."""
        return self.reached_by(1, fewer_than - 1)

    def reached_by(self, least: int, most: int) -> dict[int, tuple[int, ...]]:
        """Layer -> experts with `least` to `most` routed tokens; layers without any left out."""
        found = {
            s.layer: tuple(np.flatnonzero((s.counts >= least) & (s.counts <= most)).tolist())
            for s in self.layers
        }
        return {layer: experts for layer, experts in found.items() if experts}

    def __add__(self, other: Calibration) -> Calibration:
        """The calibration on both texts; the models must be the same."""
        if self.model.fingerprint != other.model.fingerprint:
            raise UsageError(
                f"calibrations of two models ({self.model.name}, {other.model.name}) "
                "cannot be added; calibrate both texts on the same checkpoint"
            )
        if self.collected != other.collected:
            raise UsageError(
                "calibrations that collected different things cannot be added; calibrate both "
                f"texts with the same settings ({self.collected} and {other.collected})"
            )
        layers = tuple(a + b for a, b in zip(self.layers, other.layers, strict=True))
        return Calibration(self.model, self.corpus + other.corpus, layers, self.collected)
