"""One pass over the calibration text that watches the channels inside the experts.

What each expert's down projection reads is [tokens, k, width] of every layer, as much as the
experts' outputs or more; each batch of it is reduced to sums and dropped.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from numpy.typing import NDArray

from moe_lens.compress.statistics.array_file import Arrays
from moe_lens.compress.statistics.channel_statistics import ChannelCalibration, ChannelStatistics
from moe_lens.corpus import Corpus
from moe_lens.corpus.batches import pad, plan_batches
from moe_lens.errors import CaptureError, UsageError
from moe_lens.experts.quantisation import Quantisation, unpack
from moe_lens.families import MoELayer, down_name
from moe_lens.instrument import Forward
from moe_lens.streaming import Batch
from moe_lens.telling import Progress

from .calibration import identify, identify_corpus
from .checks import check_values, not_finite
from .under_way import UnderWay
from .watched_run import run_watched

if TYPE_CHECKING:
    from moe_lens.router import ExpertRouter


_BATCH_BYTES = 256 << 20


def calibrate_channels(
    router: ExpertRouter,
    corpus: Corpus,
    *,
    sequence_length: int | None = 512,
    chat_template: bool = False,
    seed: int = 0,
    progress: Progress | None = None,
    under_way: Path | None = None,
) -> ChannelCalibration:
    """Run the calibration text through the model and sum the squares of every channel.

    Memory: two [E, width] float64 a layer, and one batch with the channels of a layer (at most
    one prompt, or 256 MiB of them).

    Args:
        router: The model; it computes what it computes without us, bit for bit, which is checked
            on the first tokens.
        corpus: The text.
        sequence_length: Tokens of a prompt after which it is cut.
        chat_template: Render the prompts through the tokenizer's chat template.
        seed: Recorded with the text.
        progress: Called with tokens done and tokens in all.
        under_way: As in `calibrate`.

    Raises:
        CaptureError: The text has no tokens, or watching the model changes what it computes.
        UnsupportedModelError: As in `calibrate`.
        UsageError: An override is in force.
        MoeLensError: A channel is NaN or infinite.
    """
    if router.overrides:
        raise UsageError("calibrate outside of `override`: it would measure another model")
    model = identify(router)
    tokens = corpus.tokenize(router.tokenizer, sequence_length, chat_template)
    lengths = [len(ids) for ids in tokens]
    if not any(lengths):
        raise CaptureError("the calibration text has no tokens; give one with text in it")
    check_values(router.layers, ChannelSink.values)
    sink = ChannelSink(router.layers)
    sink.progress = None if progress is None else lambda done: progress(done, sum(lengths))
    planned = list(plan_batches(range(len(tokens)), lengths, 64, _batch_tokens(router.layers)))
    way = UnderWay(under_way, sink, planned, tokens)
    if way.done and progress is not None:
        progress(sum(lengths[prompt] for batch in planned[: way.done] for prompt in batch), None)
    left = planned[way.done :]
    padded = (pad([np.asarray(tokens[prompt], np.int32) for prompt in batch]) for batch in left)
    run_watched(router, sink, (Batch(ids, real) for ids, real in padded), added=way.added)
    layers = tuple(sink.statistics(layer) for layer in router.layers)
    _check_finite(layers, router.path)
    return ChannelCalibration(model, identify_corpus(corpus, tokens, sequence_length, seed), layers)


def _batch_tokens(layers: Sequence[MoELayer]) -> int:
    values = max(layer.k * layer.expert_width for layer in layers)
    return max(1, min(4096, _BATCH_BYTES // (4 * values)))


class ChannelSink:
    """Adds the squares of the channels of each forward to their sums."""

    values = frozenset({"expert_ids", "expert_weights", "expert_channels"})
    by_layer = True

    def __init__(self, layers: Sequence[MoELayer]) -> None:
        self.progress: Callable[[int], None] | None = None
        """Called with the tokens done; of a layer that has run alone, its share of them."""
        self._done = 0
        self._layers = {layer.index: layer for layer in layers}
        self._counts = {layer.index: np.zeros(layer.num_experts, np.int64) for layer in layers}
        shapes = {layer.index: (layer.num_experts, layer.expert_width) for layer in layers}
        self._squares = {index: np.zeros(shape) for index, shape in shapes.items()}
        self._weighted = {index: np.zeros(shape) for index, shape in shapes.items()}
        self._of_weights: dict[int, tuple[NDArray[np.float64], NDArray[np.float64]]] = {}

    def statistics(self, layer: MoELayer) -> ChannelStatistics:
        """The sums so far, with the norms of the layer's weights."""
        columns, rows = self._of_weights[layer.index]
        return ChannelStatistics(
            layer=layer.index,
            counts=self._counts[layer.index],
            squares=self._squares[layer.index],
            weighted_squares=self._weighted[layer.index],
            column_squares=columns,
            row_squares=rows,
        )

    def sums(self) -> tuple[dict[str, Any], Arrays]:
        """All that was added so far, once every layer has run the same tokens."""
        arrays: Arrays = {}
        for index in self._layers:
            columns, rows = self._of_weights[index]
            arrays |= {
                f"{index}.counts": self._counts[index],
                f"{index}.squares": self._squares[index],
                f"{index}.weighted": self._weighted[index],
                f"{index}.columns": columns,
                f"{index}.rows": rows,
            }
        return {"done": self._done}, arrays

    def go_on(self, content: dict[str, Any], arrays: Arrays) -> None:
        """Begin with what `sums` gave."""
        self._done = int(content["done"])
        for index in self._layers:
            # Copies, which can be added to.
            self._counts[index] = arrays[f"{index}.counts"].copy()
            self._squares[index] = arrays[f"{index}.squares"].copy()
            self._weighted[index] = arrays[f"{index}.weighted"].copy()
            self._of_weights[index] = arrays[f"{index}.columns"], arrays[f"{index}.rows"]

    def record(self, forward: Forward) -> None:
        """Reduce one forward; called by the instrument after it."""
        lazy = {
            index: tuple(
                forward.value(name, index)
                for name in ("expert_ids", "expert_weights", "expert_channels")
            )
            for index in forward.layers
        }
        mx.eval(list(lazy.values()))
        for index in list(lazy):
            ids, weights, channels = lazy.pop(index)
            self._add(index, forward.valid, ids, weights, channels)
            if index not in self._of_weights:  # now that the layer's weights are in memory
                self._of_weights[index] = weight_squares(self._layers[index])
        self._done += int(forward.valid.sum()) * len(forward.layers)
        if self.progress is not None:
            self.progress(self._done // len(self._layers))

    def _add(
        self,
        index: int,
        valid: NDArray[np.bool_],
        ids: mx.array,
        weights: mx.array,
        channels: mx.array,
    ) -> None:
        layer = self._layers[index]
        experts = np.array(ids)
        # Some blocks run slots of weight 0 behind the real ones.
        values = np.array(channels[:, : experts.shape[1]].astype(mx.float32))
        gates = np.array(weights.astype(mx.float32)).astype(np.float64)
        if layer.family.weights_on_input:
            gates = np.ones_like(gates)
        real = valid[:, None] & (experts < layer.num_experts)
        chosen, values, gates = experts[real], values[real], gates[real]
        for expert in np.unique(chosen):
            rows = chosen == expert
            squares = np.square(values[rows].astype(np.float64))
            self._counts[index][expert] += len(squares)
            self._squares[index][expert] += squares.sum(axis=0)
            self._weighted[index][expert] += np.square(gates[rows]) @ squares


def weight_squares(layer: MoELayer) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """`column_squares` and `row_squares` of `ChannelStatistics`, [E, width], expert by expert."""
    columns = np.ones((layer.num_experts, layer.expert_width))
    rows = np.ones((layer.num_experts, layer.expert_width))
    for expert in range(layer.num_experts):
        module = layer.experts[expert] if layer.list_experts else layer.experts
        stacked = None if layer.list_experts else expert
        down = down_name(module)
        for name, child in module.children().items():
            if not isinstance(child, nn.Module) or "weight" not in child or child.weight.ndim < 2:
                continue
            squares = mx.square(_weight(child, stacked))
            norms = squares.sum(axis=0 if name == down else 1)
            (columns if name == down else rows)[expert] *= np.array(norms)
    return columns, rows


def _weight(module: nn.Module, expert: int | None) -> mx.array:
    """[out, in] float32, of one expert where the module holds all of them."""
    leaves = {name: value for name, value in module.items() if isinstance(value, mx.array)}
    if expert is not None:
        leaves = {name: value[expert : expert + 1] for name, value in leaves.items()}
    packed = Quantisation.of(module)
    weight = leaves["weight"].astype(mx.float32) if packed is None else unpack(leaves, packed)
    return weight if expert is None else weight[0]


def _check_finite(layers: Sequence[ChannelStatistics], folder: Path | None) -> None:
    for found in layers:
        broken = np.flatnonzero(~np.isfinite(found.squares.sum(axis=1)))
        if len(broken):
            who = f"a channel of expert {broken[0]} of layer {found.layer}"
            raise not_finite(f"{who} is NaN or infinite", folder)
