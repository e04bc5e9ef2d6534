"""A calibration as one safetensors file: the arrays as tensors, the rest as JSON in its header.

Reading a text through a large model takes hours, planning from what it showed takes seconds; so
the statistics are kept, and belong to one model, one text and one way of reading it. Nothing in
the file can run code.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import fields
from pathlib import Path
from typing import Any

from moe_lens.compress.plan.identity import CorpusIdentity, ModelIdentity
from moe_lens.compress.plan.identity_json import read_identity
from moe_lens.errors import MoeLensError, UsageError
from moe_lens.json_shape import NUMBER, fits

from .array_file import Arrays, Kind, read_arrays, write_arrays
from .checked_layers import wrong_layers
from .routed_sums import RoutedSums
from .statistics import Calibration, Collected, LayerStatistics

KIND = Kind("moe-lens calibration", 2, "the statistics", "delete it and calibrate again")

_CONTENT: dict[str, Any] = {
    "model": {},
    "corpus": {},
    "collected": {
        "similarity": bool,
        "similarity_tokens": int,
        "mean_outputs": bool,
        "chat_template": bool,
        "stop_at": (NUMBER, type(None)),
        "cpu_experts": str,
    },
    "layers": list,
}

_LAYER = ("together", "cosine_sums", "cosine_counts", "sampled_ids")
_ASKED = ("sampled_output_sums", "logit_gram")
_SUMS = tuple(field.name for field in fields(RoutedSums) if field.name != "tokens")
_HALVES = "halves"


def save_statistics(calibration: Calibration, path: Path) -> None:
    """Write the statistics, whole or not at all; floats are float64, so that nothing is lost.

    Raises:
        UsageError: The folder is not there, or may not be written.
        MoeLensError: The disk refuses.
    """
    parts, arrays = layers_as_arrays(calibration.layers)
    content = {
        "model": calibration.model.to_dict(),
        "corpus": calibration.corpus.to_dict(),
        "collected": calibration.collected.to_dict(),
        "layers": parts,
    }
    write_arrays(path, KIND, content, arrays)


def layers_as_arrays(layers: Iterable[LayerStatistics]) -> tuple[list[dict[str, Any]], Arrays]:
    """The plain values of each layer, and all arrays by names that no two layers share."""
    arrays: Arrays = {}
    parts: list[dict[str, Any]] = []
    for each in layers:
        place = f"layers.{each.layer}"
        for name in (*_LAYER, *_ASKED):
            value = getattr(each, name)
            if value is not None:
                arrays[f"{place}.{name}"] = value
        for number, sums in enumerate(each.labels.values()):
            arrays |= _arrays(sums, f"{place}.labels.{number}")
        for number, sums in enumerate(each.halves or ()):
            arrays |= _arrays(sums, f"{place}.{_HALVES}.{number}")
        parts.append(
            {
                "layer": each.layer,
                "labels": {label: sums.tokens for label, sums in each.labels.items()},
                _HALVES: None if each.halves is None else [sums.tokens for sums in each.halves],
            }
        )
    return parts, arrays


def _arrays(sums: RoutedSums, place: str) -> Arrays:
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
    content, arrays = read_arrays(path, KIND)
    for part, shape in _CONTENT.items():
        if not fits(content.get(part), shape):
            raise _incomplete(path, f'"{part}" is missing or of the wrong kind')
    try:
        model = read_identity(ModelIdentity, content["model"])
        corpus = read_identity(CorpusIdentity, content["corpus"])
        collected = Collected(**content["collected"])
    except (ValueError, TypeError) as error:
        raise _incomplete(path, f"it {error}") from error
    parts = content["layers"]
    wrong = wrong_layers(parts, arrays, model.num_experts, model.router_width)
    if wrong is not None:
        raise _incomplete(path, wrong)
    return Calibration(model, corpus, layers_from_arrays(parts, arrays), collected)


def _incomplete(path: Path, reason: str) -> MoeLensError:
    return MoeLensError(f"{path} cannot be used ({reason}); {KIND.remedy}")


def layers_from_arrays(parts: list[dict[str, Any]], arrays: Arrays) -> tuple[LayerStatistics, ...]:
    """What `layers_as_arrays` took apart; LookupError, TypeError or AttributeError if not all."""
    return tuple(_layer(part, arrays) for part in parts)


def _layer(part: dict[str, Any], arrays: Arrays) -> LayerStatistics:
    place = f"layers.{part['layer']}"
    held: dict[str, Any] = {name: arrays[f"{place}.{name}"] for name in _LAYER}
    held |= {name: arrays.get(f"{place}.{name}") for name in _ASKED}
    halves = [
        _sums(size, f"{place}.{_HALVES}.{number}", arrays)
        for number, size in enumerate(part[_HALVES] or ())
    ]
    return LayerStatistics(
        layer=part["layer"],
        labels={
            label: _sums(size, f"{place}.labels.{number}", arrays)
            for number, (label, size) in enumerate(part["labels"].items())
        },
        halves=(halves[0], halves[1]) if halves else None,
        **held,
    )


def _sums(size: int, place: str, arrays: Arrays) -> RoutedSums:
    asked = "output_sums"
    found: dict[str, Any] = {name: arrays[f"{place}.{name}"] for name in _SUMS if name != asked}
    return RoutedSums(tokens=size, **found, output_sums=arrays.get(f"{place}.{asked}"))


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
    for name in ("chat_template", "stop_at", "cpu_experts"):
        there[name], here[name] = getattr(found.collected, name), getattr(asked, name)
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
