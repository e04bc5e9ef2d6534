"""A run in its work folder, from the lock on it to the name of the model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from moe_lens.errors import (
    CaptureError,
    DiskError,
    MoeLensError,
    UnsupportedModelError,
    UsageError,
)
from moe_lens.telling import Say

from . import folder_lock
from .folder_lock import FolderInUseError, FolderLock
from .request import Request
from .work_folder import CHANNELS, PLAN, STATISTICS, CannotGoOnError, WorkFolder, place_of

_REFUSALS = (UsageError, UnsupportedModelError, CaptureError)
"""Errors that come again however often one goes on."""


@contextmanager
def working_at(
    output: Path,
    request: Request,
    *,
    resume: bool = False,
    force: bool = False,
    refusals: tuple[type[MoeLensError], ...] = (),
    say: Say | None = None,
) -> Iterator[WorkFolder]:
    """Hold the work folder of `output`; its model takes that name when the block succeeds.

    Where the block ends by an error that would come again (a refusal), nothing is left. Where it
    is stopped by anything else, the work folder stays, and `say` tells of it.

    Args:
        output: Where the model shall be.
        request: What was asked for.
        resume: Go on with what an earlier run has done. Otherwise that is removed.
        force: Replace a model that is at `output`, once the new one is complete.
        refusals: Further errors that going on cannot help.
        say: Told what was found, and what is kept.

    Raises:
        UsageError: The earlier run was asked for something else, `output` exists, or a folder
            that is none of ours has the name of the work folder.
        MoeLensError: Another run is making `output`, or the ledger is damaged.
        DiskError: The disk refuses (full, read-only, no permission).
    """
    made = [parent for parent in output.parents if not parent.exists()]
    try:
        work = _opened(output, request)
        try:
            work.begin(resume=resume, force=force, say=say)
            try:
                yield work
                work.finish()
            except BaseException as error:
                _stop(work, error, refusals, say)
                raise
        finally:
            work.close()
    except OSError as error:
        raise DiskError(
            f"{output} could not be written ({error.strerror or error}); "
            + (_kept(output) if place_of(output).exists() else "nothing is left there")
            + "; make room or give another --output"
        ) from error
    finally:
        if not output.exists() and not place_of(output).exists():
            for parent in made:
                with suppress(OSError):
                    parent.rmdir()


def _stop(
    work: WorkFolder,
    error: BaseException,
    refusals: tuple[type[MoeLensError], ...],
    say: Say | None,
) -> None:
    """Remove what is of no use after an error, and tell what is kept."""
    if isinstance(error, (*_REFUSALS, *refusals)):
        use = False
    elif isinstance(error, MoeLensError) and not isinstance(error, DiskError | CannotGoOnError):
        use = work.holds(STATISTICS, CHANNELS, PLAN)
    else:
        use = work.holds()
    if not use:
        work.clear()
    elif say is not None and not isinstance(error, OSError):
        say(_kept(work.output))


def _opened(output: Path, request: Request) -> WorkFolder:
    place = place_of(output)
    output.parent.mkdir(parents=True, exist_ok=True)
    foreign = place.exists() or place.is_symlink()
    if foreign and place.is_dir() and not place.is_symlink():
        foreign = any(place.iterdir()) and not (place / folder_lock.FILE).is_file()
    if foreign:
        raise UsageError(
            f"{place} is needed to work in, and is no work folder of moe-lens; move it away or "
            "give another --output"
        )
    try:
        lock = FolderLock(place)
    except FolderInUseError as error:
        which = "another process" if error.process is None else f"process {error.process}"
        raise MoeLensError(
            f"{which} is making {output} right now; wait until it is done, or give another --output"
        ) from error
    return WorkFolder(output, request, lock)


def _kept(output: Path) -> str:
    return (
        f"what was done for {output} is kept beside it: --resume goes on from there, and a run "
        "without it removes it"
    )
