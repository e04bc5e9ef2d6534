"""``moe-lens coactivation``: which experts are chosen together?"""

from __future__ import annotations

from functools import partial
from typing import Annotated

import typer

from .analysed import analysed
from .bundles import Reads, Shown, bundled
from .found import present
from .graphs import write_graphs
from .options import (
    GraphFile,
    Source,
)


@bundled
def coactivation(
    source: Source,
    reads: Reads,
    shown: Shown,
    graph: GraphFile = None,
    layer: Annotated[
        int | None,
        typer.Option(metavar="N", min=0, help="Draw layer N only, in the picture and the graph."),
    ] = None,
    adjacent_ranks: Annotated[
        bool,
        typer.Option(
            "--adjacent-ranks",
            help="Count the share over pairs of neighbouring ranks only, as OLMoE's script does.",
        ),
    ] = False,
) -> None:
    """Show which experts are chosen together.

    \b
    moe-lens coactivation demo
    moe-lens coactivation run/ --output together.png --graph together.html
    moe-lens coactivation run/ --layer 7 --output layer7.png

    Pairs that are nearly inseparable may be copies of one another. The graph has an edge for each
    pair above chance.
    """
    from moe_lens.analysis.coactivation import coactivation as find
    from moe_lens.analysis.coactivation import coactivation_graph
    from moe_lens.figures.coactivation import draw_coactivation
    from moe_lens.trace import place_of

    with analysed(source, reads) as read:
        if layer is not None:
            place_of(read.trace.layers, layer)
        found = find(
            read.trace, adjacent_ranks=adjacent_ranks, seed=reads.seed, progress=read.progress
        )
    graphs = write_graphs(
        graph,
        lambda: coactivation_graph(found, layer),
        title=f"{found.title} · {read.name}",
        definition=found.definition,
        theme=shown.theme,
    )
    present(
        found,
        read.name,
        shown,
        partial(draw_coactivation, layer=layer),
        files={"graphs": graphs} if graphs else None,
    )
