"""Running a model over a corpus and keeping its routing: a trace, a profile, or one prompt.

    trace = record_trace(router, "prompts.jsonl", "run/", sequence_length=512)
    profile = record_profile(router, "prompts.jsonl", outputs=True)
    routes = record_prompt(router, "def fib(n):")

All three run the model as it stands, with whatever override is in force, through
``router.forward``; the logits of the model's head are never computed. Memory is bounded by one
batch and, for a trace, one shard.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from moe_lens.corpus import Corpus, Prompt
from moe_lens.corpus.batches import plan_shards
from moe_lens.errors import UsageError
from moe_lens.profile import Profile
from moe_lens.telling import Progress
from moe_lens.trace import Routes, Trace

from .header import model_identity, trace_header
from .job import Job, Report
from .recorders import ProfileRecorder, RouteRecorder
from .writer import TraceWriter

if TYPE_CHECKING:
    from moe_lens.routed_model import RoutedModel

__all__ = ["record_profile", "record_prompt", "record_trace"]

# Default size of a shard. Also what an interruption costs at most, and what a reader holds.
SHARD_BYTES = 64 * 2**20
SHARD_TOKENS = 65536


def record_trace(
    router: RoutedModel,
    corpus: Corpus | str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    sample_size: int | None = None,
    sequence_length: int | None = None,
    batch_size: int = 8,
    router_logits: bool = False,
    chat_template: bool = False,
    resume: bool = True,
    overwrite: bool = False,
    seed: int = 0,
    shard_tokens: int | None = None,
    progress: Progress | None = None,
) -> Trace:
    """Run ``corpus`` through the model and write the route of every token to a trace folder.

    An interrupted recording goes on after its last whole shard when the same call is made again,
    and ends in the same bytes as one that was never interrupted. A complete trace of the same
    call is opened and returned.

    Args:
        router: The model.
        corpus: A `Corpus` or what `read_corpus` reads.
        output: Folder of the trace; made if it is not there.
        sample_size: Draw this many prompts at random (with ``seed``).
        sequence_length: Cut longer prompts after this many tokens.
        batch_size: Most prompts in one forward. Long prompts are batched fewer at a time.
        router_logits: Also keep the router logits (float16; often 10 times the size of the rest).
        chat_template: Render plain text prompts through the model's chat template.
        resume: Go on where an earlier recording into ``output`` stopped. If false, a trace that is
            already there is an error.
        overwrite: Remove a trace that is in ``output`` first.
        seed: Seed of the sample.
        shard_tokens: Tokens per shard; by default as many as take about 64 MB, 65,536 at most.
        progress: Called with tokens done and tokens in all, at the start and after each forward.

    Raises:
        UsageError: A setting is out of range, the folder holds something else, or a trace recorded
            from another model, corpus or with other settings.
        CaptureError: No prompt has any token, or a layer cannot give a value.
    """
    job = Job.prepare(
        router.tokenizer,
        corpus,
        sample_size=sample_size,
        sequence_length=sequence_length,
        batch_size=batch_size,
        chat_template=chat_template,
        seed=seed,
    )
    shard_tokens = _shard_tokens(router, router_logits, shard_tokens)
    settings = {
        "sample_size": sample_size,
        "sequence_length": sequence_length,
        "batch_size": batch_size,
        "router_logits": router_logits,
        "chat_template": chat_template,
        "seed": seed,
        "shard_tokens": shard_tokens,
    }
    header = trace_header(router, job, settings)
    prompts = {
        "tokens": job.lengths,
        "labels": job.labels,
        "sha256": [prompt.sha256[:16] for prompt in job.corpus.prompts],
    }
    writer = TraceWriter(
        Path(output).expanduser(),
        header,
        prompts,
        job.texts(),
        plan_shards(job.lengths, shard_tokens),
        resume=resume,
        overwrite=overwrite,
    )
    recorder = RouteRecorder(
        router.info.router_width, router_logits=router_logits, precision=np.float16
    )
    with writer:
        done = sum(entry.tokens for entry in writer.entries)
        report = Report(progress, done, sum(job.lengths))
        with router.recording(recorder):
            for shard in writer.shards[len(writer.entries) :]:
                job.run(router, recorder, shard, report)
                writer.write(recorder.take())
        writer.finish()
    return Trace.open(writer.folder)


def record_profile(
    router: RoutedModel,
    corpus: Corpus | str | os.PathLike[str],
    *,
    outputs: bool = False,
    vocabulary: bool = True,
    sample_size: int | None = None,
    sequence_length: int | None = None,
    batch_size: int = 8,
    chat_template: bool = False,
    seed: int = 0,
    progress: Progress | None = None,
) -> Profile:
    """Run ``corpus`` through the model and keep only sums; nothing is written.

    Args:
        router: The model.
        corpus: A `Corpus` or what `read_corpus` reads.
        outputs: Also sum norms and vectors of the expert outputs. Needs every expert output of a
            forward in memory: layers x tokens x k x hidden x 4 bytes.
        vocabulary: Keep token-to-expert counts.
        sample_size, sequence_length, batch_size, chat_template, seed, progress: As in
            `record_trace`.

    Raises:
        UsageError: A setting is out of range.
        CaptureError: No prompt has any token, or a layer cannot give its expert outputs.
    """
    job = Job.prepare(
        router.tokenizer,
        corpus,
        sample_size=sample_size,
        sequence_length=sequence_length,
        batch_size=batch_size,
        chat_template=chat_template,
        seed=seed,
    )
    recorder = ProfileRecorder(
        router.info.router_width,
        outputs=outputs,
        vocabulary=vocabulary,
        model=model_identity(router),
    )
    with router.recording(recorder):
        everything = range(len(job.tokens))
        job.run(router, recorder, everything, Report(progress, 0, sum(job.lengths)))
    return recorder.profile()


def record_prompt(
    router: RoutedModel,
    prompt: str | Prompt,
    *,
    sequence_length: int | None = None,
    chat_template: bool = False,
    router_logits: bool = False,
) -> Routes:
    """The route of one prompt, in memory.

    Raises:
        CaptureError: The prompt has no tokens.
    """
    prompt = Prompt(text=prompt) if isinstance(prompt, str) else prompt
    corpus = Corpus(name="prompt", prompts=(prompt,))
    job = Job.prepare(
        router.tokenizer, corpus, sequence_length=sequence_length, chat_template=chat_template
    )
    recorder = RouteRecorder(
        router.info.router_width, router_logits=router_logits, texts=job.texts()
    )
    with router.recording(recorder):
        job.run(router, recorder, range(1), Report(None, 0, job.lengths[0]))
    return recorder.take()


def _shard_tokens(router: RoutedModel, router_logits: bool, asked: int | None) -> int:
    if asked is not None and asked < 1:
        raise UsageError(f"the shard size is {asked} tokens; it must be at least 1")
    if asked is not None:
        return asked
    per_layer = 3 * max(1, router.info.experts_per_token)
    per_layer += 2 * router.info.router_width if router_logits else 0
    return min(SHARD_TOKENS, max(1, SHARD_BYTES // (per_layer * len(router.info.moe_layers))))
