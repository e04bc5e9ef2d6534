"""The header of a safetensors file: what it holds and where, with every claim checked.

The format (https://github.com/huggingface/safetensors, "Format") is eight bytes with the length of
a JSON header, the header, and the bytes of all tensors without a gap. MLX reads lazily and trusts
the header, so a file that is cut short or contradicts itself would fail late, in the middle of a
run, or be read wrongly.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe_lens.errors import MoeLensError

__all__ = ["BITS", "MLX_DTYPES", "StoredTensor", "damaged", "read_header"]

LARGEST_HEADER = 100_000_000
"""Bytes; the limit of the format's own reader."""

BITS = {
    "BOOL": 8,
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "U8": 8,
    "I8": 8,
    "F8_E5M2": 8,
    "F8_E4M3": 8,
    "F8_E8M0": 8,
    "I16": 16,
    "U16": 16,
    "F16": 16,
    "BF16": 16,
    "I32": 32,
    "U32": 32,
    "F32": 32,
    "I64": 64,
    "U64": 64,
    "F64": 64,
    "C64": 64,
}
"""Of one element of each dtype of the format."""

MLX_DTYPES = frozenset(BITS) - {"F4", "F6_E2M3", "F6_E3M2", "F8_E5M2", "F64"}
"""What ``mx.load`` takes from a safetensors file."""

_LARGEST_AXIS = 2**31 - 1


@dataclass(frozen=True)
class StoredTensor:
    """Where the bytes of one tensor stand: `size` of them, `start` bytes into `file`."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    start: int
    size: int


def read_header(path: Path) -> dict[str, StoredTensor]:
    """The tensors of a safetensors file by name, in the order of their bytes.

    Raises:
        MoeLensError: The file is empty, cut short, or contradicts itself.
    """
    content, start, size = _read(path)
    tensors = []
    for name, entry in content.items():
        if name != "__metadata__":
            tensors.append(_tensor(path, name, entry, start))
        elif not _is_metadata(entry):
            raise damaged(path, "its metadata are no texts")
    tensors.sort(key=lambda each: (each.start, each.size))
    _check_places(path, tensors, start, size)
    return {each.name: each for each in tensors}


def damaged(path: Path, reason: str) -> MoeLensError:
    """The refusal of a file whose content cannot be right."""
    return MoeLensError(f"{path} is truncated or corrupt ({reason}): copy or download it again")


def _read(path: Path) -> tuple[dict[str, Any], int, int]:
    """The header's JSON, where the tensors begin, and the size of the file."""
    try:
        if not path.is_file():
            what = "is not there" if not path.exists() else "is no file"
            raise MoeLensError(f"{path} {what}: copy or download it again")
        size = path.stat().st_size
        if size == 0:
            raise damaged(path, "it is empty")
        with path.open("rb") as file:
            head = file.read(8)
            length = int.from_bytes(head, "little")
            if len(head) < 8 or length > size - 8:
                raise damaged(path, "its header is cut off")
            if length > LARGEST_HEADER:
                raise damaged(path, f"its header has {length / 1e6:.0f} MB, the format allows 100")
            text = file.read(length)
    except OSError as error:
        raise MoeLensError(f"{path} cannot be read: {error.strerror or error}") from error
    try:
        content = json.loads(text.decode("utf-8"), object_pairs_hook=_without_doubles)
    except _DoubleNameError as error:
        raise damaged(path, f"its header names {error} twice") from error
    except (ValueError, RecursionError) as error:
        raise damaged(path, "its header is not readable") from error
    if not isinstance(content, dict):
        raise damaged(path, "its header is not readable")
    return content, 8 + length, size


class _DoubleNameError(Exception):
    """A JSON object that has one name twice, of which a reader would take either."""


def _without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise _DoubleNameError(_quoted(name))
        found[name] = value
    return found


def _is_metadata(entry: Any) -> bool:
    if entry is None:  # so mx.save_safetensors writes that there are none
        return True
    return isinstance(entry, dict) and all(isinstance(value, str) for value in entry.values())


def _tensor(path: Path, name: str, entry: Any, start: int) -> StoredTensor:
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise damaged(path, f"its header does not say what {_quoted(name)} is")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in BITS:
        raise damaged(path, f"{_quoted(name)} has the unknown dtype {_quoted(dtype)}")
    if not _are_sizes(shape) or any(axis > _LARGEST_AXIS for axis in shape):
        raise damaged(path, f"{_quoted(name)} has no possible shape")
    if not _are_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise damaged(path, f"{_quoted(name)} has no possible place")
    bits = math.prod(shape) * BITS[dtype]
    if bits != 8 * (offsets[1] - offsets[0]):
        raise damaged(
            path,
            f"{_quoted(name)} would need {-(-bits // 8)} bytes for its shape and has "
            f"{offsets[1] - offsets[0]}",
        )
    return StoredTensor(
        name, dtype, tuple(shape), path, start + offsets[0], offsets[1] - offsets[0]
    )


def _are_sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(each) is int and each >= 0 for each in value)


def _check_places(path: Path, tensors: list[StoredTensor], start: int, size: int) -> None:
    """Every byte after the header belongs to exactly one tensor."""
    end = start
    last = ""
    for each in tensors:
        if each.start < end:
            raise damaged(path, f"{_quoted(each.name)} and {_quoted(last)} overlap")
        if each.start > end:
            raise damaged(
                path, f"{each.start - end} bytes before {_quoted(each.name)} are no one's"
            )
        end, last = each.start + each.size, each.name
    if size < end:
        raise damaged(path, f"{end - size} bytes are missing")
    if size > end:
        raise damaged(path, f"{size - end} bytes at its end are no one's")


def _quoted(value: Any) -> str:
    """A text from a file as one short word that any terminal can show."""
    text = ascii(value)
    return text if len(text) <= 120 else f"{text[:100]}..."
