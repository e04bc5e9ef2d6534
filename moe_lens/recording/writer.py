"""Writing a trace shard by shard, so that an interruption costs at most one shard.

The folder holds ``trace.json`` with ``"complete": false`` from the first moment. A shard appears
under its name only when all its bytes are on disk, and carries the fingerprint of the run it
belongs to. Whoever writes next finds the shards that are whole and goes on after the last of them.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from moe_lens.atomic import PART_SUFFIX, write_bytes
from moe_lens.errors import CaptureError, MoeLensError, UsageError
from moe_lens.fingerprint import canonical_sha256, file_sha256
from moe_lens.kernels import NO_EXPERT
from moe_lens.trace import Routes, TokenTexts
from moe_lens.trace.folder import ShardEntry, is_trace, read_header

from .header import recording_identity

__all__ = ["TraceWriter"]

_PARTS = {
    "model": "another model",
    "corpus": "another corpus",
    "settings": "other settings",
    "versions": "other versions",
}


class TraceWriter:
    """One recording into one folder. Use as a context manager; it holds a lock on the folder.

    Args:
        folder: Where the trace goes. Made if it is not there.
        header: ``trace.json`` without what only the finished recording knows (``complete``,
            ``shards``, ``slots``). Equal headers mean the same recording.
        prompts: Content of ``prompts.json``.
        texts: Content of ``tokens.json``.
        shards: Prompts of each shard, in order.
        resume: Go on where an interrupted recording of the same header stopped.
        overwrite: Remove a trace that is in the folder and begin anew.

    Raises:
        UsageError: The folder holds something else, or a trace of another recording.
    """

    def __init__(
        self,
        folder: Path,
        header: dict[str, Any],
        prompts: dict[str, Any],
        texts: TokenTexts,
        shards: Sequence[range],
        *,
        resume: bool = True,
        overwrite: bool = False,
    ) -> None:
        self.folder = folder
        self.header = json.loads(json.dumps(header))  # as it will come back from disk
        self.prompts = prompts
        self.texts = texts
        self.shards = list(shards)
        self.entries: list[ShardEntry] = []
        self.slots: int | None = None
        self._resume = resume
        self._overwrite = overwrite
        self._finished = False
        self._checksums: dict[str, str] = {}
        self._lock: int | None = None

    def __enter__(self) -> TraceWriter:
        _make_folder(self.folder)
        self._lock = _lock(self.folder)
        try:
            self._prepare()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_exception: object) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    @property
    def fingerprint(self) -> str:
        """Identifies the recording; written into every shard."""
        return canonical_sha256(recording_identity(self.header))

    @property
    def complete(self) -> bool:
        """Whether every shard is there."""
        return len(self.entries) == len(self.shards)

    def write(self, routes: Routes) -> None:
        """Append the next shard. ``routes`` holds all tokens of its prompts, in prompt order."""
        number = len(self.entries)
        if self.slots is not None and routes.slots != self.slots:
            raise CaptureError(
                f"shard {number} has {routes.slots} experts per token where the shards before it "
                f"have {self.slots}; record again without changing the model meanwhile"
            )
        tensors = {
            "token_ids": routes.token_ids,
            "prompt": routes.prompt,
            "position": routes.position,
            "expert_ids": _compact_ids(routes),
            "expert_weights": routes.expert_weights.astype(np.float16),
        }
        if routes.router_logits is not None:
            tensors["router_logits"] = routes.router_logits.astype(np.float16)
        tensors = {name: np.ascontiguousarray(array) for name, array in tensors.items()}
        # One metadata key: safetensors writes several in random order.
        data = save(tensors, metadata={"shard": self._shard_metadata(number, len(routes))})
        path = self.folder / _shard_name(number)
        write_bytes(path, data)
        self._add_entry(number, len(routes), len(data), hashlib.sha256(data).hexdigest())
        self.slots = routes.slots

    def finish(self) -> None:
        """Write the ``trace.json`` that says the trace is complete, unless it is there."""
        if self._finished:
            return
        shards = [asdict(entry) for entry in self.entries]
        self._write_header({"complete": True, "slots": self.slots, "shards": shards})

    def _prepare(self) -> None:
        if is_trace(self.folder):
            if self._overwrite:
                _remove_trace(self.folder)
            else:
                self._check_same_recording()
        elif any(not _is_part(path) for path in self.folder.iterdir()):
            raise UsageError(
                f"the folder {self.folder} is not empty and holds no trace; choose another output "
                "folder"
            )
        self._find_whole_shards()
        if self.complete and self._finished:
            return
        self._finished = False
        for path in self.folder.iterdir():
            if _is_part(path):
                path.unlink()
        write_bytes(self.folder / "prompts.json", json.dumps(self.prompts) + "\n")
        write_bytes(self.folder / "tokens.json", self.texts.to_json())
        self._write_header({"complete": False, "slots": None, "shards": []})

    def _check_same_recording(self) -> None:
        found = read_header(self.folder)
        if not self._resume:
            raise UsageError(
                f"the folder {self.folder} already holds a trace; choose another output folder, "
                "resume it, or replace it (--force)"
            )
        there, asked = recording_identity(found), recording_identity(self.header)
        for part, name in _PARTS.items():
            if there[part] != asked[part]:
                raise UsageError(
                    f"the trace in {self.folder} was recorded with {name} "
                    f"({_difference(there[part], asked[part])}); choose another output folder, or "
                    "replace it (--force)"
                )
        self._finished = bool(found["complete"])
        self._checksums = {entry["file"]: entry["sha256"] for entry in found["shards"]}

    def _find_whole_shards(self) -> None:
        """Take over the shards of an earlier run, up to the first that is not whole."""
        for number in range(len(self.shards)):
            path = self.folder / _shard_name(number)
            try:
                with safe_open(path, framework="numpy") as file:
                    tokens = file.get_slice("position").get_shape()[0]
                    slots = file.get_slice("expert_ids").get_shape()[2]
                    metadata = (file.metadata() or {}).get("shard")
            except (SafetensorError, OSError):
                return
            if metadata != self._shard_metadata(number, tokens):
                return
            checksum = file_sha256(path)
            if self._checksums.get(path.name, checksum) != checksum:
                return
            self._add_entry(number, tokens, path.stat().st_size, checksum)
            self.slots = slots

    def _shard_metadata(self, number: int, tokens: int) -> str:
        prompts = self.shards[number]
        return json.dumps(
            {
                "recording": self.fingerprint,
                "shard": number,
                "prompts": [prompts.start, prompts.stop],
                "tokens": tokens,
            }
        )

    def _add_entry(self, number: int, tokens: int, size: int, sha256: str) -> None:
        prompts = self.shards[number]
        self.entries.append(
            ShardEntry(
                file=_shard_name(number),
                first_prompt=prompts.start,
                stop_prompt=prompts.stop,
                tokens=tokens,
                bytes=size,
                sha256=sha256,
            )
        )

    def _write_header(self, progress: dict[str, Any]) -> None:
        content = json.dumps(self.header | progress, indent=2, ensure_ascii=False)
        write_bytes(self.folder / "trace.json", content + "\n")


def _compact_ids(routes: Routes) -> np.ndarray:
    """uint8 where every id fits and no slot is empty, else uint16."""
    ids = routes.expert_ids
    has_empty = ids.dtype.itemsize > 1 and bool((ids == NO_EXPERT).any())
    return ids.astype(np.uint8 if routes.router_width <= 256 and not has_empty else np.uint16)


def _shard_name(number: int) -> str:
    return f"shard-{number:05}.safetensors"


def _is_part(path: Path) -> bool:
    return path.name.startswith(".") and path.name.endswith(PART_SUFFIX)


def _remove_trace(folder: Path) -> None:
    """Remove a trace's own files, ``trace.json`` last, and nothing else."""
    names = ["tokens.json", "prompts.json"]
    for path in [*folder.glob("shard-*.safetensors"), *(folder / name for name in names)]:
        path.unlink(missing_ok=True)
    (folder / "trace.json").unlink()


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(
            f"the output folder {folder} cannot be made: {error.strerror}; choose another place"
        ) from error


def _lock(folder: Path) -> int | None:
    """Hold the folder, so that two recordings cannot mix in it. Released when the process ends."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(descriptor)
        raise MoeLensError(
            f"another process is recording into {folder}; wait for it or choose another folder"
        ) from error
    except OSError:  # some network file systems know no locks
        os.close(descriptor)
        return None
    return descriptor


def _difference(found: Any, wanted: Any) -> str:
    """The entries that differ, as ``name: then -> now``."""
    keys = sorted(key for key in found.keys() | wanted.keys() if found.get(key) != wanted.get(key))
    shown = [
        key.removesuffix("_sha256")
        if _is_hash(found.get(key))
        else f"{key}: {found.get(key)} -> {wanted.get(key)}"
        for key in keys[:3]
    ]
    return ", ".join(shown) + (f" and {len(keys) - 3} more" if len(keys) > 3 else "")


def _is_hash(value: Any) -> bool:
    """Whether it tells a person nothing but that two things differ."""
    return isinstance(value, str) and len(value) == 64
