"""``moe-lens saturation``: when does training settle which experts a token goes to?"""

from __future__ import annotations

import tempfile
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from moe_lens.errors import UsageError
from moe_lens.telling import Stage, begin

from . import screen
from .analysed import DEFAULT_DATA, text_of
from .bundles import Reads, Shown, bundled
from .found import present
from .models import load
from .progress import stages

if TYPE_CHECKING:
    from moe_lens.recording.checkpoints import Checkpoint

COMPARING = Stage("comparing", "tokens")


@bundled
def saturation(
    folders: Annotated[
        list[str],
        typer.Argument(
            metavar="FOLDER...",
            show_default=False,
            help="A folder of checkpoints (models, or runs that moe-lens trace wrote), in the "
            "order of the numbers in their names; or two or more checkpoints, first to last.",
        ),
    ],
    reads: Reads,
    shown: Shown,
    work: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            show_default=False,
            help="Keep the recorded runs here: the same command goes on where an interrupted one "
            "stopped, and does not run a checkpoint twice.",
        ),
    ] = None,
    fraction: Annotated[
        bool,
        typer.Option("--fraction", help="In the picture, the share of the steps instead of steps."),
    ] = False,
) -> None:
    """Show when in training routing settles.

    \b
    moe-lens saturation checkpoints/ --data prompts.jsonl --work runs/
    moe-lens saturation step5000 step120000 final --output saturation.png
    moe-lens saturation runs/ --json

    Shown is the share of each checkpoint's choices that the last one makes, too. Checkpoints are
    models of one architecture and tokenizer; one is in memory at a time.
    """
    from moe_lens.analysis.saturation import saturation as find
    from moe_lens.figures.saturation import draw_saturation
    from moe_lens.recording.checkpoints import find_checkpoints, record_checkpoints

    if fraction and shown.output is None:
        raise UsageError("--fraction is about the picture; name its file with --output")
    found = find_checkpoints(folders)
    if found[0].recorded:
        _refuse(found, reads, work)
    text = DEFAULT_DATA if found[0].recorded else text_of(reads)
    folder = tempfile.TemporaryDirectory(prefix="moe-lens-") if work is None else nullcontext(work)
    with stages() as show, folder as place:
        traces = record_checkpoints(
            found,
            text,
            place,
            load=lambda path: load(
                str(path), reads.trust_remote_code, stream=reads.stream, spinner=False
            ),
            progress=show,
            sample_size=reads.sample_size,
            sequence_length=reads.sequence_length,
            chat_template=reads.chat_template,
            seed=reads.seed,
        )
        for note in traces[-1].notes:
            screen.note(note)
        result = find(
            traces,
            names=[each.name for each in found],
            steps=[each.step for each in found],
            seed=reads.seed,
            progress=begin(show, COMPARING),
        )
    name = Path(folders[0]).resolve().name if len(folders) == 1 else found[-1].name
    present(result, name, shown, partial(draw_saturation, fraction=fraction))


def _refuse(found: list[Checkpoint], reads: Reads, work: Path | None) -> None:
    asked = [*reads.about_text(), *([] if work is None else ["--work"])]
    if asked:
        raise UsageError(
            f"{found[0].name} and the others are recorded runs, whose text is recorded, too: "
            f"leave out {asked[0]}, or give models"
        )
