"""``moe-lens trace``: record the routing of a corpus."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moe_lens.telling import LOADING, Stage

from . import screen
from .models import load
from .options import (
    ChatTemplate,
    ExpertsPerToken,
    ForceExperts,
    Json,
    Kernel,
    MaskExperts,
    Model,
    OutputFolder,
    RequiredData,
    SampleSize,
    Seed,
    SequenceLength,
    Stream,
    TrustRemoteCode,
)
from .progress import stages
from .quantities import ranges, size, some
from .routing import Routing

if TYPE_CHECKING:
    from moe_lens import Trace

RECORDING = Stage("recording", "tokens")


def trace(
    model: Model,
    data: RequiredData,
    output: OutputFolder,
    sample_size: SampleSize = None,
    sequence_length: SequenceLength = None,
    batch_size: Annotated[
        int, typer.Option(metavar="N", min=1, help="Run N prompts at once at most.")
    ] = 8,
    chat_template: ChatTemplate = False,
    router_logits: Annotated[
        bool, typer.Option("--router-logits", help="Also keep the router logits (much larger).")
    ] = False,
    resume: Annotated[
        bool,
        typer.Option(help="Go on where an interrupted recording into the folder stopped."),
    ] = True,
    force: Annotated[
        bool, typer.Option("--force", help="Replace a trace that is already in the folder.")
    ] = False,
    seed: Seed = 0,
    experts_per_token: ExpertsPerToken = None,
    mask_experts: MaskExperts = None,
    force_experts: ForceExperts = None,
    kernel: Kernel = None,
    trust_remote_code: TrustRemoteCode = False,
    stream: Stream = None,
    json: Json = False,
) -> None:
    """Record which experts every token of a corpus is routed to.

    \b
    moe-lens trace demo --data demo --output run/
    moe-lens trace MODEL --data prompts.jsonl --sample-size 200 -o run/

    The same command goes on where an interrupted one stopped. `moe-lens heatmap run/` shows it.
    """
    from moe_lens import read_corpus

    routing = Routing.read(experts_per_token, mask_experts, force_experts)
    corpus = read_corpus(data)
    before: list[int] = []
    with ExitStack() as stack:
        show = stack.enter_context(stages(LOADING))
        router = load(model, trust_remote_code, kernel, stream, spinner=False)
        if not router.streamed:
            show(LOADING, router.info.bytes, router.info.bytes)
        if routing:
            stack.enter_context(router.override(routing.overrides(router)))
        stack.enter_context(_can_go_on(output))

        def progress(done: int, total: int | None) -> None:
            if not before:
                show(RECORDING, done, None)
            before.append(done)
            show(RECORDING, done, total)

        recorded = router.trace(
            corpus,
            output,
            sample_size=sample_size,
            sequence_length=sequence_length,
            batch_size=batch_size,
            router_logits=router_logits,
            chat_template=chat_template,
            resume=resume,
            overwrite=force,
            seed=seed,
            progress=progress,
        )
    if before[0]:
        screen.note(f"{some(before[0], 'token')} had been recorded before")
    _show(recorded, routing, json)


@contextmanager
def _can_go_on(output: Path) -> Iterator[None]:
    """Say after Ctrl-C that nothing whole is lost."""
    try:
        yield
    except KeyboardInterrupt:
        screen.note(f"the same command goes on with what is recorded in {output}")
        raise


def _show(recorded: Trace, routing: Routing, as_json: bool) -> None:
    stored = sum(each.stat().st_size for each in recorded.path.iterdir())
    notes = recorded.header["corpus"]["notes"]
    if as_json:
        screen.emit_json(_summary(recorded, stored) | {"routing": routing.to_dict()})
        return
    for each in notes:
        screen.note(each)
    rows = [
        ("trace", f"{recorded.path}, {size(stored)}"),
        ("text", _text(recorded)),
        ("layers", f"{len(recorded.layers)} ({ranges(recorded.layers)})"),
        ("experts", f"{recorded.slots} of {recorded.router_width} for each token and layer"),
    ]
    if recorded.label_names:
        rows.append(("labels", ", ".join(recorded.label_names)))
    if routing:
        rows.append(("routing", routing.describe()))
    screen.show(screen.facts(rows))
    screen.note(f"see it with: moe-lens heatmap {recorded.path}")


def _text(recorded: Trace) -> str:
    name = recorded.header["corpus"]["name"]
    return f"{some(recorded.num_tokens, 'token')} of {some(recorded.num_prompts, 'prompt')}, {name}"


def _summary(recorded: Trace, stored: int) -> dict[str, Any]:
    return {
        "trace": recorded.path,
        "bytes": stored,
        "tokens": recorded.num_tokens,
        "prompts": recorded.num_prompts,
        "labels": recorded.label_names,
        "layers": recorded.layers,
        "experts_per_token": recorded.slots,
        "router_width": recorded.router_width,
        "corpus": recorded.header["corpus"],
        "settings": recorded.header["settings"],
    }
