"""The direct effect of every expert on what the head reads, summed over real text.

    effects = record_effects(router, "demo", Unembedding.of(router))
    effects.mean()[2, 7]        # expert 7 of the third MoE layer, [hidden]

An expert adds g f to the residual stream of a token: its output f times its weight g. How that
changes what the final norm gives is, to first order, the derivative of the norm at the token's own
final stream h, J(h) g f. For an RMSNorm, J(h) = gain (1 - u u^T) / rms(h) with u = h / |h|: what
points along the stream itself is divided out again. The sums of g f itself are kept, too, to be
read through the norm as if they stood alone.

Each batch runs twice: for h, then for f. Outputs live for one layer of one batch.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from moe_lens.corpus import Corpus
from moe_lens.families import MoELayer
from moe_lens.instrument import Forward
from moe_lens.telling import Progress

from .job import Job, Report

if TYPE_CHECKING:
    from moe_lens.routed_model import RoutedModel
    from moe_lens.unembedding import Unembedding

__all__ = ["EFFECT_TOKENS", "HALVES", "ExpertEffects", "record_effects"]

HALVES = 2
"""Parts of the text whose sums are kept apart, to tell what is stable from what is not."""

EFFECT_TOKENS = 8192
"""By default, about as many tokens are read, in whole prompts."""


@dataclass(frozen=True, eq=False)
class ExpertEffects:
    """Sums over the tokens routed to each expert, of two vectors.

    Attributes:
        layers: Model layer index of each MoE layer.
        counts: [halves, layers, R] int64, tokens routed to the expert in each half of the prompts.
        sums: [halves, layers, R, hidden] float64, of J(h) g f: in the space that the head reads.
        writes: [halves, layers, R, hidden] float64, of g f: in the residual stream.
    """

    layers: tuple[int, ...]
    counts: NDArray[np.int64]
    sums: NDArray[np.float64]
    writes: NDArray[np.float64]

    def mean(self, half: int | None = None, *, write: bool = False) -> NDArray[np.float64]:
        """[layers, R, hidden] per routed token; NaN where there is none.

        Args:
            half: One half of the prompts; None: all.
            write: The mean of g f, instead of that of J(h) g f.
        """
        part = slice(None) if half is None else slice(half, half + 1)
        counts = self.counts[part].sum(axis=0)
        sums = (self.writes if write else self.sums)[part].sum(axis=0)
        with np.errstate(invalid="ignore"):
            return np.divide(sums, counts[..., None])


def record_effects(
    router: RoutedModel,
    corpus: Corpus | str | os.PathLike[str],
    unembedding: Unembedding,
    *,
    tokens: int = EFFECT_TOKENS,
    sample_size: int | None = None,
    sequence_length: int | None = None,
    batch_size: int = 8,
    chat_template: bool = False,
    seed: int = 0,
    progress: Progress | None = None,
) -> ExpertEffects:
    """Run text of `corpus` and sum what each expert does to what the head reads.

    Args:
        router: The model.
        corpus: A `Corpus` or what `read_corpus` reads.
        unembedding: Of the model.
        tokens: Whole prompts are drawn at random until they have so many tokens.
        sample_size, sequence_length, batch_size, chat_template, seed, progress: As in
            `record_trace`.

    Raises:
        UsageError: A setting is out of range.
        UnsupportedModelError: It cannot be told what experts write into the stream.
        CaptureError: No prompt has any token, or a layer cannot give its expert outputs.
    """
    for layer in router.layers:
        layer.check_written()
    job = Job.prepare(
        router.tokenizer,
        corpus,
        sample_size=sample_size,
        sequence_length=sequence_length,
        batch_size=batch_size,
        chat_template=chat_template,
        seed=seed,
    )
    chosen = _drawn(job.lengths, tokens, seed)
    half = _halves([job.labels[prompt] for prompt in chosen])
    of_prompt = dict(zip(chosen, half.tolist(), strict=True))
    recorder = _EffectRecorder(router.layers, router.info.router_width, unembedding)
    report = Report(progress, 0, sum(job.lengths[prompt] for prompt in chosen))
    for wave in router.waves(job.batches(chosen)):
        with unembedding.watching() as streams:
            router.forwards(wave)
            mx.eval(streams)
        seen = [
            replace(batch, about=([of_prompt[each] for each in batch.about[0]], stream))
            for batch, stream in zip(wave, streams, strict=True)
        ]
        with router.recording(recorder):
            router.forwards(seen)
        del seen, streams
        report.add(sum(sum(batch.lengths or ()) for batch in wave))
        mx.clear_cache()
    return recorder.effects()


class _EffectRecorder:
    """A sink that sums direct effects, layer by layer.

    What is said about a forward is the half [B] of each of its prompts, and the final stream
    [B, L, hidden] of the same forward.
    """

    by_layer = True
    values = frozenset({"expert_ids", "expert_weights", "expert_outputs"})

    def __init__(self, layers: Sequence[MoELayer], width: int, unembedding: Unembedding) -> None:
        self._layers = {layer.index: layer for layer in layers}
        self._place = {layer.index: place for place, layer in enumerate(layers)}
        self._unembedding = unembedding
        shape = (HALVES, len(layers), width)
        self._counts = np.zeros(shape, dtype=np.int64)
        self._sums = np.zeros((*shape, unembedding.hidden_size))
        self._writes = np.zeros_like(self._sums)

    def record(self, forward: Forward) -> None:
        """Add one forward, or some layers of one; called by the instrument."""
        rows = np.flatnonzero(forward.valid)
        halves, stream = forward.about
        half = np.asarray(halves, dtype=np.int64)[rows // forward.shape[1]]
        kept = mx.array(rows)
        stream = stream.reshape(-1, stream.shape[-1])[kept]
        for layer in forward.layers:
            self._add(forward, layer, kept, stream, half)

    def _add(
        self,
        forward: Forward,
        index: int,
        rows: mx.array,
        stream: mx.array,
        half: NDArray[np.int64],
    ) -> None:
        layer, place = self._layers[index], self._place[index]
        width, hidden = self._counts.shape[-1], self._unembedding.hidden_size
        ids = np.array(forward.value("expert_ids", index)[rows]).astype(np.int64)
        outputs = forward.value("expert_outputs", index)[rows]
        vectors = layer.written(outputs.reshape(-1, outputs.shape[-1])).astype(mx.float32)
        if not layer.family.weights_on_input:
            weights = forward.value("expert_weights", index)[rows].astype(mx.float32)
            vectors = vectors * weights.reshape(-1, 1)
        effects = self._unembedding.effect(mx.repeat(stream, ids.shape[1], axis=0), vectors)
        cells = (half[:, None] * width + ids).ravel()
        empty, into = mx.zeros((HALVES * width, hidden)), mx.array(cells)
        for total, each in ((self._sums, effects), (self._writes, vectors)):
            summed = np.array(empty.at[into].add(each))
            total[:, place] += summed.reshape(HALVES, width, hidden)
        counted = np.bincount(cells, minlength=HALVES * width)
        self._counts[:, place] += counted.reshape(HALVES, width)

    def effects(self) -> ExpertEffects:
        """What was summed so far."""
        return ExpertEffects(tuple(self._layers), self._counts, self._sums, self._writes)


def _drawn(lengths: Sequence[int], tokens: int, seed: int) -> list[int]:
    """Prompts, ascending, drawn at random until they have so many tokens."""
    drawn, size = [], 0
    for prompt in np.random.default_rng(seed).permutation(len(lengths)).tolist():
        if size >= tokens:
            break
        if lengths[prompt]:
            drawn.append(prompt)
            size += lengths[prompt]
    return sorted(drawn)


def _halves(labels: Sequence[str | None]) -> NDArray[np.int64]:
    """0 or 1 in turn within each label, so that both halves have all labels alike."""
    half = np.zeros(len(labels), dtype=np.int64)
    for label in set(labels):
        members = np.flatnonzero([each == label for each in labels])
        half[members] = np.arange(len(members)) % HALVES
    return half
