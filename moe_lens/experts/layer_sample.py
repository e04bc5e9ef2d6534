"""What the layers of a model read on a sample of the tokens of a text.

Some methods need more than sums: the same tokens sent through every expert, tried again under
another routing, or fitted by a new router row. They get the inputs of a bounded sample of tokens,
drawn once, and run the model's own experts on them, one layer at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import mlx.core as mx
import numpy as np

from moe_lens.corpus.batches import draw_prompts, pad, plan_batches
from moe_lens.errors import CaptureError, UnsupportedModelError
from moe_lens.families import MoELayer
from moe_lens.instrument import Forward
from moe_lens.streaming import Batch
from moe_lens.telling import Progress

if TYPE_CHECKING:
    from moe_lens.routed_model import RoutedModel

TOKENS = 1024
"""Sampled tokens, at most."""

OUTPUT_BYTES = 256 << 20
"""The outputs of all experts of a layer, in float32, on the sampled tokens: fewer tokens are
taken where they would be larger. One layer is held at a time."""

READ_TOKENS = 8192
"""Tokens that are run to draw the sample from."""

FORWARD_BYTES, FORWARD_TOKENS = 512 << 20, 4096

VALUES = ("expert_inputs", "router_logits")
"""What is kept of every layer."""


@dataclass(frozen=True)
class LayerSample:
    """What one layer reads on the sampled tokens."""

    layer: MoELayer
    inputs: mx.array
    """[S, width] the input of the experts."""
    logits: mx.array
    """[S, router width]."""
    router_inputs: mx.array | None = None
    """[S, hidden] what the projection of the router reads; None where it was not asked for."""


class SampleSink:
    """Keeps what every layer reads on the sampled tokens of each forward.

    What is said about a forward is a mask [B * L]: which of its tokens are in the sample.
    """

    by_layer = True

    def __init__(self, layers: Sequence[MoELayer], names: Sequence[str] = VALUES) -> None:
        self.values = frozenset(names)
        self._names = tuple(names)
        self._layers = layers
        self._parts: dict[int, list[list[mx.array]]] = {layer.index: [] for layer in layers}

    def record(self, forward: Forward) -> None:
        """Keep the sampled rows; called by the instrument after each forward."""
        rows = mx.array(np.flatnonzero(forward.about & forward.valid).astype(np.uint32))
        if not rows.size:
            return
        for index in forward.layers:
            self._parts[index].append([forward.value(name, index)[rows] for name in self._names])
            mx.eval(self._parts[index][-1])

    def samples(self) -> list[LayerSample]:
        """The layers with all that was kept."""
        found = []
        for layer in self._layers:
            columns = zip(*self._parts[layer.index], strict=True)
            found.append(LayerSample(layer, *(mx.concatenate(list(each)) for each in columns)))
        return found


def sample_reason(layers: Sequence[MoELayer], names: Sequence[str]) -> str | None:
    """Why some layer does not show, or take, what is named; None: all do."""
    for layer in layers:
        for name in names:
            reason = layer.reason(name)
            if reason is not None:
                return f"layer {layer.index} gives no {name}, which it needs: {reason}"
    return None


def sample_layers(
    router: RoutedModel,
    tokens: Sequence[Sequence[int]],
    seed: int = 0,
    progress: Progress | None = None,
    *,
    router_inputs: bool = False,
) -> list[LayerSample]:
    """Run some of a text and keep what every layer reads on a sample of its tokens.

    Memory: the inputs and logits of at most `TOKENS` tokens for every layer, in the model's own
    dtype, and one batch of them.

    Args:
        router: The model.
        tokens: Token lists; whole prompts are drawn until `READ_TOKENS` are together.
        seed: Of both draws.
        progress: Called with tokens done and in all.
        router_inputs: Also keep what the router reads, [tokens, hidden] a layer.

    Raises:
        UnsupportedModelError: A layer does not show what is needed.
        CaptureError: There are no tokens.
    """
    names = (*VALUES, "router_inputs") if router_inputs else VALUES
    reason = sample_reason(router.layers, names)
    if reason is not None:
        raise UnsupportedModelError(f"the method cannot choose here ({reason}); take another one")
    drawn = draw_prompts(tokens, READ_TOKENS, seed)
    lengths = [len(ids) for ids in drawn]
    total = sum(lengths)
    if total == 0:
        raise CaptureError("the calibration text has no tokens; give one with text in it")
    size = min(total, *(sample_size(layer, router.info.hidden_size) for layer in router.layers))
    marked = np.zeros(total, bool)
    marked[np.random.default_rng(seed).choice(total, size, replace=False)] = True
    chosen = np.split(marked, np.cumsum(lengths)[:-1])
    sink, done = SampleSink(router.layers, names), 0

    def batch_of(prompts: list[int]) -> Batch:
        ids, real = pad([np.asarray(drawn[prompt], np.int32) for prompt in prompts])
        mask = np.zeros(ids.shape, bool)
        for row, prompt in enumerate(prompts):
            mask[row, : lengths[prompt]] = chosen[prompt]
        return Batch(ids, real, mask.reshape(-1))

    planned = plan_batches(range(len(drawn)), lengths, 64, forward_tokens(router))
    with router.recording(sink):
        for wave in router.waves(map(batch_of, planned)):
            router.forwards(wave)
            done += sum(sum(batch.lengths or ()) for batch in wave)
            if progress is not None:
                progress(done, total)
    return sink.samples()


def forward_tokens(router: RoutedModel, most_bytes: int = FORWARD_BYTES) -> int:
    """Tokens of one forward, so that the experts' outputs of a layer stay below `most_bytes`.

    The logits of the head are never computed.
    """
    slots = max(layer.k + 1 for layer in router.layers)
    hidden = router.info.hidden_size or 4096
    return max(1, min(FORWARD_TOKENS, most_bytes // (4 * slots * hidden)))


def sample_size(layer: MoELayer, hidden: int | None) -> int:
    """How many tokens' outputs of all experts stay within `OUTPUT_BYTES`, at most `TOKENS`."""
    return max(1, min(TOKENS, OUTPUT_BYTES // (4 * layer.num_experts * (hidden or 4096))))
