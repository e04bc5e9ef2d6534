"""``moe-lens vocab``: which tokens experts are chosen for, and which tokens they push."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from moe_lens.errors import UnsupportedModelError, UsageError
from moe_lens.telling import Stage, begin

from . import screen
from .analysed import Analysed, analysed, text_of
from .bundles import Reads, Shown, bundled
from .found import present
from .options import (
    Source,
)
from .routing import read_expert
from .vocab_options import By, Ids, Read, Wanted, all_texts

if TYPE_CHECKING:
    from moe_lens import ExpertRouter
    from moe_lens.analysis.result import Result
    from moe_lens.analysis.vocabulary import (
        DirectionTokens,
        IdCounts,
    )
    from moe_lens.recording import ExpertEffects
    from moe_lens.trace import TokenTexts
    from moe_lens.unembedding import ExpertReading

PREDICTING = Stage("predicting", "tokens")
READING_EFFECTS = Stage("reading effects", "tokens")
PROJECTING = Stage("projecting", "layers")


@bundled
def vocab(
    source: Source,
    reads: Reads,
    shown: Shown,
    by: Annotated[
        By | None,
        typer.Option(
            show_default=False,
            help="routing: what experts are chosen for. contribution: what their output pushes; "
            "needs a model. By default both of a model, routing of a run.",
        ),
    ] = None,
    read_as: Annotated[
        Read,
        typer.Option(
            "--read",
            help="effect: how the logits change, to first order, by what an expert adds. alone: "
            "what it adds, read through norm and head as if it were all there is.",
        ),
    ] = Read.EFFECT,
    ids: Annotated[
        Ids,
        typer.Option(
            help="Count by the token that is read, by the next one of the text, or by the one that "
            "the model predicts (needs a model, and runs the text once more)."
        ),
    ] = Ids.INPUT,
    choices: Annotated[
        int, typer.Option(metavar="N", min=1, help="Count the first N choices of each token.")
    ] = 1,
    fewest: Annotated[
        int, typer.Option(metavar="N", min=1, help="Show tokens that occur at least N times.")
    ] = 10,
    top: Annotated[
        int, typer.Option(metavar="N", min=1, max=1000, help="Keep N tokens of each expert.")
    ] = 10,
    layer: Annotated[
        int | None, typer.Option(metavar="N", min=0, help="Show every expert of layer N.")
    ] = None,
    expert: Annotated[
        str | None, typer.Option(metavar="LAYER:EXPERT", help="Show one expert, such as 3:7.")
    ] = None,
    directions: Annotated[
        int,
        typer.Option(
            metavar="N", min=0, help="With --expert: also N write directions of its weights."
        ),
    ] = 0,
    token: Annotated[
        str | None,
        typer.Option(metavar="TEXT", help="Show the experts of one token: its text, or id:NUMBER."),
    ] = None,
) -> None:
    """Show which tokens experts are chosen for, and push.

    \b
    moe-lens vocab demo
    moe-lens vocab demo --layer 3 --ids predicted
    moe-lens vocab demo --expert 3:0 --directions 2
    moe-lens vocab demo --token " =" --json
    moe-lens vocab run/ --ids next --output vocab.png

    What an expert pushes is the direct change of the logits by what it adds to the residual
    stream, mean over tokens routed to it; for that the model runs some of the text twice more.
    """
    pair = None if expert is None else read_expert(expert)
    one = Wanted(by, read_as, ids, choices, fewest, top, layer, pair, directions, token, reads.seed)
    if shown.output is not None and one.alone:
        raise UsageError("a picture shows all experts: leave out --expert, --token or --output")
    with analysed(source, reads, watch=one.check) as read:
        if read.router is None:
            one.check_run()
        found = _found(read, reads, one)
    from moe_lens.figures.vocabulary import draw_vocabulary

    present(found, read.name, shown, draw_vocabulary)


def _found(read: Analysed, reads: Reads, wanted: Wanted) -> Result:
    from moe_lens.analysis import vocabulary

    router = read.router
    reading = None if router is None else _reading(router, wanted.by)
    texts = read.trace.texts if router is None else all_texts(router)
    token_id = None if wanted.token is None else vocabulary.token_of(wanted.token, texts)
    counts = None if wanted.by is By.CONTRIBUTION else _counts(read, reads, wanted)
    written = None
    if reading is not None and router is not None:
        written = vocabulary.written_vocabulary(
            _effects(router, read, reads, reading),
            reading,
            texts,
            read=wanted.read,
            top=wanted.top,
            asked=() if token_id is None else (token_id,),
            seed=wanted.seed,
            progress=begin(read.show, PROJECTING),
        )
    if token_id is not None:
        return vocabulary.token_card(token_id, texts, counts, written)
    routed = None
    if counts is not None:
        routed = vocabulary.routed_vocabulary(
            counts, fewest=wanted.fewest, top=wanted.top, seed=wanted.seed
        )
    if wanted.expert is None:
        return vocabulary.Vocabulary.of(routed, written, wanted.layer)
    directions = None
    if wanted.directions and router is not None and reading is not None:
        directions = _directions(router, reading, wanted, texts)
    return vocabulary.expert_card(*wanted.expert, routed, written, directions)


def _reading(router: ExpertRouter, by: By | None) -> ExpertReading | None:
    """The way to the logits, unless only routing is wanted, or all that can be told."""
    from moe_lens.unembedding import ExpertReading

    if by is By.ROUTING:
        return None
    try:
        return ExpertReading.of(router)
    except UnsupportedModelError as error:
        if by is not None:
            raise
        screen.note(f"only routing is shown: {error}")
        return None


def _effects(
    router: ExpertRouter, read: Analysed, reads: Reads, reading: ExpertReading
) -> ExpertEffects:
    from moe_lens.recording import record_effects

    return record_effects(
        router,
        text_of(reads),
        reading.unembedding,
        sample_size=reads.sample_size,
        sequence_length=reads.sequence_length,
        chat_template=reads.chat_template,
        seed=reads.seed,
        progress=begin(read.show, READING_EFFECTS),
    )


def _counts(read: Analysed, reads: Reads, wanted: Wanted) -> IdCounts:
    from moe_lens.analysis.vocabulary import count_ids
    from moe_lens.recording import record_predictions

    predicted = None
    if wanted.ids is Ids.PREDICTED and read.router is not None:
        predicted = record_predictions(
            read.router,
            text_of(reads),
            sample_size=reads.sample_size,
            sequence_length=reads.sequence_length,
            chat_template=reads.chat_template,
            seed=reads.seed,
            progress=begin(read.show, PREDICTING),
        )
    return count_ids(
        read.trace,
        kind=wanted.ids,
        slots=wanted.choices,
        predicted=predicted,
        progress=read.progress,
    )


def _directions(
    router: ExpertRouter, reading: ExpertReading, wanted: Wanted, texts: TokenTexts
) -> DirectionTokens:
    from moe_lens.analysis.vocabulary import DirectionTokens
    from moe_lens.experts.directions import write_directions

    assert wanted.expert is not None
    index, expert = wanted.expert
    place = router.info.moe_layers.index(index)
    found = write_directions(router.layers[place], expert, wanted.directions)
    return DirectionTokens.of(found, place, reading, texts, wanted.top)
