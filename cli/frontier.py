"""``moe-lens frontier``: loss against size for every method."""

from __future__ import annotations

from typing import Annotated

import typer

from . import screen
from .options import (
    TEXT_FORMS,
    ChatTemplate,
    CpuExperts,
    CpuExpertsMode,
    Json,
    Model,
    PictureFile,
    PromptLength,
    Seed,
    Stream,
    TrustRemoteCode,
)
from .progress import stages


def frontier(
    model: Model,
    ratio: Annotated[
        list[float] | None,
        typer.Option(
            metavar="R",
            help="A size: this share of the experts' bytes less. Repeatable; 0.125, 0.25, 0.5 and "
            "0.75 by default.",
        ),
    ] = None,
    method: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="Only this method. Repeatable; all by default."),
    ] = None,
    output: PictureFile = None,
    data: Annotated[
        str | None,
        typer.Option(
            "--data",
            metavar="TEXT",
            help=f"Prompts to calibrate on, a third of which compares: {TEXT_FORMS}. The bundled "
            "text by default.",
        ),
    ] = None,
    sample_size: Annotated[
        int, typer.Option(metavar="N", min=1, help="Use N prompts at most.")
    ] = 128,
    sequence_length: PromptLength = 512,
    chat_template: ChatTemplate = False,
    experts_per_token: Annotated[
        int | None,
        typer.Option(metavar="K", min=1, help="Experts per token of the smaller models."),
    ] = None,
    seed: Seed = 0,
    cpu_experts: CpuExperts = CpuExpertsMode.AUTO,
    trust_remote_code: TrustRemoteCode = False,
    stream: Stream = None,
    as_json: Json = False,
) -> None:
    """Show what every method loses at several sizes.

    \b
    moe-lens frontier demo
    moe-lens frontier demo --ratio 0.25 --ratio 0.5 --output frontier.png

    Each method's plan is made from two thirds of the calibration text and tried on the rest.
    """
    from moe_lens.compress.choice.frontier import RATIOS
    from moe_lens.compress.choice.frontier import frontier as measure

    with stages() as progress:
        found = measure(
            model,
            ratios=ratio or RATIOS,
            methods=method,
            calibration=data,
            sample_size=sample_size,
            sequence_length=sequence_length,
            chat_template=chat_template,
            experts_per_token=experts_per_token,
            seed=seed,
            cpu_experts=cpu_experts.value,
            trust_remote_code=trust_remote_code,
            stream=stream,
            progress=progress,
            say=screen.note,
        )
    if output is not None:
        from moe_lens.figures.frontier import save_frontier

        save_frontier(found, output)
    if as_json:
        screen.emit_json({**found.to_dict(), "output": None if output is None else str(output)})
        return
    names, rows = found.rows()
    text = found.validation
    screen.heading(
        f"Loss against size on {text.tokens:,} tokens of {text.name}, parent "
        f"{found.parent_bytes / 1e6:.2f} MB",
        first=True,
    )
    screen.show(screen.table(names, rows, right=(names[0], *names[2:])))
    for size, reason in found.left_out:
        screen.note(f"{size / 1e6:.2f} MB: {reason}")
    for choice in found.choices:
        for each in choice.skipped:
            screen.note(f"{choice.limit / 1e6:.2f} MB, {each.name}: {each.reason}")
    if output is not None:
        screen.show(f"Written to {output}")
