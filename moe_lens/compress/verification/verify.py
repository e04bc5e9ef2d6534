"""What a smaller model lost, measured on text that had no part in making it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import mlx.core as mx
import numpy as np

from moe_lens.bootstrap import Bootstrap
from moe_lens.compress.calibration.held_out import check_not_remembered
from moe_lens.compress.plan.identity import CorpusIdentity, public_name
from moe_lens.compress.tensors.size import Size
from moe_lens.compress.tensors.unpacked import fastest
from moe_lens.corpus import Corpus
from moe_lens.errors import CaptureError, UsageError
from moe_lens.families import AUTO, SEGMENTED, decide
from moe_lens.loading import resolve
from moe_lens.telling import Progress

from .expert_map import ExpertMap, map_experts, stored_plan
from .losses import Comparison, compare
from .one_tokenizer import check_one_tokenizer
from .repetition import beginnings
from .routing_drift import DriftMeter, Watched
from .stock_load import TOKENS, Live, as_rows, check_stock_load, stock_logits
from .use import UseMeter
from .verification import LabelLoss, Loss, Verification

if TYPE_CHECKING:
    from moe_lens.router import ExpertRouter


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
    trust_model_file: bool = False,
    stream: bool | None = None,
    cpu_experts: str = AUTO,
    live: Live | None = None,
    name: str | None = None,
    progress: Progress | None = None,
) -> Verification:
    """Compare two models on the same tokens.

    Both run in the same process on the same batches; on MLX's CPU backend both compute in
    float32, from unpacked weights and with experts by segment (`tensors.unpacked`); the stock load,
    speed and memory are always those of the models as they are, and speed and memory are not
    measured of a streamed one. Log-probabilities are float32 everywhere. Memory: both models
    (unpacked as well, as far as there is plenty), the logits of one batch, and 64 MiB of
    log-probabilities.

    The folder of the smaller model is first loaded by stock ``mlx_lm.load`` and let go of; its
    logits must be those of the model that is then measured. Where `compressed` is a folder, that
    takes no memory beside what the comparison takes.

    Args:
        original: The parent, or its name.
        compressed: The smaller model, or its folder. A ``plan.json`` in it says which experts
            the parent's became.
        corpus: Text that did not calibrate; `sample_size` prompts of it, drawn with `seed`.
        sequence_length: Tokens of a prompt after which it is cut.
        chat_template: Render prompts through the tokenizer's chat template.
        seed: Of the sample, the beginnings that are continued, and the bootstrap.
        trust_remote_code: Let the models run the code they come with.
        trust_model_file: Let the smaller model run its model file, and no code of its tokenizer:
            for one that has just been written here.
        stream: Whether the weights of models that are given by name are read layer by layer;
            None: those that are too large for this machine. What it takes to use a streamed
            model (speed, memory, what it writes by itself) is not measured.
        cpu_experts: How the experts are computed while the two are compared: ``stock``,
            ``segmented`` (`RoutedModel.cpu_experts`), or ``auto``; `Verification.device` says it.
        live: The smaller model as it was before it was written, whose logits the folder must
            give as well.
        name: What the smaller model is called in the result; None for its own name.
        progress: Called with tokens done and in all, read and written ones.

    Raises:
        CaptureError: No prompt has two tokens.
        UsageError: The two models do not have one tokenizer and vocabulary, an override is in
            force, or the text calibrated the smaller model.
        MoeLensError: Stock mlx-lm does not load the smaller model, or gives other logits.
    """
    decide(cpu_experts)
    folder = _folder(compressed)
    before = _opened(original, trust_remote_code, stream)
    drawn = corpus if sample_size is None else corpus.sample(sample_size, seed)
    tokens = drawn.tokenize(before.tokenizer, sequence_length, chat_template)
    if not any(len(ids) > 1 for ids in tokens):
        raise CaptureError(
            f"no prompt of {corpus.name} has two tokens, so there is nothing to predict; give "
            "longer text"
        )
    probe = max(tokens, key=len)[:TOKENS]
    called = name or (compressed.name if not isinstance(compressed, str | Path) else compressed)
    names = public_name(before.name), public_name(called)

    def check_tokenizer(tokenizer: object) -> None:
        check_one_tokenizer(
            before.tokenizer, tokenizer, names, drawn, tokens, sequence_length, chat_template
        )

    stock = stock_load = None
    if folder is not None:
        stock = stock_logits(
            folder,
            probe,
            check_tokenizer,
            name=names[1],
            trust_remote_code=trust_remote_code,
            trust_model_file=trust_model_file,
            stream=stream,
        )
        if live is not None:
            stock_load = check_stock_load(stock, as_rows(live(probe)), "the plan applied in memory")
    after = _opened(compressed, trust_remote_code, stream, name, trust_model_file)
    check_tokenizer(after.tokenizer)
    if before.overrides or after.overrides:
        raise UsageError("verify outside of `override`: it would measure another model")
    vocabulary = _vocabulary(before, after)
    mapping = _mapping(before, after, drawn)
    if stock is not None:
        measured = as_rows(after.forward([probe]))
        found_stock = check_stock_load(stock, measured, "the model that is measured")
        stock_load = stock_load or found_stock
    streamed = before.streamed or after.streamed
    starts = beginnings(drawn.prompts, tokens, chat_template=chat_template, seed=seed)
    use = None if streamed else UseMeter(tokens, starts)
    to_read = sum(map(len, tokens))
    to_do = to_read + (0 if use is None else use.tokens)
    done = 0

    def advance(count: int) -> None:
        nonlocal done
        done += count
        if progress is not None:
            progress(done, to_do)

    fast = fastest(before, cpu_experts), fastest(after, cpu_experts)
    watched = Watched(fast[0]), Watched(fast[1])
    meter = DriftMeter(*watched, mapping)
    found = compare(
        watched[0].forwards,
        [watched[1].forwards],
        tokens,
        vocabulary,
        lambda read, _: advance(read - done),
        meter.add,
        # Both models' forwards may be held.
        wave_tokens=max(before.wave_tokens, after.wave_tokens) // 2,
    )[0]
    # Prompts that predict nothing were not read.
    advance(to_read - done)
    identity = CorpusIdentity(
        name=public_name(corpus.name),
        fingerprint=drawn.fingerprint,
        prompts=len(np.unique(found.prompt)),
        tokens=len(found.prompt),
        sequence_length=sequence_length,
        seed=seed,
    )
    return Verification(
        original=names[0],
        compressed=names[1],
        corpus=identity,
        loss=loss(found, seed=seed),
        labels=_by_label(found, [prompt.label for prompt in drawn.prompts], seed),
        size_before=Size(before.info.bytes, before.info.parameters),
        size_after=Size(after.info.bytes, after.info.parameters),
        use=None if use is None else use.measure(before, after, vocabulary, seed, advance),
        drift=meter.found(seed),
        stock_load=stock_load,
        device=_device(*(each.cpu_experts for each in fast)),
    )


def _opened(
    model: ExpertRouter | str | Path,
    trust_remote_code: bool,
    stream: bool | None,
    name: str | None = None,
    trust_model_file: bool = False,
) -> ExpertRouter:
    from moe_lens.router import ExpertRouter

    if isinstance(model, ExpertRouter):
        return model
    found = ExpertRouter.from_pretrained(
        model,
        trust_remote_code=trust_remote_code,
        trust_model_file=trust_model_file,
        stream=stream,
    )
    found.name = name or found.name
    return found


def _folder(model: ExpertRouter | str | Path) -> Path | None:
    """Where a model stands on disk; None for one that is in memory only."""
    return resolve(model) if isinstance(model, str | Path) else model.path


def _mapping(before: ExpertRouter, after: ExpertRouter, drawn: Corpus) -> ExpertMap:
    try:
        plan = stored_plan(after)
    except UsageError as error:
        return ExpertMap({}, reason=str(error))
    if plan is not None:
        check_not_remembered(plan, public_name(after.name), drawn)
    return map_experts(before, after, plan)


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
        parts.append(LabelLoss(name, loss(found.where(chosen), seed=seed)))
    return tuple(parts)


def _vocabulary(before: ExpertRouter, after: ExpertRouter) -> int:
    """The number of logits, which both models must share."""
    first, second = before.vocabulary, after.vocabulary
    if first != second:
        raise UsageError(
            f"{after.name} has a vocabulary of {second} tokens and {before.name} one of {first}; "
            "only a model and its smaller version can be compared"
        )
    return first


def _device(before: str, after: str) -> str:
    """Where both models were computed, in which precision, and how their experts were."""
    if mx.default_device() == mx.cpu:
        segmented = before == after == SEGMENTED
        return "CPU in float32, experts by segment" if segmented else "CPU in float32"
    return "GPU in the dtype of each checkpoint"
