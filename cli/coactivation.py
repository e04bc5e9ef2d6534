"""``moe-lens coactivation``: which experts are chosen together?"""

from __future__ import annotations

from typing import Annotated

import typer

from . import screen
from .analysed import Reads, analysed
from .found import present
from .graphs import check_graphs, write_graphs
from .options import (
    AnalysedText,
    ChatTemplate,
    GraphFile,
    Json,
    PictureFile,
    PictureTheme,
    SampleSize,
    Seed,
    SequenceLength,
    Source,
    Stream,
    Theme,
    TrustRemoteCode,
)


def coactivation(
    source: Source,
    data: AnalysedText = None,
    output: PictureFile = None,
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
    theme: PictureTheme = Theme.LIGHT,
    sample_size: SampleSize = None,
    sequence_length: SequenceLength = None,
    chat_template: ChatTemplate = False,
    seed: Seed = 0,
    trust_remote_code: TrustRemoteCode = False,
    stream: Stream = None,
    json: Json = False,
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
    from moe_lens.figures.coactivation import save_coactivation

    check_graphs(graph)
    reads = Reads(
        data, sample_size, sequence_length, chat_template, seed, trust_remote_code, stream
    )
    with analysed(source, reads) as read:
        found = find(read.trace, adjacent_ranks=adjacent_ranks, seed=seed, progress=read.progress)
    if layer is not None:
        found.place(layer)
    graphs = write_graphs(
        graph,
        lambda: coactivation_graph(found, layer),
        title=f"{found.title} · {read.name}",
        definition=found.definition,
        theme=theme,
    )
    present(
        found,
        read.name,
        output=output,
        save=lambda *given, **kept: save_coactivation(*given, layer=layer, **kept),
        theme=theme,
        as_json=json,
        more={"graphs": graphs} if graphs else None,
    )
    if not json:
        screen.show(*map(str, graphs))
