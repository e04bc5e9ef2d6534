"""``moe-lens heatmap``: routing as a table in the terminal, or as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from moe_lens.errors import UsageError

from . import screen
from .models import read_prompt
from .options import (
    ChatTemplate,
    Data,
    ExpertsPerToken,
    ForceExperts,
    Json,
    Kernel,
    MaskExperts,
    PictureFile,
    PictureTheme,
    Prompt,
    SampleSize,
    Seed,
    SequenceLength,
    Stream,
    Theme,
    TrustRemoteCode,
)
from .routing import Routing
from .views import Text, View, Wanted, of_model, of_run

if TYPE_CHECKING:
    from moe_lens.analysis.heatmap import Heatmap


def heatmap(
    source: Annotated[
        str,
        typer.Argument(
            metavar="MODEL|RUN",
            show_default=False,
            help="A model with --prompt or --data, or a folder that moe-lens trace wrote.",
        ),
    ],
    prompt: Prompt = None,
    data: Data = None,
    view: Annotated[
        View | None,
        typer.Option(
            show_default=False,
            help="layers: the share of the tokens that each expert of each layer received "
            "(default for a run and for --data). choices: the first choice of each token in every "
            "layer (default for --prompt). tokens: tokens by experts of one --layer.",
        ),
    ] = None,
    layer: Annotated[
        int | None,
        typer.Option(metavar="N", min=0, help="Show tokens by experts of layer N."),
    ] = None,
    number: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=0,
            help="Which prompt of a run or of --data to show by token, from 0.",
        ),
    ] = None,
    tokens: Annotated[
        str | None,
        typer.Option(metavar="FROM:TO", help="Show tokens FROM to TO - 1 of the prompt only."),
    ] = None,
    only_used: Annotated[
        bool, typer.Option("--only-used", help="Leave out experts that no shown token went to.")
    ] = False,
    label: Annotated[
        str | None, typer.Option(metavar="NAME", help="Count only prompts with this label.")
    ] = None,
    output: PictureFile = None,
    theme: PictureTheme = Theme.LIGHT,
    sample_size: SampleSize = None,
    sequence_length: SequenceLength = None,
    chat_template: ChatTemplate = False,
    seed: Seed = 0,
    experts_per_token: ExpertsPerToken = None,
    mask_experts: MaskExperts = None,
    force_experts: ForceExperts = None,
    kernel: Kernel = None,
    trust_remote_code: TrustRemoteCode = False,
    stream: Stream = None,
    json: Json = False,
) -> None:
    """Show which experts tokens go to, as a table or a picture.

    \b
    moe-lens heatmap demo --prompt "def fib(n):"
    moe-lens heatmap demo --prompt "def fib(n):" --layer 2 --output layer2.png
    moe-lens heatmap demo --data demo --label code
    moe-lens heatmap run/
    """
    from moe_lens.trace import is_trace

    routing = Routing.read(experts_per_token, mask_experts, force_experts)
    run = is_trace(source)
    _check(source, run, prompt, data, bool(routing))
    wanted = Wanted.read(
        view, layer, number, tokens, only_used, label, by_prompt=prompt is not None
    )
    if run:
        found, name = of_run(source, wanted)
    else:
        text = None if prompt is None else read_prompt(prompt)
        reads = Text(text, data, sample_size, sequence_length, chat_template, seed)
        found, name = of_model(source, reads, wanted, routing, trust_remote_code, kernel, stream)
    _show(found, name, output, theme, json)


def _check(source: str, run: bool, prompt: str | None, data: str | None, changed: bool) -> None:
    if run and (prompt is not None or data is not None or changed):
        raise UsageError(
            f"{source} is a recorded run: it takes no prompt, no data and no change of routing"
        )
    if not run and prompt is None and data is None:
        raise UsageError(
            f"{source} is no recorded run; to run it as a model, give --prompt TEXT or --data TEXT"
        )
    if prompt is not None and data is not None:
        raise UsageError("give --prompt or --data, not both")


def _show(found: Heatmap, name: str, output: Path | None, theme: Theme, as_json: bool) -> None:
    if output is not None:
        from moe_lens.figures.heatmap import save_heatmap

        output = save_heatmap(found, output, style=theme, subtitle=name)
    if as_json:
        screen.emit_json({"model": name, "output": output, **found.to_dict()})
    elif output is not None:
        screen.show(str(output))
    else:
        from moe_lens.figures.terminal import TerminalHeatmap

        screen.show(TerminalHeatmap(found))
