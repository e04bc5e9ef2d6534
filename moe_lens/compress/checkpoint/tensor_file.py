"""Safetensors files written one tensor after the other, so that only one is in memory.

``mx.save_safetensors`` evaluates a whole shard before it writes. The format
(https://github.com/huggingface/safetensors, "Format") needs only names, dtypes and shapes in its
header, which lazy arrays know before they are computed. What is written is brought to the disk
while the next tensor is made.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Container, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import mlx.core as mx

from moe_lens.checkpoint_files.finite import is_finite
from moe_lens.compress.resuming.whole_shards import WholeShards
from moe_lens.errors import MoeLensError

SHARD_BYTES = 4 << 30
"""Largest shard; a larger tensor has one of its own."""

PIECE_BYTES = 32 << 20
"""How much is written, and told, at a time."""

SYNC_BYTES = 256 << 20
"""How much may wait in memory of the operating system before the disk is told to take it."""

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

Written = Callable[[int, bool], None]
"""Called with a number of bytes, and whether they are written just now or were there before."""


def write_shards(
    folder: Path,
    tensors: dict[str, mx.array],
    parameters: int,
    *,
    shard_bytes: int = SHARD_BYTES,
    whole: WholeShards | None = None,
    written: Written | None = None,
    finite: Container[str] = (),
    dtypes: Mapping[str, str] | None = None,
    made_for: str = "mlx",
) -> None:
    """Write all tensors and their index under the names stock mlx-lm gives the files.

    Args:
        folder: Exists, and holds no weights but `whole` ones.
        tensors: Emptied on the way, so that each is freed once it is on disk.
        parameters: Total number of weights, for the index.
        shard_bytes: Largest size of a file.
        whole: Files that are there are not written again, and those that are written are added.
        written: Progress.
        finite: Names of tensors that may hold no NaN and no infinity.
        dtypes: What the header says of tensors whose dtype MLX has no name for.
        made_for: The metadata ``format``; transformers takes ``pt`` and ``mlx``.

    Raises:
        MoeLensError: One of them does.
    """
    shards = _split(tensors, shard_bytes)
    total = sum(value.nbytes for value in tensors.values())
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards, start=1):
        name = "model.safetensors"
        if len(shards) > 1:
            name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        content = {each: tensors.pop(each) for each in names}
        header = _header(content, dtypes or {}, made_for)
        if whole is None:
            _write_shard(folder / name, header, content, written, finite)
        elif name not in whole:
            _write_shard(folder / name, header, content, written, finite)
            whole.add(name)
        elif written is not None:
            written(sum(value.nbytes for value in content.values()), False)
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


def _write_shard(
    path: Path,
    header: bytes,
    tensors: dict[str, mx.array],
    written: Written | None,
    finite: Container[str],
) -> None:
    with path.open("wb") as file, _DiskBehind(file) as disk:
        file.write(len(header).to_bytes(8, "little"))
        file.write(header)
        for name in list(tensors):
            value = tensors.pop(name)
            data = bytes_of(value)
            if name in finite and not is_finite(name, _NAMES[value.dtype], data):
                raise MoeLensError(
                    f"{name} holds NaN or infinity, so the model is damaged: download or convert "
                    "it again"
                )
            del value  # what it was made of goes before the bytes are written
            for start in range(0, len(data), PIECE_BYTES):
                size = file.write(data[start : start + PIECE_BYTES])
                disk.follow(size)
                if written is not None:
                    written(size, True)
            del data


class _DiskBehind:
    """Brings a file to the disk piece by piece, beside the process that makes its content.

    Leaving the block waits until all of it is there.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._thread = ThreadPoolExecutor(1)
        self._running: Future[None] | None = None
        self._waiting = 0

    def follow(self, size: int) -> None:
        """Note that so many bytes were written; perhaps begin to bring them to the disk."""
        self._waiting += size
        if self._waiting < SYNC_BYTES or (self._running and not self._running.done()):
            return
        if self._running:
            self._running.result()  # what the disk refused
        self._file.flush()
        self._running = self._thread.submit(os.fsync, self._file.fileno())
        self._waiting = 0

    def __enter__(self) -> _DiskBehind:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._thread.shutdown()
        if kind is None:
            if self._running:
                self._running.result()
            self._file.flush()
            os.fsync(self._file.fileno())


def _header(tensors: dict[str, mx.array], dtypes: Mapping[str, str], made_for: str) -> bytes:
    entries: dict[str, object] = {"__metadata__": {"format": made_for}}
    offset = 0
    for name, value in tensors.items():
        entries[name] = {
            "dtype": dtypes.get(name, _NAMES[value.dtype]),
            "shape": list(value.shape),
            "data_offsets": [offset, offset + value.nbytes],
        }
        offset += value.nbytes
    text = json.dumps(entries, separators=(",", ":")).encode()
    return text + b" " * (-len(text) % 8)


def bytes_of(value: mx.array) -> memoryview:
    """The bytes of a tensor, computed now."""
    if not value.size:
        return memoryview(b"")
    # bfloat16 has no buffer type of its own, its bytes have.
    raw: Any = mx.contiguous(value.reshape(-1)).view(mx.uint8)
    return memoryview(raw)
