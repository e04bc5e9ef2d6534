"""Comparisons of plans that a run has measured, kept for one that goes on with it.

A comparison belongs to its plans, the text and the way it is computed, and is found by a hash of
them; the model is that of the work folder.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import Any

from moe_lens.compress.plan.plan import Plan
from moe_lens.compress.resuming.work_folder import TRIAL, WorkFolder
from moe_lens.compress.statistics.array_file import Kind, read_arrays, write_arrays
from moe_lens.compress.verification.losses import Comparison
from moe_lens.errors import MoeLensError
from moe_lens.fingerprint import canonical_sha256
from moe_lens.telling import Progress

KIND = Kind("moe-lens trial", 1, "the trial", "delete it to try the plan anew")

_COLUMNS = tuple(field.name for field in fields(Comparison))


class KeptTrials:
    """What the plans lose on one text.

    Args:
        work: Where it is kept; None: nowhere.
        tokens: The text.
        how: Plain values that say how it is computed.
    """

    def __init__(
        self, work: WorkFolder | None, tokens: Sequence[Sequence[int]], how: Sequence[Any]
    ) -> None:
        self._work = work
        self._text = "" if work is None else canonical_sha256([list(map(list, tokens)), *how])
        self._tokens = sum(map(len, tokens))

    def once(
        self,
        plans: Sequence[Plan],
        built: bool,
        measure: Callable[[], list[Comparison]],
        progress: Progress | None,
    ) -> list[Comparison]:
        """What an earlier run has measured, or what `measure` gives.

        Raises:
            DiskError: It cannot be kept.
            MoeLensError: What was kept is damaged.
        """
        if self._work is None:
            return measure()
        key = canonical_sha256([[plan.to_dict() for plan in plans], built, self._text])
        path = self._work.file(TRIAL.format(key))
        if not path.is_file():
            found = measure()
            arrays = {
                f"{place}.{name}": getattr(each, name)
                for place, each in enumerate(found)
                for name in _COLUMNS
            }
            write_arrays(path, KIND, {"plans": len(found)}, arrays)
            return found
        _, arrays = read_arrays(path, KIND)
        if progress is not None:
            progress(self._tokens, None)
            progress(self._tokens, self._tokens)
        try:
            return [
                Comparison(**{name: arrays[f"{place}.{name}"] for name in _COLUMNS})
                for place in range(len(plans))
            ]
        except LookupError as error:
            raise MoeLensError(f"{path} is incomplete ({error}); {KIND.remedy}") from error
