"""The checkpoints of one training run: which they are, in which order, and their routing.

    found = find_checkpoints(["olmoe-checkpoints/"])         # step5000/, step10000/, ...
    traces = record_checkpoints(found, "prompts.jsonl", "work/", load=ExpertRouter.from_pretrained)

A checkpoint is a model folder, or a run that was recorded before. Each model is recorded into a
folder of its own and released before the next is loaded.
"""

from __future__ import annotations

import gc
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlx.core as mx

from moe_lens.corpus import Corpus, read_corpus
from moe_lens.errors import MoeLensError, UsageError
from moe_lens.fingerprint import tokenizer_sha256, weights_sha256
from moe_lens.telling import Stage, StageProgress, begin
from moe_lens.trace import Trace, is_trace

from .record import record_trace

if TYPE_CHECKING:
    from moe_lens.routed_model import RoutedModel

__all__ = ["Checkpoint", "find_checkpoints", "record_checkpoints"]

IN_ORDER = "name the folders themselves, first to last"
"""What to do where the order is not clear."""

_NUMBER = re.compile(r"\d+(?:\.\d+)?")


@dataclass(frozen=True)
class Checkpoint:
    """One of them.

    Attributes:
        name: Name of its folder.
        path: The folder.
        step: The number in its name, or its place in the list.
        recorded: Whether it is a recorded run and no model.
    """

    name: str
    path: Path
    step: float
    recorded: bool


def find_checkpoints(folders: Sequence[str | os.PathLike[str]]) -> list[Checkpoint]:
    """The checkpoints in one folder, by the number in their names; or those named, in order.

    Args:
        folders: One folder that holds checkpoints, or two or more checkpoints, first to last.

    Raises:
        UsageError: There are fewer than two, they are models and runs mixed, or their names do
            not say one order.
    """
    paths = [Path(each).expanduser() for each in folders]
    if len(paths) == 1:
        return _inside(paths[0])
    for path in paths:
        if not _is_checkpoint(path):
            raise UsageError(f"{path} is no model folder and no recorded run")
    steps = _steps([path.name for path in paths])
    rising = steps is not None and all(a < b for a, b in pairwise(steps))
    if steps is None or not rising:
        steps = [float(place + 1) for place in range(len(paths))]
    return _checked([_checkpoint(path, step) for path, step in zip(paths, steps, strict=True)])


def _inside(folder: Path) -> list[Checkpoint]:
    if not folder.is_dir():
        raise UsageError(f"there is no folder {folder}")
    if _is_checkpoint(folder):
        raise UsageError(
            f"{folder} is one checkpoint; give a folder that holds several, or {IN_ORDER}"
        )
    paths = sorted(path for path in folder.iterdir() if path.is_dir() and _is_checkpoint(path))
    if len(paths) < 2:
        raise UsageError(
            f"{folder} holds {len(paths)} checkpoint{'' if len(paths) == 1 else 's'} (folders "
            "with a config.json or a trace.json); two or more are needed"
        )
    names = [path.name for path in paths]
    steps = _steps(names)
    if steps is None:
        raise UsageError(
            f"the names in {folder} ({', '.join(names[:4])}{', ...' * (len(names) > 4)}) do not "
            f"differ by one number, so their order is not clear; {IN_ORDER}"
        )
    found = [_checkpoint(path, step) for path, step in zip(paths, steps, strict=True)]
    return _checked(sorted(found, key=lambda each: each.step))


def _steps(names: Sequence[str]) -> list[float] | None:
    """The number by which the names differ; None where there is none, or two that disagree.

    Names must be the same but for numbers. Where several numbers differ, such as steps and tokens,
    all must give one order, and the first is the step.
    """
    if len({_NUMBER.sub("#", name) for name in names}) > 1:
        return None
    columns = list(
        zip(*([float(each) for each in _NUMBER.findall(name)] for name in names), strict=True)
    )
    differing = [column for column in columns if len(set(column)) > 1]
    if not differing or any(len(set(column)) < len(names) for column in differing):
        return None
    orders = {tuple(sorted(range(len(names)), key=column.__getitem__)) for column in differing}
    return list(differing[0]) if len(orders) == 1 else None


def _is_checkpoint(path: Path) -> bool:
    return is_trace(path) or (path / "config.json").is_file()


def _checkpoint(path: Path, step: float) -> Checkpoint:
    return Checkpoint(path.name, path, step, is_trace(path))


def _checked(found: list[Checkpoint]) -> list[Checkpoint]:
    runs = [each.name for each in found if each.recorded]
    if runs and len(runs) < len(found):
        models = [each.name for each in found if not each.recorded]
        raise UsageError(
            f"{runs[0]} is a recorded run and {models[0]} a model; give models or runs, not both"
        )
    if len({each.path.resolve() for each in found}) < len(found):
        raise UsageError("a checkpoint is named twice")
    return found


def record_checkpoints(
    checkpoints: Sequence[Checkpoint],
    corpus: Corpus | str | os.PathLike[str],
    work: str | os.PathLike[str],
    *,
    load: Callable[[Path], RoutedModel],
    sample_size: int | None = None,
    progress: StageProgress | None = None,
    **settings: Any,
) -> list[Trace]:
    """The routing of the same text through every checkpoint, one model in memory at a time.

    A run that is whole in `work` is opened again without loading its model, if the weights, the
    tokenizer, the text and the settings are those of then.

    Args:
        checkpoints: Models, or runs, which are only opened.
        corpus: The text.
        work: A folder for the runs, each under the name of its checkpoint.
        load: Loads a model.
        sample_size: Prompts to draw.
        progress: Called with stage, tokens done and in all.
        settings: Further ones of `record_trace`.

    Raises:
        UsageError: `work` holds runs of something else.
        MoeLensError: A model cannot be loaded, or a run is not complete.
    """
    if checkpoints[0].recorded:
        return [Trace.open(each.path) for each in checkpoints]
    text = read_corpus(corpus)
    seed = int(settings.get("seed", 0))
    drawn = text if sample_size is None else text.sample(sample_size, seed)
    found = []
    for number, each in enumerate(checkpoints):
        folder = Path(work).expanduser() / each.name
        asked = {"sample_size": sample_size, **settings}
        trace = _recorded(folder, each, drawn, asked)
        if trace is None:
            stage = Stage(
                "recording", "tokens", of=f"{each.name} ({number + 1} of {len(checkpoints)})"
            )
            tell = begin(progress, stage)
            router = load(each.path)
            try:
                trace = record_trace(
                    router, text, folder, sample_size=sample_size, progress=tell, **settings
                )
            finally:
                router.close()
                del router
                gc.collect()
                mx.clear_cache()
        found.append(trace)
    return found


def _recorded(
    folder: Path, checkpoint: Checkpoint, corpus: Corpus, asked: dict[str, Any]
) -> Trace | None:
    """The whole run in `folder`, if it is that of this checkpoint and text; None: it is not."""
    if not is_trace(folder):
        return None
    try:
        trace = Trace.open(folder)
    except MoeLensError:  # not complete, or damaged: recording goes on or says so
        return None
    model, settings = trace.model, trace.header["settings"]
    same = (
        model.get("weights_sha256") == weights_sha256(checkpoint.path)
        and model.get("tokenizer_sha256") == tokenizer_sha256(checkpoint.path)
        and trace.header["corpus"]["fingerprint"] == corpus.fingerprint
        and all(settings.get(name) == value for name, value in asked.items())
        and not settings.get("overrides")
    )
    return trace if same else None
