"""Safetensors files written one tensor after the other, so that only one is in memory.

``mx.save_safetensors`` evaluates a whole shard before it writes. The format
(https://github.com/huggingface/safetensors, "Format") needs only names, dtypes and shapes in its
header, which lazy arrays know before they are computed.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import mlx.core as mx

SHARD_BYTES = 4 << 30
"""Largest shard; a larger tensor has one of its own."""

_NAMES = {
    mx.bool_: "BOOL",
    mx.uint8: "U8",
    mx.uint16: "U16",
    mx.uint32: "U32",
    mx.uint64: "U64",
    mx.int8: "I8",
    mx.int16: "I16",
    mx.int32: "I32",
    mx.int64: "I64",
    mx.float16: "F16",
    mx.bfloat16: "BF16",
    mx.float32: "F32",
    mx.float64: "F64",
    mx.complex64: "C64",
}

Written = Callable[[int], None]
"""Called with the number of bytes just written."""


def write_shards(
    folder: Path,
    tensors: dict[str, mx.array],
    parameters: int,
    *,
    shard_bytes: int = SHARD_BYTES,
    written: Written | None = None,
) -> None:
    """Write all tensors and their index under the names stock mlx-lm gives them.

    Args:
        folder: Exists, and holds no weights.
        tensors: Emptied on the way, so that each is freed once it is on disk.
        parameters: Total number of weights, for the index.
        shard_bytes: Largest size of a file.
        written: Progress.
    """
    shards = _split(tensors, shard_bytes)
    total = sum(value.nbytes for value in tensors.values())
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards, start=1):
        name = "model.safetensors"
        if len(shards) > 1:
            name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        _write_shard(folder / name, {each: tensors.pop(each) for each in names}, written)
        weight_map |= dict.fromkeys(names, name)
    index = {
        "metadata": {"total_size": total, "total_parameters": parameters},
        "weight_map": dict(sorted(weight_map.items())),
    }
    text = json.dumps(index, indent=4)
    (folder / "model.safetensors.index.json").write_text(text, encoding="utf-8")


def _split(tensors: dict[str, mx.array], shard_bytes: int) -> list[list[str]]:
    shards: list[list[str]] = []
    size = 0
    for name, value in tensors.items():
        if not shards or size + value.nbytes > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += value.nbytes
    return shards


def _write_shard(path: Path, tensors: dict[str, mx.array], written: Written | None) -> None:
    with path.open("wb") as file:
        header = _header(tensors)
        file.write(len(header).to_bytes(8, "little"))
        file.write(header)
        for name in list(tensors):
            size = _write_bytes(file, tensors.pop(name))
            if written is not None:
                written(size)
        file.flush()
        os.fsync(file.fileno())


def _header(tensors: dict[str, mx.array]) -> bytes:
    entries: dict[str, object] = {"__metadata__": {"format": "mlx"}}
    offset = 0
    for name, value in tensors.items():
        entries[name] = {
            "dtype": _NAMES[value.dtype],
            "shape": list(value.shape),
            "data_offsets": [offset, offset + value.nbytes],
        }
        offset += value.nbytes
    text = json.dumps(entries, separators=(",", ":")).encode()
    return text + b" " * (-len(text) % 8)


def _write_bytes(file: BinaryIO, value: mx.array) -> int:
    if value.size:
        # bfloat16 has no buffer type of its own, its bytes have.
        raw: Any = mx.contiguous(value.reshape(-1)).view(mx.uint8)
        file.write(memoryview(raw))
    return value.nbytes
