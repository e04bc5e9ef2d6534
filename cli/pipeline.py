"""``moe-lens pipeline``: which way do tokens take through the experts of successive layers?"""

from __future__ import annotations

import functools
from enum import StrEnum
from typing import Annotated

import typer

from moe_lens.errors import UsageError

from .analysed import analysed
from .bundles import Reads, Shown, bundled
from .found import present
from .graphs import write_graphs
from .options import (
    GraphFile,
    Source,
)


class View(StrEnum):
    """What the picture shows."""

    FLOW = "flow"
    DEPTH = "depth"


@bundled
def pipeline(
    source: Source,
    reads: Reads,
    shown: Shown,
    view: Annotated[
        View,
        typer.Option(help="What the picture shows: flow from layer to layer, or lines over depth."),
    ] = View.FLOW,
    label: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="In the flow, only this label's tokens and its chain."),
    ] = None,
    layers: Annotated[
        str | None,
        typer.Option(metavar="FIRST-LAST", help="In the flow, only these layers, such as 0-11."),
    ] = None,
    width: Annotated[
        int, typer.Option(metavar="N", min=1, help="Experts of a chain in each MoE layer.")
    ] = 1,
    graph: GraphFile = None,
) -> None:
    """Follow tokens through the experts of successive MoE layers.

    \b
    moe-lens pipeline demo
    moe-lens pipeline run/ --output flow.png
    moe-lens pipeline run/ --label math --output math.png --theme dark
    moe-lens pipeline run/ --width 2 --view depth --output depth.svg
    moe-lens pipeline MODEL --data prompts.jsonl --graph steps.html --json

    Shows the chain of experts that each label's tokens take, what a layer's choice tells of the
    next, experts of successive layers that do the same work, and specialisation by depth.
    """
    places = _layers(layers)
    if view is View.DEPTH and (label or layers):
        raise UsageError("--label and --layers choose what the flow shows; leave out --view depth")
    if shown.output is None and (label or layers or view is View.DEPTH):
        raise UsageError("--view, --label and --layers are of the picture; add --output FILE")
    from moe_lens.analysis.pipeline import pipeline as find
    from moe_lens.analysis.pipeline import pipeline_graph
    from moe_lens.figures.pipeline import draw_pipeline
    from moe_lens.figures.pipeline_depth import draw_depth

    with analysed(source, reads) as read:
        found = find(read.trace, width=width, seed=reads.seed, progress=read.progress)
    graphs = write_graphs(
        graph,
        lambda: pipeline_graph(found),
        title=f"{found.title} · {read.name}",
        definition=found.definition,
        theme=shown.theme,
    )
    flow = functools.partial(draw_pipeline, label=label, layers=places)
    present(
        found,
        read.name,
        shown,
        draw_depth if view is View.DEPTH else flow,
        files={"graphs": graphs} if graphs else None,
    )


def _layers(text: str | None) -> range | None:
    """``0-11`` as a range.

    Raises:
        UsageError: It is not two numbers in that order.
    """
    if text is None:
        return None
    first, dash, last = text.partition("-")
    if not (dash and first.strip().isdecimal() and last.strip().isdecimal()) or int(first) >= int(
        last
    ):
        raise UsageError(f"--layers takes FIRST-LAST, such as 0-11, not {text!r}")
    return range(int(first), int(last) + 1)
