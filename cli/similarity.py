"""``moe-lens similarity``: how alike are the experts of a layer?"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from moe_lens.errors import UsageError
from moe_lens.telling import LOADING

from . import screen
from .analysed import analysed
from .bundles import Reads, Shown, bundled
from .found import present
from .models import load
from .options import (
    Source,
)
from .progress import stages

if TYPE_CHECKING:
    from moe_lens import ExpertRouter
    from moe_lens.experts.mean_outputs import MeanOutputs
    from moe_lens.instrument import Sink


@bundled
def similarity(
    source: Source,
    reads: Reads,
    shown: Shown,
    kinds: Annotated[
        str | None,
        typer.Option(
            metavar="KINDS",
            show_default=False,
            help="What to compare: weights, outputs, routing, or some of them with commas. By "
            "default everything of a model, and routing of a run.",
        ),
    ] = None,
    align: Annotated[
        str | None,
        typer.Option(
            metavar="PAIRS",
            show_default=False,
            help="Pairs of each layer whose channels are put in one order before their weights "
            "are compared: a number, all, or 0. By default the 64 nearest, all in a layer of up "
            "to 16 experts, and none of experts with more than 4096 channels.",
        ),
    ] = None,
    spectra: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=1,
            show_default=False,
            help="Experts of each layer whose singular values are computed. By default as many as "
            "take seconds.",
        ),
    ] = None,
    measure: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            show_default=False,
            help="What the picture shows: the name of a column, such as CKA.",
        ),
    ] = None,
    layer: Annotated[
        list[int] | None,
        typer.Option(
            metavar="N", min=0, show_default=False, help="A layer the picture shows. Repeatable."
        ),
    ] = None,
    matrices: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            show_default=False,
            help="Write the values of all pairs to a .safetensors file; JSON holds them only "
            "where they are up to a million.",
        ),
    ] = None,
) -> None:
    """Show how alike the experts of each layer are.

    \b
    moe-lens similarity demo
    moe-lens similarity MODEL --kinds weights --output weights.png
    moe-lens similarity MODEL --data prompts.jsonl --measure CKA --output cka.png
    moe-lens similarity run/

    Also says whether experts look like copies of one network (upcycled) or trained apart.
    """
    from moe_lens.analysis.similarity.compared import Material, compare
    from moe_lens.experts.layer_sample import sample_layers
    from moe_lens.figures.similarity import draw_similarity
    from moe_lens.trace import is_trace

    run = is_trace(source)
    chosen = _kinds(kinds, source, run)
    find = partial(compare, kinds=chosen, align=_pairs(align), spectra=spectra, seed=reads.seed)
    if "weights" not in chosen and (align is not None or spectra is not None):
        option = "--align" if align is not None else "--spectra"
        raise UsageError(f"{option} is about weights, which are not compared here; leave it out")
    if shown.output is None and (measure is not None or layer):
        option = "--layer" if measure is None else "--measure"
        raise UsageError(f"{option} is about the picture; name its file with --output")
    if chosen == ["weights"]:
        _refuse_text(reads)
        with stages(LOADING) as show:
            router = load(source, reads.trust_remote_code, stream=reads.stream, spinner=False)
            found, name = find(Material(router.layers), progress=show), router.name
    else:
        watched = _Watched("outputs" in chosen)
        with analysed(source, reads, watch=watched.sinks) as read:
            if read.router is None:
                material = Material(trace=read.trace)
            else:
                tokens = [routes.token_ids.tolist() for routes in read.trace.prompts()]
                sample = partial(sample_layers, read.router, tokens, reads.seed)
                material = Material(read.router.layers, read.trace, sample, watched.means)
            found, name = find(material, progress=read.show), read.name
    for note in watched.notes if chosen != ["weights"] else []:
        screen.note(note)
    draw = partial(draw_similarity, measure=measure, layers=layer)
    files = {} if matrices is None else {"matrices": found.save(matrices)}
    present(found, name, shown, draw, files=files)


def _refuse_text(reads: Reads) -> None:
    if asked := reads.about_text():
        raise UsageError(f"weights take no text: leave out {asked[0]}, or ask for more --kinds")


class _Watched:
    """Mean outputs, collected while the model runs, where it shows outputs."""

    def __init__(self, wanted: bool) -> None:
        self.means: MeanOutputs | None = None
        self.notes: list[str] = []
        self._wanted = wanted

    def sinks(self, router: ExpertRouter) -> list[Sink]:
        from moe_lens.experts.layer_sample import sample_reason
        from moe_lens.experts.mean_outputs import VALUES, MeanOutputs

        if not self._wanted:
            return []
        reason = sample_reason(router.layers, VALUES)
        if reason is not None:
            self.notes.append(f"mean outputs are not compared: {reason}")
            return []
        self.means = MeanOutputs(router.layers)
        return [self.means]


def _kinds(asked: str | None, source: str, run: bool) -> list[str]:
    """What to compare, in the order of `KINDS`.

    Raises:
        UsageError: It cannot be compared, or there is no such kind.
    """
    from moe_lens.analysis.similarity.compared import KINDS

    if asked is None:
        return ["routing"] if run else list(KINDS)
    names = [name.strip() for name in asked.split(",")]
    for name in names:
        if name not in KINDS:
            raise UsageError(f"there is no kind {name!r}; choose from {', '.join(KINDS)}")
        if run and name != "routing":
            raise UsageError(
                f"{source} is a recorded run, which holds no {name}: give the model, or "
                "--kinds routing"
            )
    return [name for name in KINDS if name in names]


def _pairs(asked: str | None) -> int | None:
    """How many pairs to align; None: what is quick."""
    if asked is None:
        return None
    if asked == "all":
        return 1 << 62
    if not asked.isdecimal():
        raise UsageError(f"--align takes a number of pairs, all, or 0, not {asked!r}")
    return int(asked)
