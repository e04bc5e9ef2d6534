"""What a smaller model lost, measured on text that had no part in making it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import mlx.core as mx
import numpy as np

from moe_lens.corpus import Corpus
from moe_lens.errors import CaptureError, UsageError

from .bootstrap import Bootstrap
from .identity import CorpusIdentity, public_name
from .losses import Comparison, compare
from .size import Size
from .verification import LabelLoss, Loss, Speed, Verification

if TYPE_CHECKING:
    from moe_lens.router import ExpertRouter

Progress = Callable[[int, int], None]


def verify(
    original: ExpertRouter | str | Path,
    compressed: ExpertRouter | str | Path,
    corpus: Corpus,
    *,
    sample_size: int | None = None,
    sequence_length: int | None = 512,
    chat_template: bool = False,
    seed: int = 0,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> Verification:
    """Compare two models on the same tokens.

    Both run in the same process on the same batches; on MLX's CPU backend both compute in
    float32. Memory: both models, the logits of one batch, and 64 MiB of log-probabilities.

    Args:
        original: The parent, or its name.
        compressed: The smaller model, or its folder.
        corpus: Text that did not calibrate; `sample_size` prompts of it, drawn with `seed`.
        sequence_length: Tokens of a prompt after which it is cut.

    Raises:
        CaptureError: No prompt has two tokens.
        UsageError: The two models do not have one vocabulary.
    """
    from moe_lens.router import ExpertRouter

    def opened(model: ExpertRouter | str | Path) -> ExpertRouter:
        if isinstance(model, ExpertRouter):
            return model
        return ExpertRouter.from_pretrained(model, trust_remote_code=trust_remote_code)

    before, after = opened(original), opened(compressed)
    drawn = corpus if sample_size is None else corpus.sample(sample_size, seed)
    tokens = drawn.tokenize(before.tokenizer, sequence_length, chat_template)
    if not any(len(ids) > 1 for ids in tokens):
        raise CaptureError(
            f"no prompt of {corpus.name} has two tokens, so there is nothing to predict; give "
            "longer text"
        )
    vocabulary = _vocabulary(before, after)
    found = compare(before.forward, [after.forward], tokens, vocabulary, progress)[0]
    identity = CorpusIdentity(
        name=public_name(corpus.name),
        fingerprint=drawn.fingerprint,
        prompts=len(np.unique(found.prompt)),
        tokens=len(found.prompt),
        sequence_length=sequence_length,
        seed=seed,
    )
    return Verification(
        original=public_name(before.name),
        compressed=public_name(after.name),
        corpus=identity,
        loss=loss(found, seed=seed),
        labels=_by_label(found, [prompt.label for prompt in drawn.prompts], seed),
        size_before=Size(before.info.bytes, before.info.parameters),
        size_after=Size(after.info.bytes, after.info.parameters),
        speed=Speed(
            before=found.timed_tokens / max(found.seconds_before, 1e-9),
            after=found.timed_tokens / max(found.seconds_after, 1e-9),
        ),
        device=_device(),
    )


def loss(found: Comparison, *, seed: int = 0) -> Loss:
    """The measures of a comparison, each with its bootstrap over prompts."""
    bootstrap = Bootstrap(found.prompt, seed=seed)
    return Loss(
        prompts=bootstrap.prompts,
        tokens=len(found.prompt),
        perplexity_before=bootstrap.measure(found.nll_before, transform=np.exp),
        perplexity_after=bootstrap.measure(found.nll_after, transform=np.exp),
        perplexity_ratio=bootstrap.measure(
            found.nll_before,
            found.nll_after,
            transform=lambda before, after: np.exp(after - before),
        ),
        kl=bootstrap.measure(found.kl),
        kl_99=float(np.quantile(found.kl, 0.99)),
        top1_agreement=bootstrap.measure(found.same_top1),
    )


def _by_label(found: Comparison, labels: Sequence[str | None], seed: int) -> tuple[LabelLoss, ...]:
    names = sorted({label for label in labels if label is not None})
    of_token = np.array([labels[prompt] or "" for prompt in found.prompt])
    parts = []
    for name in names:
        chosen = of_token == name
        if not chosen.any():
            continue
        part = Comparison(
            found.prompt[chosen],
            found.nll_before[chosen],
            found.nll_after[chosen],
            found.kl[chosen],
            found.same_top1[chosen],
            found.seconds_before,
            found.seconds_after,
            found.timed_tokens,
        )
        parts.append(LabelLoss(name, loss(part, seed=seed)))
    return tuple(parts)


def _vocabulary(before: ExpertRouter, after: ExpertRouter) -> int:
    """The number of logits, which both models must share."""
    token = mx.zeros((1, 1), mx.int32)
    first, second = before.forward(token).shape[-1], after.forward(token).shape[-1]
    if first != second:
        raise UsageError(
            f"{after.name} has a vocabulary of {second} tokens and {before.name} one of {first}; "
            "only a model and its smaller version can be compared"
        )
    return int(first)


def _device() -> str:
    """Where both models were computed, and in which precision."""
    if mx.default_device() == mx.cpu:
        return "CPU in float32"
    return "GPU in the dtype of each checkpoint"
