"""The commands of ``moe-lens``, in the order in which the help lists them."""

from __future__ import annotations

from typing import Annotated

import typer

from moe_lens import __version__

from .balance import balance
from .coactivation import coactivation
from .compress import compress
from .doctor import doctor
from .domains import domains
from .experts import experts
from .families import families
from .frontier import frontier
from .generate import generate
from .heatmap import heatmap
from .help import Grouped
from .info import info
from .locality import locality
from .pipeline import pipeline
from .plan import plan
from .saturation import saturation
from .similarity import similarity
from .trace import trace
from .verify import verify
from .vocab import vocab

# Plain help, not rich's panels: they take 0.2 s to import (Pygments, Markdown) and wrap badly in
# 80 columns.
app = typer.Typer(
    name="moe-lens",
    add_completion=False,
    rich_markup_mode=None,
    context_settings={
        "help_option_names": ["-h", "--help"],
        "max_content_width": 100,
        # typer imports Pydantic (0.08 s) to coerce a --help that was not given.
        "default_map": {"help": False},
    },
)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"moe-lens {__version__}")
        raise typer.Exit()


@app.callback()
def moe_lens(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_version, is_eager=True, help="Print the version."),
    ] = False,
) -> None:
    """See, explain, change and compress the routing of mixture-of-experts models on MLX.

    MODEL is a folder that mlx_lm.load opens, a model of the Hugging Face hub (owner/name), or
    demo: a small trained model that comes with moe-lens.

    \b
    moe-lens info demo
    moe-lens heatmap demo --prompt "def fib(n):"
    moe-lens experts demo
    moe-lens compress demo --threshold 0.8 --output demo-small
    moe-lens verify demo demo-small

    Exit codes: 0 done, 1 failed, 2 asked for something that cannot be. MOE_LENS_DEBUG=1, or
    --debug anywhere on the line, shows the traceback of an error.
    """


for command in (
    *(info, families, generate, trace, heatmap),
    *(experts, domains, vocab, coactivation, pipeline),
    *(balance, locality, similarity, saturation),
    *(compress, plan, frontier, verify, doctor),
):
    app.command(
        no_args_is_help=command not in (families, doctor),
        cls=Grouped if command is compress else None,
    )(command)
