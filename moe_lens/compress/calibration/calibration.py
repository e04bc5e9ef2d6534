"""One pass over the calibration text: which experts are chosen, how strongly, and what they answer.

The model runs untouched, under a sink that reduces every forward to sums. Similarities of outputs
need every expert on the same token; that costs about E / k times what the block itself computes,
so it is done for a bounded random sample of tokens, by calling the model's own experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from moe_lens.compress.plan.identity import (
    CorpusIdentity,
    ModelIdentity,
    fingerprint_folder,
    public_name,
)
from moe_lens.compress.statistics.convergence import rank_stability
from moe_lens.compress.statistics.statistics import UNLABELLED, Calibration, Collected
from moe_lens.corpus import Corpus
from moe_lens.corpus.batches import pad, plan_batches, plan_shards
from moe_lens.errors import CaptureError, UnsupportedModelError, UsageError
from moe_lens.experts.layer_sample import FORWARD_BYTES, forward_tokens
from moe_lens.streaming import Batch
from moe_lens.telling import Progress

from .checks import check_finite, check_values
from .sink import CalibrationSink, Tokens
from .under_way import UnderWay
from .watched_run import run_watched

if TYPE_CHECKING:
    from moe_lens.router import ExpertRouter


SIMILARITY_TOKENS = 2048
"""Sampled tokens on which every expert is evaluated: with 16 of 2 experts active a pair is
compared on some 500 tokens, with 128 of 8 on some 250."""

STOP_TOKENS = 8192
"""Tokens after which one asks whether the ranking of the experts is stable."""

_BATCH_BYTES = FORWARD_BYTES


def calibrate(
    router: ExpertRouter,
    corpus: Corpus,
    *,
    sample_size: int | None = None,
    sequence_length: int | None = 512,
    similarity: bool = True,
    similarity_tokens: int = SIMILARITY_TOKENS,
    mean_outputs: bool = False,
    chat_template: bool = False,
    stop_at: float | None = None,
    seed: int = 0,
    progress: Progress | None = None,
    under_way: Path | None = None,
) -> Calibration:
    """Run the calibration text through the model, once, and collect what planning needs.

    The sums of every saliency are kept for each label of the text, and for two random halves of
    its prompts (`convergence`), at no further cost. The model computes what it computes without
    us, bit for bit; that is checked on the first tokens.
    Memory: the statistics ([E, E] a layer, and a few [E] for each label), one batch with the
    experts' outputs of a layer (at most one prompt, or 512 MiB of them), and the outputs of all
    experts for a chunk of sampled tokens.

    Args:
        router: The model.
        corpus: The text; `sample_size` prompts of it, drawn with `seed`.
        sequence_length: Tokens of a prompt after which it is cut.
        similarity: Whether output similarities and router-logit Gram matrices are needed
            (merging) or not (removing).
        similarity_tokens: How many tokens, drawn with `seed`, every expert is evaluated on.
        mean_outputs: Whether the sum of the outputs of each expert is kept, in float64, for each
            label and, with `similarity`, over all sampled tokens: [E, hidden] a layer.
        chat_template: Render the prompts through the tokenizer's chat template.
        stop_at: Read the prompts in random order, and stop as soon as two halves of what was read
            rank the experts of every layer this much alike (`convergence.rank_stability` of
            REAP, at most 1); asked every `STOP_TOKENS` tokens. None: read all of the text.
        progress: Called with tokens done and tokens in all.
        under_way: A file in which the sums are kept from time to time until all text is read. If
            it is there, and of this very pass, it is gone on with; who calls removes it.

    Raises:
        CaptureError: The text has no tokens, or watching the model changes what it computes.
        UnsupportedModelError: The layers differ in their number of experts, or a layer cannot
            show what is needed.
        UsageError: An override is in force, or `stop_at` is not between 0 and 1.
        MoeLensError: An expert answers with NaN or infinity.
    """
    if router.overrides:
        raise UsageError("calibrate outside of `override`: it would measure another model")
    if stop_at is not None and not 0.0 < stop_at <= 1.0:
        raise UsageError(f"the rank stability to stop at is {stop_at:g}; it lies between 0 and 1")
    drawn = corpus if sample_size is None else corpus.sample(sample_size, seed)
    tokens = drawn.tokenize(router.tokenizer, sequence_length, chat_template)
    sink = CalibrationSink(router.layers, similarity=similarity, mean_outputs=mean_outputs)
    model = identify(router)
    check_values(router.layers, sink.values)
    labels = [prompt.label or UNLABELLED for prompt in drawn.prompts]
    read = collect(
        router,
        sink,
        tokens,
        similarity_tokens if similarity else 0,
        seed,
        progress,
        labels=labels,
        stop_at=stop_at,
        under_way=under_way,
    )
    check_finite(sink.statistics, router.path)
    return Calibration(
        model,
        identify_corpus(drawn, [tokens[prompt] for prompt in read], sequence_length, seed),
        sink.statistics,
        Collected(
            similarity=similarity,
            similarity_tokens=similarity_tokens if similarity else 0,
            mean_outputs=mean_outputs,
            chat_template=chat_template,
            stop_at=stop_at,
            cpu_experts=router.cpu_experts,
        ),
    )


def identify_corpus(
    corpus: Corpus, tokens: Sequence[Sequence[int]], sequence_length: int | None, seed: int
) -> CorpusIdentity:
    """What a plan and a statistics file remember of the text, of which `tokens` were read."""
    return CorpusIdentity(
        name=public_name(corpus.name),
        fingerprint=corpus.fingerprint,
        prompts=sum(len(ids) > 0 for ids in tokens),
        tokens=sum(map(len, tokens)),
        sequence_length=sequence_length,
        seed=seed,
    )


def collect(
    router: ExpertRouter,
    sink: CalibrationSink,
    tokens: Sequence[Sequence[int]],
    similarity_tokens: int,
    seed: int,
    progress: Progress | None = None,
    *,
    labels: Sequence[str] | None = None,
    stop_at: float | None = None,
    under_way: Path | None = None,
) -> list[int]:
    """Run token lists under `sink`, in batches whose captured values stay bounded.

    Args:
        similarity_tokens: How many tokens, drawn from all, every expert is evaluated on.
        labels: One for each list; None leaves all unlabelled.
        stop_at, under_way: As in `calibrate`.

    Returns:
        The places of the token lists that were read, in `tokens`.
    """
    lengths = [len(ids) for ids in tokens]
    total = sum(lengths)
    if total == 0:
        raise CaptureError("the calibration text has no tokens; give one with text in it")
    draw = np.random.default_rng(seed)
    chosen = _sample(lengths, similarity_tokens, draw)
    order = draw.permutation(len(tokens))
    halves = np.zeros(len(tokens), bool)
    halves[order[1::2]] = True
    names, places = np.unique(labels or [UNLABELLED] * len(tokens), return_inverse=True)

    def batch_of(prompts: list[int]) -> Batch:
        ids, real = pad([np.asarray(tokens[prompt], np.int32) for prompt in prompts])
        sampled = np.zeros(ids.shape, bool)
        for row, prompt in enumerate(prompts):
            sampled[row, : lengths[prompt]] = chosen[prompt]
        about = Tokens(
            labels=tuple(names.tolist()),
            label=np.repeat(places[prompts], ids.shape[1]),
            second_half=np.repeat(halves[prompts], ids.shape[1]),
            sampled=sampled.reshape(-1),
        )
        return Batch(ids, real, about)

    sink.progress = None if progress is None else lambda done: progress(done, total)
    parts = [
        list(plan_batches(part, lengths, 64, batch_tokens(router)))
        for part in _parts(order, lengths, stop_at)
    ]
    asked = [similarity_tokens, seed, labels, sorted(sink.values)]
    way = UnderWay(under_way, sink, [batch for part in parts for batch in part], [tokens, asked])
    if way.done and progress is not None:
        progress(sink.tokens, None)
    read: list[int] = []
    check, last = True, 0
    for planned in parts:
        left = planned[max(0, way.done - last) :]
        last += len(planned)
        run_watched(router, sink, map(batch_of, left), check=check, added=way.added)
        check = check and not left
        read += [prompt for batch in planned for prompt in batch]
        # Of a part that an earlier run has gone beyond, it has asked already.
        asks = last == way.done
        if stop_at is not None and asks and _least_stability(sink) >= stop_at:
            break
    if progress is not None and sink.tokens < total:  # it was stopped before: all is read
        progress(sink.tokens, sink.tokens)
    return sorted(read)


def _least_stability(sink: CalibrationSink) -> float:
    return min(rank_stability(sink.statistics).values())


def _parts(
    order: NDArray[np.int64], lengths: Sequence[int], stop_at: float | None
) -> list[list[int]]:
    """Which prompts run before one asks whether to stop: all, or `STOP_TOKENS` in random order."""
    if stop_at is None:
        return [list(range(len(order)))]
    shards = plan_shards([lengths[prompt] for prompt in order], STOP_TOKENS)
    return [order[shard.start : shard.stop].tolist() for shard in shards]


def batch_tokens(router: ExpertRouter) -> int:
    """Tokens of one forward; see `forward_tokens`."""
    return forward_tokens(router, _BATCH_BYTES)


def _sample(
    lengths: Sequence[int], size: int, draw: np.random.Generator
) -> list[NDArray[np.bool_]]:
    """For every prompt which of its tokens are among `size` drawn from all."""
    total = sum(lengths)
    mask = np.zeros(total, bool)
    mask[draw.choice(total, min(size, total), replace=False)] = True
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
        expert_width=first.expert_width,
    )
