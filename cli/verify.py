"""``moe-lens verify``: what a smaller model lost against its parent."""

from __future__ import annotations

from typing import Annotated

import typer

from moe_lens.telling import LOADING

from . import screen
from .options import (
    ChatTemplate,
    CpuExperts,
    CpuExpertsMode,
    EvalData,
    Json,
    MaxKl,
    PromptLength,
    Seed,
    Stream,
    TrustRemoteCode,
)
from .progress import stages
from .verification import show_verification, show_warnings

Parent = Annotated[
    str,
    typer.Argument(
        metavar="PARENT",
        show_default=False,
        help="The model that was compressed: demo, a folder, or a model of the hub (owner/name).",
    ),
]

Child = Annotated[
    str,
    typer.Argument(
        metavar="CHILD",
        show_default=False,
        help="What became of it: a folder that mlx_lm.load opens, or a model of the hub.",
    ),
]


def verify(
    parent: Parent,
    child: Child,
    eval_data: EvalData = None,
    sample_size: Annotated[
        int, typer.Option(metavar="N", min=1, help="Use N prompts at most, drawn with --seed.")
    ] = 128,
    sequence_length: PromptLength = 512,
    chat_template: ChatTemplate = False,
    max_kl: MaxKl = None,
    seed: Seed = 0,
    cpu_experts: CpuExperts = CpuExpertsMode.AUTO,
    trust_remote_code: TrustRemoteCode = False,
    stream: Stream = None,
    as_json: Json = False,
) -> None:
    """Measure what a smaller model lost, on held-out text.

    \b
    moe-lens verify demo demo-small
    moe-lens verify demo demo-small --max-kl 0.1
    moe-lens verify MODEL CHILD --eval-data prompts.jsonl --json > loss.json

    Both models read the same text and continue the same beginnings. Shown are, for all text and
    for each label: perplexity with its standard error, KL divergence (mean and 99th percentile
    over tokens), and how often the likeliest next token is the same. Further: how much of the
    routing weight goes elsewhere, repetition in generated text, bytes, memory and speed.

    CHILD is first loaded by stock mlx_lm.load, and its logits must be those of the model that is
    measured. On a CPU both models compute in float32.

    With --max-kl the command exits with 1 if the mean KL divergence is above NATS, so that it can
    guard a script. Quantising to 4 bits costs a few hundredths of a nat; above 0.1 the loss is
    called large.
    """
    from moe_lens.compress import verify
    from moe_lens.compress.calibration.texts import bundled_note, read_text
    from moe_lens.compress.stages import VERIFYING
    from moe_lens.compress.verification.verification import check_max_kl

    check_max_kl(max_kl)
    corpus = read_text("evaluation", eval_data)
    if eval_data is None and (note := bundled_note(parent, ["evaluation"])) is not None:
        screen.note(note)
    with stages(LOADING) as show:
        corpus = corpus.sample(sample_size, seed)
        for each in corpus.notes:
            screen.note(each)
        found = verify(
            parent,
            child,
            corpus,
            sequence_length=sequence_length,
            chat_template=chat_template,
            seed=seed,
            cpu_experts=cpu_experts.value,
            trust_remote_code=trust_remote_code,
            stream=stream,
            progress=lambda done, total: show(VERIFYING, done, total),
        )
    if as_json:
        show_warnings(found)
    else:
        show_verification(found, first=True)
    found.check(max_kl)
    if as_json:
        screen.emit_json(found.to_dict())
