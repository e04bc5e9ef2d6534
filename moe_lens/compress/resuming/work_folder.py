"""The work folder of a run, beside its output: a model appears whole or not at all.

``.NAME.work`` holds the ledger, what was measured, the plan and the model as far as it is
written. The model takes its name by one rename when everything is done. What stops a run leaves
the work folder, from which another run can go on; a refusal that would come again leaves nothing.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from moe_lens.atomic import sync_folder, write_bytes
from moe_lens.errors import MoeLensError, UsageError
from moe_lens.fingerprint import file_sha256
from moe_lens.telling import Say

from . import folder_lock
from .folder_lock import FolderLock
from .ledger import FILE, Ledger, WholeFile, read_ledger
from .output_place import exists
from .request import Request
from .whole_shards import WholeShards

STATISTICS = "statistics.safetensors"
CHANNELS = "channels.safetensors"
UNDER_WAY = "under-way-{}"
"""What is kept of a calibration until it is complete."""
TRIAL = "trial-{}.safetensors"
PLAN = "plan.json"
_MODEL = "model"
_REPLACED = "replaced"
"""The model that is replaced, between both renames."""


class CannotGoOnError(MoeLensError):
    """Something around the run must be put right first; what it has done is kept."""


class WorkFolder:
    """What a run has at hand, and what an earlier one left to it. Made by `working_at`.

    Attributes:
        output: Where the model shall be.
        model: Where it is written until it is complete.
        finished: Whether it is at `output` already, made by a run that was asked for the same.
    """

    def __init__(self, output: Path, request: Request, lock: FolderLock) -> None:
        self.output, self._lock = output, lock
        self._path = place_of(output)
        self.model = self._path / _MODEL
        self.finished = False
        self._force = False
        self._ledger = Ledger(request)

    def file(self, name: str) -> Path:
        """The path of something that is measured once and kept; it is there whole or not at all."""
        return self._path / name

    @property
    def request(self) -> Request:
        """What was asked for."""
        return self._ledger.request

    @property
    def notes(self) -> tuple[str, ...]:
        """What was said until the plan was made."""
        return self._ledger.notes

    def keep_plan(self, text: str, notes: Iterable[str]) -> None:
        """Keep the plan as JSON, and what was said until now.

        Raises:
            DiskError: The disk refuses.
        """
        write_bytes(self.file(PLAN), text)
        self._save(replace(self._ledger, notes=tuple(notes), plan=file_sha256(self.file(PLAN))))

    @property
    def plan(self) -> Path | None:
        """The plan, if an earlier run has made one and it is as that run left it."""
        path = self.file(PLAN)
        known = self._ledger.plan is not None and path.is_file()
        return path if known and file_sha256(path) == self._ledger.plan else None

    def calibrates_with(self, packed: int) -> None:
        """Note how many modules of the model compute from packed weights.

        Raises:
            CannotGoOnError: It were others in the run that was stopped, whose numbers were rounded
                in another way.
        """
        known = self._ledger.packed
        if known is not None and known != packed:
            raise CannotGoOnError(
                f"the run for {self.output} that was stopped had {known} modules of packed "
                f"weights, and this one has {packed}, since another share of the memory is free; "
                "free as much as then, or leave --resume out to begin anew"
            )
        if known is None:
            self._save(replace(self._ledger, packed=packed))

    @property
    def shards(self) -> WholeShards:
        """The weight files that are whole."""
        return WholeShards(self.model, self._ledger.shards, self._keep_shards)

    def _keep_shards(self, shards: Mapping[str, WholeFile]) -> None:
        self._save(replace(self._ledger, shards=dict(shards)))

    def _save(self, ledger: Ledger) -> None:
        ledger.write(self._path / FILE)
        self._ledger = ledger

    def begin(self, *, resume: bool, force: bool, say: Say | None) -> None:
        """Take over what an earlier run left, or clear it away.

        Raises:
            UsageError, MoeLensError: As `working_at`; what an earlier run left stays.
        """
        say, self._force = say or _nobody, force
        self._put_back(say)
        self.finished = resume and made_by(self.output, self.request)
        if self.finished:
            return
        if self.output.exists() and not force:
            raise exists(self.output)
        ledger = self._path / FILE
        if resume and ledger.is_file():
            found = read_ledger(ledger)
            other = found.request.difference(self.request)
            if other:
                raise UsageError(
                    f"the run for {self.output} that was stopped was asked for something else "
                    f"({other}); give the same, or leave --resume out to begin anew"
                )
            self._ledger = found
            say(f"goes on with what an earlier run has done ({self._done()})")
        else:
            if resume:
                say(f"no run for {self.output} was stopped, so this one begins at the beginning")
            elif ledger.is_file():
                say(
                    f"what an earlier run for {self.output} had done is removed ({self._done()}); "
                    "--resume would have gone on with it"
                )
            self.clear()
        self.model.mkdir(exist_ok=True)
        self._drop_unfinished()
        self._save(self._ledger)

    def finish(self) -> None:
        """Give the model its name, at once; afterwards nothing is kept."""
        if not self.finished:
            sync_folder(self.model, deep=True)
            self._take_name()
        self.clear()

    def holds(self, *names: str) -> bool:
        """Whether one of these files, or any at all, or a whole weight file is kept."""
        if names:
            kept = any(self.file(name).is_file() for name in names)
        else:
            known = (folder_lock.FILE, FILE, _MODEL, _REPLACED)
            kept = any(path.name not in known for path in self._path.iterdir())
        return kept or bool(self.shards.bytes)

    def clear(self) -> None:
        """Remove everything but the lock."""
        for path in self._path.iterdir():
            if path.name != folder_lock.FILE:
                _remove(path)

    def close(self) -> None:
        """Let go of the folder, which goes if it is empty."""
        with suppress(OSError):
            if [path.name for path in self._path.iterdir()] == [folder_lock.FILE]:
                self._lock.path.unlink()
                self._path.rmdir()
        self._lock.release()

    def _done(self) -> str:
        shards = len(list(self.model.glob("*.safetensors")))
        parts = [
            name for name in (STATISTICS, CHANNELS) if self.file(UNDER_WAY.format(name)).is_file()
        ]
        trials = len(list(self._path.glob(TRIAL.format("*"))))
        done = [
            text
            for there, text in (
                (self.file(STATISTICS).is_file(), "calibrated"),
                (self.file(CHANNELS).is_file(), "channels calibrated"),
                (parts, "calibrated on a part of the text"),
                (trials, f"plans tried: {trials}"),
                (self.file(PLAN).is_file(), "planned"),
                (shards, f"weight files: {shards}"),
            )
            if there
        ]
        return ", ".join(done) or "begun"

    def _drop_unfinished(self) -> None:
        """Remove all of the model but whole weight files; the rest takes no time to write."""
        whole = self.shards
        for path in self.model.iterdir():
            if path.name not in whole:
                _remove(path)

    def _put_back(self, say: Say) -> None:
        """Give the model that a killed run was replacing its name again."""
        old = self._path / _REPLACED
        if old.is_dir() and not self.output.exists():
            old.rename(self.output)
            say(f"a run was killed while it replaced {self.output}; the old model is back there")

    def _take_name(self) -> None:
        old = self._path / _REPLACED
        if self.output.exists() and not self._force:
            raise CannotGoOnError(
                f"{self.output} has appeared meanwhile, so the new model could not take that name; "
                "move it away and run again with --resume"
            )
        if self.output.exists():
            self.output.rename(old)
        try:
            self.model.rename(self.output)
        except BaseException:
            if old.exists():
                old.rename(self.output)
            raise
        sync_folder(self.output.parent)


def place_of(output: Path) -> Path:
    """The work folder of an output folder."""
    return output.with_name(f".{output.name}.work")


def made_by(output: Path, request: Request) -> bool:
    """Whether the model at `output` was made by a run that was asked for the same."""
    try:
        report = json.loads((output / "report.json").read_text(encoding="utf-8"))
        return bool(report["request"] == request.sha256)
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return False


def _nobody(note: str) -> None:
    """Where notes go that nobody reads."""


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()
