"""A calibration as one safetensors file: the arrays as tensors, the rest as JSON in its header.

Reading a text through a large model takes hours, planning from what it showed takes seconds; so
the statistics are kept, and belong to one model, one text and one way of reading it. Nothing in
the file can run code.
"""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from moe_lens.atomic import write_bytes
from moe_lens.compress.plan.identity import CorpusIdentity, ModelIdentity
from moe_lens.errors import MoeLensError, UsageError

from .routed_sums import RoutedSums
from .statistics import Calibration, Collected, LayerStatistics

FORMAT = "moe-lens calibration"
VERSION = 1

_LAYER = ("together", "cosine_sums", "cosine_counts", "sampled_ids")
_ASKED = ("sampled_output_sums", "logit_gram")
_SUMS = tuple(field.name for field in fields(RoutedSums) if field.name != "tokens")
_HALVES = "halves"

Tensors = dict[str, NDArray[Any]]


def save_statistics(calibration: Calibration, path: Path) -> None:
    """Write the statistics, whole or not at all; floats are float64, so that nothing is lost.

    Raises:
        UsageError: The folder is not there, or may not be written.
        MoeLensError: The disk refuses.
    """
    tensors: Tensors = {}
    parts: list[dict[str, Any]] = []
    for each in calibration.layers:
        place = f"layers.{each.layer}"
        for name in (*_LAYER, *_ASKED):
            value = getattr(each, name)
            if value is not None:
                tensors[f"{place}.{name}"] = value
        for number, sums in enumerate(each.labels.values()):
            tensors |= _tensors(sums, f"{place}.labels.{number}")
        for number, sums in enumerate(each.halves or ()):
            tensors |= _tensors(sums, f"{place}.{_HALVES}.{number}")
        parts.append(
            {
                "layer": each.layer,
                "labels": {label: sums.tokens for label, sums in each.labels.items()},
                _HALVES: None if each.halves is None else [sums.tokens for sums in each.halves],
            }
        )
    header = {
        "format": FORMAT,
        "version": VERSION,
        "model": calibration.model.to_dict(),
        "corpus": calibration.corpus.to_dict(),
        "collected": calibration.collected.to_dict(),
        "layers": parts,
    }
    tensors = {name: np.ascontiguousarray(value) for name, value in tensors.items()}
    write_bytes(path, save(tensors, metadata={"calibration": json.dumps(header)}))


def _tensors(sums: RoutedSums, place: str) -> Tensors:
    found = {f"{place}.{name}": getattr(sums, name) for name in _SUMS}
    return {name: value for name, value in found.items() if value is not None}


def load_statistics(path: Path) -> Calibration:
    """Read what `save_statistics` wrote.

    Raises:
        UsageError: There is no such file.
        MoeLensError: The file is damaged, no calibration, or of another version.
    """
    if not path.is_file():
        raise UsageError(f"there are no statistics at {path}; calibrate first")
    try:
        with safe_open(path, framework="numpy") as file:
            header = json.loads((file.metadata() or {}).get("calibration", "{}"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise MoeLensError(f"{path} is damaged ({error}); delete it and calibrate again") from error
    if header.get("format") != FORMAT:
        raise MoeLensError(f"{path} holds no calibration of moe-lens; give another --statistics")
    if header.get("version") != VERSION:
        raise MoeLensError(
            f"the statistics {path} have version {header.get('version')}, this moe-lens reads "
            f"{VERSION}; delete the file and calibrate again"
        )
    try:
        return Calibration(
            model=ModelIdentity(**header["model"]),
            corpus=CorpusIdentity(**header["corpus"]),
            layers=tuple(_layer(part, tensors) for part in header["layers"]),
            collected=Collected(**header["collected"]),
        )
    except (KeyError, TypeError) as error:
        raise MoeLensError(
            f"{path} is incomplete ({error}); delete it and calibrate again"
        ) from error


def _layer(part: dict[str, Any], tensors: Tensors) -> LayerStatistics:
    place = f"layers.{part['layer']}"
    held: dict[str, Any] = {name: tensors[f"{place}.{name}"] for name in _LAYER}
    held |= {name: tensors.get(f"{place}.{name}") for name in _ASKED}
    halves = [
        _sums(size, f"{place}.{_HALVES}.{number}", tensors)
        for number, size in enumerate(part[_HALVES] or ())
    ]
    return LayerStatistics(
        layer=part["layer"],
        labels={
            label: _sums(size, f"{place}.labels.{number}", tensors)
            for number, (label, size) in enumerate(part["labels"].items())
        },
        halves=(halves[0], halves[1]) if halves else None,
        **held,
    )


def _sums(size: int, place: str, tensors: Tensors) -> RoutedSums:
    asked = "output_sums"
    found: dict[str, Any] = {name: tensors[f"{place}.{name}"] for name in _SUMS if name != asked}
    return RoutedSums(tokens=size, **found, output_sums=tensors.get(f"{place}.{asked}"))


def check_reusable(
    found: Calibration,
    path: Path,
    *,
    model: ModelIdentity,
    corpus_fingerprint: str,
    sequence_length: int | None,
    seed: int,
    asked: Collected,
) -> None:
    """Raise UsageError unless these statistics are what a calibration would give now.

    Statistics that hold more than is asked for will do.

    Args:
        found: What the file holds.
        path: The file, for the message.
        model: The model at hand.
        corpus_fingerprint: Of the prompts that would be read.
        sequence_length: At which they would be cut.
        seed: Of the draws.
        asked: What would be collected.
    """
    remedy = "give another --statistics file, or delete this one to calibrate again"
    if found.model.fingerprint != model.fingerprint:
        raise UsageError(
            f"{path} holds the statistics of another model ({found.model.name}, with other weights "
            f"than {model.name}); {remedy}"
        )
    if found.corpus.fingerprint != corpus_fingerprint:
        raise UsageError(
            f"{path} holds the statistics of another text ({found.corpus.name}, "
            f"{found.corpus.prompts} prompts); give the same --data and --sample-size, or {remedy}"
        )
    there: dict[str, Any] = {
        "sequence_length": found.corpus.sequence_length,
        "seed": found.corpus.seed,
    }
    here: dict[str, Any] = {"sequence_length": sequence_length, "seed": seed}
    there |= {"chat_template": found.collected.chat_template, "stop_at": found.collected.stop_at}
    here |= {"chat_template": asked.chat_template, "stop_at": asked.stop_at}
    other = next((name for name in here if here[name] != there[name]), None)
    if other is not None:
        option = "--" + other.replace("_", "-")
        raise UsageError(
            f"the statistics in {path} were read with {option} {there[other]}, now it is "
            f"{here[other]}; give the same, or {remedy}"
        )
    lacks = [
        what
        for what, there_is, needed in (
            ("similarities", found.collected.similarity, asked.similarity),
            ("mean outputs", found.collected.mean_outputs, asked.mean_outputs),
        )
        if needed and not there_is
    ]
    if lacks:
        raise UsageError(f"the statistics in {path} lack {' and '.join(lacks)}; {remedy}")
    if asked.similarity and found.collected.similarity_tokens != asked.similarity_tokens:
        raise UsageError(
            f"the similarities in {path} are of {found.collected.similarity_tokens} tokens, not "
            f"{asked.similarity_tokens}; {remedy}"
        )
