"""``moe-lens saturation``: when does training settle which experts a token goes to?"""

from __future__ import annotations

import tempfile
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moe_lens.errors import UsageError
from moe_lens.telling import Stage, begin

from . import screen
from .analysed import DEFAULT_DATA
from .found import present
from .models import load
from .options import (
    AnalysedText,
    ChatTemplate,
    Json,
    PictureFile,
    PictureTheme,
    SampleSize,
    Seed,
    SequenceLength,
    Stream,
    Theme,
    TrustRemoteCode,
)
from .progress import stages

if TYPE_CHECKING:
    from moe_lens.recording.checkpoints import Checkpoint

COMPARING = Stage("comparing", "tokens")


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
    data: AnalysedText = None,
    work: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            show_default=False,
            help="Keep the recorded runs here: the same command goes on where an interrupted one "
            "stopped, and does not run a checkpoint twice.",
        ),
    ] = None,
    output: PictureFile = None,
    fraction: Annotated[
        bool,
        typer.Option("--fraction", help="In the picture, the share of the steps instead of steps."),
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
    """Show when in training routing settles.

    \b
    moe-lens saturation checkpoints/ --data prompts.jsonl --work runs/
    moe-lens saturation step5000 step120000 final --output saturation.png
    moe-lens saturation runs/ --json

    Shown is the share of each checkpoint's choices that the last one makes, too. Checkpoints are
    models of one architecture and tokenizer; one is in memory at a time.
    """
    from moe_lens.analysis.saturation import saturation as find
    from moe_lens.figures.saturation import save_saturation
    from moe_lens.recording.checkpoints import find_checkpoints, record_checkpoints

    if fraction and output is None:
        raise UsageError("--fraction is about the picture; name its file with --output")
    found = find_checkpoints(folders)
    if found[0].recorded:
        _refuse(found, data, work, sample_size, sequence_length, chat_template)
    elif data is None:
        screen.note("no --data given: the text that comes with moe-lens is used (--data demo)")
    folder = tempfile.TemporaryDirectory(prefix="moe-lens-") if work is None else nullcontext(work)
    with stages() as show, folder as place:
        traces = record_checkpoints(
            found,
            data or DEFAULT_DATA,
            place,
            load=lambda path: load(str(path), trust_remote_code, stream=stream, spinner=False),
            progress=show,
            sample_size=sample_size,
            sequence_length=sequence_length,
            chat_template=chat_template,
            seed=seed,
        )
        for note in traces[-1].notes:
            screen.note(note)
        result = find(
            traces,
            names=[each.name for each in found],
            steps=[each.step for each in found],
            seed=seed,
            progress=begin(show, COMPARING),
        )
    name = Path(folders[0]).resolve().name if len(folders) == 1 else found[-1].name
    save = partial(save_saturation, fraction=fraction)
    present(result, name, output=output, save=save, theme=theme, as_json=json)


def _refuse(
    found: list[Checkpoint],
    data: str | None,
    work: Path | None,
    sample_size: int | None,
    sequence_length: int | None,
    chat_template: bool,
) -> None:
    given: dict[str, Any] = {
        "--data": data,
        "--work": work,
        "--sample-size": sample_size,
        "--sequence-length": sequence_length,
        "--chat-template": chat_template or None,
    }
    asked = [option for option, value in given.items() if value is not None]
    if asked:
        raise UsageError(
            f"{found[0].name} and the others are recorded runs, whose text is recorded, too: "
            f"leave out {asked[0]}, or give models"
        )
