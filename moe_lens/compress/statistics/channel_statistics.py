"""What calibration remembers of the channels inside each expert: sums, so that two runs add up.

A channel is one value between the projections of an expert: h_c = act(gate_c) x up_c, what the
down projection reads.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from moe_lens.compress.plan.identity import CorpusIdentity, ModelIdentity
from moe_lens.errors import UsageError


@dataclass(frozen=True)
class ChannelStatistics:
    """The channels of one MoE layer with E experts of one width.

    Counts are exact, sums are float64. The last two are read off the weights and belong to the
    model, not to the text.
    """

    layer: int
    counts: NDArray[np.int64]
    """[E] tokens that were routed to the expert."""
    squares: NDArray[np.float64]
    """[E, width] sum of h_c^2 over those tokens."""
    weighted_squares: NDArray[np.float64]
    """[E, width] sum of (weight of the expert x h_c)^2. Where the block weighs the experts' input
    (Llama 4) h_c carries the weight, and this is `squares`."""
    column_squares: NDArray[np.float64]
    """[E, width] squared L2 norm of the channel's column in the down projection."""
    row_squares: NDArray[np.float64]
    """[E, width] squared L2 norm of the rows that make the channel, multiplied where two do."""

    def __add__(self, other: ChannelStatistics) -> ChannelStatistics:
        """The statistics of both texts together."""
        if self.layer != other.layer or self.squares.shape != other.squares.shape:
            raise UsageError("statistics of different layers or models cannot be added")
        return replace(
            self,
            counts=self.counts + other.counts,
            squares=self.squares + other.squares,
            weighted_squares=self.weighted_squares + other.weighted_squares,
        )


@dataclass(frozen=True)
class ChannelCalibration:
    """The channels of all MoE layers of one model on one text."""

    model: ModelIdentity
    corpus: CorpusIdentity
    layers: tuple[ChannelStatistics, ...]

    def layer(self, index: int) -> ChannelStatistics:
        """The statistics of the layer with this index in the model."""
        for statistics in self.layers:
            if statistics.layer == index:
                return statistics
        raise UsageError(f"layer {index} has no routed experts in {self.model.name}")

    def __add__(self, other: ChannelCalibration) -> ChannelCalibration:
        """The calibration on both texts; the models must be the same."""
        if self.model.fingerprint != other.model.fingerprint:
            raise UsageError(
                f"calibrations of two models ({self.model.name}, {other.model.name}) "
                "cannot be added; calibrate both texts on the same checkpoint"
            )
        layers = tuple(a + b for a, b in zip(self.layers, other.layers, strict=True))
        return ChannelCalibration(self.model, self.corpus + other.corpus, layers)
