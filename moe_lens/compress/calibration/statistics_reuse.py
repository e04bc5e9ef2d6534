"""Calibrating once: statistics that a file already holds are read, others are collected and kept.

What decides is whether the file holds what a calibration would give now; if not, it is refused and
left alone, since whoever named it meant to use it.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from moe_lens.compress.resuming.work_folder import (
    CHANNELS,
    STATISTICS,
    UNDER_WAY,
    WorkFolder,
)
from moe_lens.compress.statistics.channel_file import load_channels, save_channels
from moe_lens.compress.statistics.channel_statistics import ChannelCalibration
from moe_lens.compress.statistics.statistics import Calibration, Collected
from moe_lens.compress.statistics.statistics_file import (
    check_reusable,
    load_statistics,
    save_statistics,
)
from moe_lens.compress.tensors.unpacked import packed_modules
from moe_lens.corpus import Corpus
from moe_lens.telling import Progress, Say

from .calibration import SIMILARITY_TOKENS, calibrate, identify
from .channel_calibration import calibrate_channels

if TYPE_CHECKING:
    from moe_lens.router import ExpertRouter


def calibrate_once(
    router: ExpertRouter,
    corpus: Corpus,
    path: Path | None,
    work: WorkFolder | None = None,
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
        path: A statistics file, which need not be there yet; None: that of `work`.
        work: Where the statistics are kept for a run that goes on; None: nowhere.
        say: Told whether the file was used or written.

    The other arguments are those of `calibrate`.

    Raises:
        UsageError: The file is of another model, text or way of reading, or lacks what is asked.
        MoeLensError: The file is damaged or cannot be written; and as `calibrate`.
    """
    if work is not None:
        work.calibrates_with(packed_modules(router.model))
    under_way = None if work is None else work.file(UNDER_WAY.format(STATISTICS))
    if path is None and work is not None:
        path, say = work.file(STATISTICS), None
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
                cpu_experts=router.cpu_experts,
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
        under_way=under_way,
    )
    if path is not None:
        save_statistics(found, path)
        if say is not None:
            say(f"the statistics of {found.tokens:,} tokens are kept in {path}")
    if under_way is not None:
        under_way.unlink(missing_ok=True)
    return found


def calibrate_channels_once(
    router: ExpertRouter,
    corpus: Corpus,
    work: WorkFolder | None,
    *,
    sequence_length: int | None = 512,
    chat_template: bool = False,
    seed: int = 0,
    progress: Progress | None = None,
) -> ChannelCalibration:
    """The channels that an earlier run has left in `work`, or those of `calibrate_channels`.

    Raises:
        DiskError: They cannot be kept.
        MoeLensError: As `calibrate_channels`, or what was kept is damaged.
    """
    if work is not None:
        work.calibrates_with(packed_modules(router.model))
    if work is not None and work.file(CHANNELS).is_file():
        return load_channels(work.file(CHANNELS))
    under_way = None if work is None else work.file(UNDER_WAY.format(CHANNELS))
    found = calibrate_channels(
        router,
        corpus,
        sequence_length=sequence_length,
        chat_template=chat_template,
        seed=seed,
        progress=progress,
        under_way=under_way,
    )
    if work is not None:
        save_channels(found, work.file(CHANNELS))
    if under_way is not None:
        under_way.unlink(missing_ok=True)
    return found
