"""Calibrating once: statistics that a file already holds are read, others are collected and kept.

What decides is whether the file holds what a calibration would give now; if not, it is refused and
left alone, since whoever named it meant to use it.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from moe_lens.compress.statistics.statistics import Calibration, Collected
from moe_lens.compress.statistics.statistics_file import (
    check_reusable,
    load_statistics,
    save_statistics,
)
from moe_lens.compress.telling import Progress, Say
from moe_lens.corpus import Corpus

from .calibration import SIMILARITY_TOKENS, calibrate, identify

if TYPE_CHECKING:
    from moe_lens.router import ExpertRouter


def calibrate_once(
    router: ExpertRouter,
    corpus: Corpus,
    path: Path | None,
    *,
    similarity: bool,
    mean_outputs: bool = False,
    sequence_length: int | None = 512,
    chat_template: bool = False,
    stop_at: float | None = None,
    seed: int = 0,
    progress: Progress | None = None,
    say: Say | None = None,
) -> Calibration:
    """The statistics in `path`, or those of `calibrate`, which are then kept there.

    Args:
        router: The model.
        corpus: The prompts, all of which are read.
        path: A statistics file, which need not be there yet; None: nothing is kept.
        say: Told whether the file was used or written.

    The other arguments are those of `calibrate`.

    Raises:
        UsageError: The file is of another model, text or way of reading, or lacks what is asked.
        MoeLensError: The file is damaged or cannot be written; and as `calibrate`.
    """
    if path is not None and path.exists():
        found = load_statistics(path)
        check_reusable(
            found,
            path,
            model=identify(router),
            corpus_fingerprint=corpus.fingerprint,
            sequence_length=sequence_length,
            seed=seed,
            asked=Collected(
                similarity=similarity,
                similarity_tokens=SIMILARITY_TOKENS if similarity else 0,
                mean_outputs=mean_outputs,
                chat_template=chat_template,
                stop_at=stop_at,
            ),
        )
        if say is not None:
            say(f"the statistics of {found.tokens:,} tokens in {path} are used again")
        return found
    found = calibrate(
        router,
        corpus,
        sequence_length=sequence_length,
        similarity=similarity,
        mean_outputs=mean_outputs,
        chat_template=chat_template,
        stop_at=stop_at,
        seed=seed,
        progress=progress,
    )
    if path is not None:
        save_statistics(found, path)
        if say is not None:
            say(f"the statistics of {found.tokens:,} tokens are kept in {path}")
    return found
