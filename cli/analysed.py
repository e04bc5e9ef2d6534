"""What an analysis command reads: a recorded run, or a model that runs the text now."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from moe_lens.errors import UsageError
from moe_lens.telling import LOADING, Progress, Stage, StageProgress, begin

from . import screen
from .bundles import Reads
from .models import load
from .progress import stages

if TYPE_CHECKING:
    from moe_lens import ExpertRouter, Trace
    from moe_lens.instrument import Sink

RECORDING = Stage("recording", "tokens")
READING = Stage("reading", "tokens")
DEFAULT_DATA = "demo"


@dataclass(frozen=True)
class Analysed:
    """A trace, and how far the analysis of it is.

    Attributes:
        trace: What is analysed.
        name: The model, as titles say it.
        progress: To hand to the analysis.
        router: The model, if one was loaded.
        show: To hand to further stages of the command.
    """

    trace: Trace
    name: str
    progress: Progress | None
    router: ExpertRouter | None
    show: StageProgress | None = None


@contextmanager
def analysed(
    source: str,
    reads: Reads,
    *,
    router_logits: bool = False,
    watch: Callable[[ExpertRouter], list[Sink]] | None = None,
) -> Iterator[Analysed]:
    """Open the run `source`, or record the model `source` on the text into a temporary folder.

    Args:
        source: A folder that ``moe-lens trace`` wrote, or a model.
        reads: The text; ``demo`` if none is named. A run takes none.
        router_logits: Also record router logits, where a model runs and can give them.
        watch: Gives sinks that see the same forwards, where a model runs.

    Raises:
        UsageError: A run with options that only a model takes, or data that cannot be read.
    """
    from moe_lens import Trace, read_corpus
    from moe_lens.trace import is_trace

    if is_trace(source):
        _refuse_text(source, reads)
        trace = Trace.open(source)
        with stages() as show:
            yield Analysed(trace, str(trace.model["name"]), begin(show, READING), None, show)
        return
    corpus = read_corpus(text_of(reads))
    with stages(LOADING) as show, tempfile.TemporaryDirectory(prefix="moe-lens-") as folder:
        router = load(source, reads.trust_remote_code, stream=reads.stream, spinner=False)
        if router_logits and (reason := router.info.missing.get("router_logits")):
            screen.note(f"router logits are left out: {reason}")
            router_logits = False
        with router.recording(*([] if watch is None else watch(router))):
            trace = router.trace(
                corpus,
                Path(folder) / "run",
                sample_size=reads.sample_size,
                sequence_length=reads.sequence_length,
                chat_template=reads.chat_template,
                router_logits=router_logits,
                seed=reads.seed,
                progress=begin(show, RECORDING),
            )
        for each in trace.notes:
            screen.note(each)
        yield Analysed(trace, router.name, begin(show, READING), router, show)


def text_of(reads: Reads) -> str:
    """The data named, or the text that comes with moe-lens; the latter is said."""
    if reads.data is None:
        screen.note("no --data given: the text that comes with moe-lens is used (--data demo)")
    return reads.data or DEFAULT_DATA


def _refuse_text(source: str, reads: Reads) -> None:
    if asked := reads.about_text():
        raise UsageError(
            f"{source} is a recorded run, whose text is recorded, too: leave out {asked[0]}, or "
            "give a model"
        )
