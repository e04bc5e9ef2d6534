"""The weight files of a model folder and the index that names them."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import Any

import mlx.core as mx

from moe_lens.errors import MoeLensError

from .header import MLX_DTYPES, StoredTensor, read_header

__all__ = ["INDEX", "check_weights", "open_tensors", "stored_tensors", "weight_files"]

INDEX = "model.safetensors.index.json"

_AGAIN = "download both again"


def weight_files(folder: Path) -> list[Path]:
    """The files that mlx-lm reads weights from; it never follows the index."""
    return sorted(folder.glob("model*.safetensors"))


def check_weights(folder: Path) -> None:
    """Refuse a folder whose weights are missing, incomplete, corrupt or contradictory.

    Raises:
        MoeLensError: With what is wrong and where.
    """
    stored_tensors(folder)


def stored_tensors(folder: Path) -> dict[str, StoredTensor]:
    """Every tensor of the files that mlx-lm reads, by its name there; all claims are checked.

    Links are followed: the hub's cache is made of links, and a person may keep shards elsewhere.
    Names in the index are not: they must be plain names of files in this folder.

    Raises:
        MoeLensError: Files are missing or corrupt, a tensor stands in two of them, the index
            contradicts them, or MLX does not read the dtype of one.
    """
    named = _read_index(folder)
    missing = sorted(name for name in set(named.values()) if not (folder / name).is_file())
    if missing:
        more = f"{missing[0]} and {len(missing) - 1} more of the shards its index names"
        raise MoeLensError(
            f"{folder} lacks {more}: download them again"
            if len(missing) > 1
            else f"{folder} lacks {missing[0]}, which its index names: download it again"
        )
    files = weight_files(folder)
    if not files:
        raise MoeLensError(f"{folder} has no model*.safetensors, so there are no weights to load")
    found: dict[str, StoredTensor] = {}
    for file in files:
        for name, tensor in read_header(file).items():
            if name in found:
                raise MoeLensError(
                    f"{name!a} stands in {found[name].file.name} and in {file.name} of "
                    f"{folder}, and mlx-lm would take either: move the file that is left over away"
                )
            if tensor.dtype not in MLX_DTYPES:
                raise MoeLensError(
                    f"{name!a} in {file} is {tensor.dtype}, which MLX does not read: convert "
                    "the model to bfloat16 first"
                )
            found[name] = tensor
    _check_index(folder, named, found)
    return found


def open_tensors(files: Iterable[Path]) -> dict[str, mx.array]:
    """All tensors of some weight files by name, as MLX reads them; nothing is read yet."""
    found: dict[str, mx.array] = {}
    for file in files:
        opened = mx.load(str(file))
        assert isinstance(opened, dict)
        found |= opened
    return found


def _read_index(folder: Path) -> dict[str, str]:
    """Tensor -> file, as the index says; {} where there is none."""
    path = folder / INDEX
    if not path.is_file():
        return {}
    try:
        content: Any = json.loads(path.read_text(encoding="utf-8"))
        named = content["weight_map"]
    except OSError as error:
        raise MoeLensError(f"{path} cannot be read: {error.strerror or error}") from error
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise MoeLensError(f"{path} is not a readable index: download it again") from error
    if not isinstance(named, dict) or not all(isinstance(file, str) for file in named.values()):
        raise MoeLensError(f"{path} is not a readable index: download it again")
    for file in named.values():
        if not _is_plain(file):
            raise MoeLensError(
                f"{path} names the shard {file!a}, which is no plain file name: take the "
                "model from a place you trust"
            )
    return named


def _is_plain(name: str) -> bool:
    """Whether a name from a file can only mean a file of the same folder."""
    return (
        name.isprintable()
        and 0 < len(name.encode("utf-8", "surrogateescape")) <= 255
        and name not in (".", "..")
        and "\\" not in name
        and PurePosixPath(name).name == name
    )


def _check_index(folder: Path, named: dict[str, str], found: dict[str, StoredTensor]) -> None:
    files = {tensor.file.name for tensor in found.values()}
    for name, file in named.items():
        # Files that mlx-lm does not read (a vision tower of its own, say) may be named as well.
        if file in files and (name not in found or found[name].file.name != file):
            raise MoeLensError(
                f"the index of {folder} places {name!a} in {file}, which does not hold it: "
                f"index and shards are of different models, {_AGAIN}"
            )
    unnamed = _first(name for name, each in found.items() if name not in named)
    if named and unnamed is not None:
        raise MoeLensError(
            f"{found[unnamed].file} holds {unnamed!a}, which the index of {folder} does not "
            f"name: index and shards are of different models, {_AGAIN}"
        )


def _first(names: Iterable[str]) -> str | None:
    return next(iter(names), None)
