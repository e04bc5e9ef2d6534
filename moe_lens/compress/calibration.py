"""One pass over the calibration text: which experts are chosen, how strongly, and what they answer.

The model runs untouched, under a sink that reduces every forward to sums. Similarities of outputs
need every expert on the same token; that costs about E / k times what the block itself computes,
so it is done for a bounded random sample of tokens, by calling the model's own experts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from moe_lens.corpus import Corpus
from moe_lens.corpus.batches import pad, plan_batches
from moe_lens.errors import CaptureError, MoeLensError, UnsupportedModelError, UsageError
from moe_lens.families import MoELayer

from .calibration_sink import CalibrationSink
from .identity import CorpusIdentity, ModelIdentity, fingerprint_folder, public_name
from .statistics import Calibration, LayerStatistics

if TYPE_CHECKING:
    from moe_lens.router import ExpertRouter

Progress = Callable[[int, int], None]

SIMILARITY_TOKENS = 2048
"""Sampled tokens on which every expert is evaluated: with 16 of 2 experts active a pair is
compared on some 500 tokens, with 128 of 8 on some 250."""

_BATCH_BYTES = 512 << 20


def calibrate(
    router: ExpertRouter,
    corpus: Corpus,
    *,
    sample_size: int | None = None,
    sequence_length: int | None = 512,
    similarity: bool = True,
    similarity_tokens: int = SIMILARITY_TOKENS,
    chat_template: bool = False,
    seed: int = 0,
    progress: Progress | None = None,
) -> Calibration:
    """Run the calibration text through the model and collect what planning needs.

    The model computes what it computes without us, bit for bit. Memory: the statistics
    ([E, E] a layer), one batch with the experts' outputs of all layers (at most one prompt, or
    512 MiB of them), and the outputs of all experts for a chunk of sampled tokens.

    Args:
        router: The model.
        corpus: The text; `sample_size` prompts of it, drawn with `seed`.
        sequence_length: Tokens of a prompt after which it is cut.
        similarity: Whether output similarities are needed (merging) or not (removing).
        similarity_tokens: How many tokens, drawn with `seed`, every expert is evaluated on.
        chat_template: Render the prompts through the tokenizer's chat template.
        progress: Called with tokens done and tokens in all.

    Raises:
        CaptureError: The text has no tokens.
        UnsupportedModelError: The layers differ in their number of experts, or a layer cannot
            show what is needed.
        UsageError: An override is in force.
        MoeLensError: An expert answers with NaN or infinity.
    """
    if router.overrides:
        raise UsageError("calibrate outside of `override`: it would measure another model")
    drawn = corpus if sample_size is None else corpus.sample(sample_size, seed)
    tokens = drawn.tokenize(router.tokenizer, sequence_length, chat_template)
    identity = CorpusIdentity(
        name=public_name(corpus.name),
        fingerprint=drawn.fingerprint,
        prompts=sum(len(ids) > 0 for ids in tokens),
        tokens=sum(map(len, tokens)),
        sequence_length=sequence_length,
        seed=seed,
    )
    sink = CalibrationSink(router.layers, similarity=similarity)
    model = identify(router)
    _check_values(router.layers, sink.values)
    collect(router, sink, tokens, similarity_tokens, seed, progress)
    _check_finite(sink.statistics)
    return Calibration(model, identity, sink.statistics)


def collect(
    router: ExpertRouter,
    sink: CalibrationSink,
    tokens: Sequence[Sequence[int]],
    similarity_tokens: int,
    seed: int,
    progress: Progress | None = None,
) -> None:
    """Run token lists under `sink`, in batches whose captured values stay bounded."""
    lengths = [len(ids) for ids in tokens]
    total = sum(lengths)
    if total == 0:
        raise CaptureError("the calibration text has no tokens; give one with text in it")
    chosen = _sample(lengths, similarity_tokens, seed)
    done = 0
    for batch in plan_batches(range(len(tokens)), lengths, 64, batch_tokens(router)):
        ids, real = pad([np.asarray(tokens[prompt], np.int32) for prompt in batch])
        mask = np.zeros(ids.shape, bool)
        for row, prompt in enumerate(batch):
            mask[row, : lengths[prompt]] = chosen[prompt]
        sink.sampled = mask.reshape(-1)
        with router.recording(sink):
            router.forward(ids, real)
        sink.compare_experts()
        done += sum(lengths[prompt] for prompt in batch)
        if progress is not None:
            progress(done, total)


def batch_tokens(router: ExpertRouter) -> int:
    """Tokens of one forward, so that the experts' outputs of all layers stay below 512 MiB.

    The logits of the head are never computed.
    """
    slots = sum(layer.k + 1 for layer in router.layers)
    return max(1, min(8192, _BATCH_BYTES // (4 * slots * (router.info.hidden_size or 4096))))


def _sample(lengths: Sequence[int], size: int, seed: int) -> list[NDArray[np.bool_]]:
    """For every prompt which of its tokens are among `size` drawn from all."""
    total = sum(lengths)
    drawn = np.random.default_rng(seed).choice(total, min(size, total), replace=False)
    mask = np.zeros(total, bool)
    mask[drawn] = True
    return np.split(mask, np.cumsum(lengths)[:-1])


def identify(router: ExpertRouter) -> ModelIdentity:
    """What planning needs to know about the model.

    Raises:
        UnsupportedModelError: The MoE layers differ in their number of experts, or their rule is
            not known.
    """
    shapes = {(layer.num_experts, layer.router_width, layer.k) for layer in router.layers}
    if len(shapes) > 1:
        raise UnsupportedModelError(
            "the layers of this model differ in their numbers of experts, which no single number "
            "in a smaller config.json can describe; it cannot be compressed"
        )
    first = router.layers[0]
    reason = first.reason("mask")
    if reason is not None:
        raise UnsupportedModelError(f"{router.info.model_type} cannot be compressed: {reason}")
    groups = first.groups
    return ModelIdentity(
        name=public_name(router.name),
        model_type=str(router.info.model_type),
        family=first.family.model_type,
        fingerprint="" if router.path is None else fingerprint_folder(Path(router.path)),
        num_experts=first.num_experts,
        router_width=first.router_width,
        experts_per_token=first.k,
        smallest_k=first.family.smallest_k,
        group_count=1 if groups is None else groups.count,
        group_keep=1 if groups is None else groups.keep,
        group_score="none" if groups is None else groups.score,
    )


def _check_finite(layers: Sequence[LayerStatistics]) -> None:
    for found in layers:
        broken = np.flatnonzero(~np.isfinite(found.weighted_norm_sums + found.norm_sums))
        if len(broken):
            raise MoeLensError(
                f"expert {broken[0]} of layer {found.layer} answers with NaN or infinity, so "
                "nothing can be said about it; its weights are damaged: download or convert the "
                "model again"
            )


def _check_values(layers: Sequence[MoELayer], values: frozenset[str]) -> None:
    for layer in layers:
        for name in sorted(values):
            reason = layer.reason(name)
            if reason is not None:
                raise UnsupportedModelError(
                    f"layer {layer.index} cannot show {name}, which calibration needs: {reason}"
                )
