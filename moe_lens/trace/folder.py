"""A trace: the route of every token of a corpus through a model, kept on disk.

    trace = Trace.open("run/")
    trace.num_tokens, trace.layers, trace.model["name"]
    routes = trace.prompt(0)                     # one prompt: tokens, experts, weights
    for routes in trace.shards():                # everything, one bounded part at a time
        ...

A trace is a folder:

* ``trace.json``: model, corpus, settings, versions, shards, and the definition of every array;
* ``prompts.json``: number of tokens, label and hash of each prompt, in corpus order;
* ``tokens.json``: the text of each token id that occurs;
* ``shard-00000.safetensors`` and so on: whole prompts in order, with ``token_ids``, ``prompt`` and
  ``position`` int32 [tokens], ``expert_ids`` uint8 or uint16 [MoE layers, tokens, k],
  ``expert_weights`` float16 of the same shape, and ``router_logits`` float16 [MoE layers, tokens,
  router width] where asked for.

Opening reads the three JSON files. Shards are memory-mapped when they are read, and only the rows
that are asked for are copied.
"""

from __future__ import annotations

import hashlib
import os
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from moe_lens.errors import MoeLensError, UsageError

from .json_files import (
    AGAIN,
    FORMAT,
    VERSION,
    damaged,
    read_header,
    read_json,
    read_texts,
    wrong_prompts,
)
from .routes import NO_EXPERT, Routes
from .tokens import TokenTexts

__all__ = ["FORMAT", "VERSION", "ShardEntry", "Trace", "is_trace", "read_header"]


@dataclass(frozen=True)
class ShardEntry:
    """What ``trace.json`` says about one shard: its file, its prompts and its checksum."""

    file: str
    first_prompt: int
    stop_prompt: int
    tokens: int
    bytes: int
    sha256: str


def is_trace(path: str | os.PathLike[str]) -> bool:
    """Whether ``path`` is a folder that holds a trace, complete or not."""
    return (Path(path).expanduser() / "trace.json").is_file()


class Trace:
    """A recorded trace, opened for reading. Make one with `open`.

    Attributes:
        path: The folder.
        header: Everything in ``trace.json``.
        labels: Label of each prompt, ``None`` where it has none.
        prompt_tokens: [prompts] int64, number of tokens of each prompt (0 for an empty one).
        texts: Texts of the token ids that occur.
    """

    def __init__(
        self, path: Path, header: dict[str, Any], prompts: dict[str, Any], texts: TokenTexts
    ) -> None:
        self.path = path
        self.header = header
        self.labels: tuple[str | None, ...] = tuple(prompts["labels"])
        self.prompt_sha256: tuple[str, ...] = tuple(prompts["sha256"])
        self.prompt_tokens = np.asarray(prompts["tokens"], dtype=np.int64)
        self.texts = texts
        self.entries = tuple(ShardEntry(**entry) for entry in header["shards"])

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Trace:
        """Open a trace folder. Reads the JSON files and the shards' sizes, no routing yet.

        Raises:
            UsageError: There is no trace at ``path``.
            MoeLensError: The trace is incomplete, of another version, or a shard is missing or
                has the wrong size.
        """
        folder = Path(path).expanduser()
        header = read_header(folder)
        if not header["complete"]:
            raise MoeLensError(
                f"the trace {folder} is not complete; run the same trace command again, it goes "
                "on where it stopped"
            )
        prompts = read_json(folder / "prompts.json")
        if wrong := wrong_prompts(prompts, header):
            raise damaged(folder / "prompts.json", wrong)
        trace = cls(folder, header, prompts, read_texts(folder / "tokens.json"))
        for entry in trace.entries:
            _check_size(folder / entry.file, entry)
        return trace

    def __repr__(self) -> str:
        return (
            f"Trace({str(self.path)!r}, {self.num_tokens} tokens of {self.num_prompts} prompts, "
            f"{len(self.layers)} MoE layers)"
        )

    @property
    def model(self) -> dict[str, Any]:
        """The model as ``ExpertRouter.info`` described it, with its fingerprints."""
        return dict(self.header["model"])

    @property
    def layers(self) -> tuple[int, ...]:
        """Model layer index of each MoE layer, ascending."""
        return tuple(self.header["layers"])

    @property
    def router_width(self) -> int:
        """Number of experts a router can choose from, zero experts included."""
        return int(self.header["router_width"])

    @property
    def slots(self) -> int:
        """Experts recorded per token and layer (the largest k where layers differ)."""
        return int(self.header["slots"])

    @property
    def num_tokens(self) -> int:
        """Tokens in the whole trace; pads are never recorded."""
        return int(self.prompt_tokens.sum())

    @property
    def num_prompts(self) -> int:
        """Prompts of the corpus, empty ones included."""
        return len(self.labels)

    @property
    def label_names(self) -> tuple[str, ...]:
        """The distinct labels, sorted."""
        return tuple(sorted({label for label in self.labels if label is not None}))

    @property
    def notes(self) -> tuple[str, ...]:
        """What was left out of the corpus or cut, one sentence each."""
        return tuple(self.header["corpus"]["notes"])

    @property
    def has_router_logits(self) -> bool:
        """Whether ``router_logits`` were recorded."""
        return bool(self.header["settings"]["router_logits"])

    def shards(self) -> Iterator[Routes]:
        """All tokens, one shard after the other; only one shard is in memory at a time.

        Raises:
            MoeLensError: A shard is damaged.
        """
        for entry in self.entries:
            yield self._read(entry, 0, entry.tokens)

    def prompt(self, index: int) -> Routes:
        """The tokens of one prompt, read without loading the rest of its shard.

        Args:
            index: Place in the corpus, from 0. A prompt without tokens gives empty arrays.

        Raises:
            UsageError: There is no such prompt.
            MoeLensError: The shard is damaged.
        """
        if not 0 <= index < self.num_prompts:
            raise UsageError(
                f"there is no prompt {index}; the trace has prompts 0 to {self.num_prompts - 1}"
            )
        firsts = [entry.first_prompt for entry in self.entries]
        entry = self.entries[max(bisect_right(firsts, index) - 1, 0)]
        start = int(self.prompt_tokens[entry.first_prompt : index].sum())
        return self._read(entry, start, start + int(self.prompt_tokens[index]))

    def prompts(self) -> Iterator[Routes]:
        """Every prompt in turn, each shard read once. Empty prompts give empty arrays."""
        for entry in self.entries:
            routes = self._read(entry, 0, entry.tokens)
            stop = 0
            for index in range(entry.first_prompt, entry.stop_prompt):
                start, stop = stop, stop + int(self.prompt_tokens[index])
                yield routes.rows(start, stop)

    def verify(self) -> None:
        """Read every shard whole and compare its SHA-256 with ``trace.json``.

        Raises:
            MoeLensError: A shard's bytes are not those that were written.
        """
        for entry in self.entries:
            with (self.path / entry.file).open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            if digest != entry.sha256:
                raise MoeLensError(
                    f"{self.path / entry.file} is damaged: its checksum is not the one in "
                    f"trace.json; {AGAIN}"
                )

    def _read(self, entry: ShardEntry, start: int, stop: int) -> Routes:
        if start == stop:  # safetensors refuses an empty slice at the end of a tensor
            return self._read(entry, 0, 1).rows(0, 0)
        path = self.path / entry.file
        names = ["token_ids", "prompt", "position", "expert_ids", "expert_weights"]
        names += ["router_logits"] if self.has_router_logits else []
        try:
            with safe_open(path, framework="numpy") as file:
                parts = {name: file.get_slice(name) for name in names}
                self._check_shapes(path, entry, parts)
                arrays = {
                    name: part[start:stop] if name in names[:3] else part[:, start:stop]
                    for name, part in parts.items()
                }
        except (SafetensorError, OSError) as error:
            raise MoeLensError(f"{path} is damaged ({error}); {AGAIN}") from error
        _check_places(path, entry, arrays)
        ids = arrays["expert_ids"]
        if ((ids >= self.router_width) & (ids != NO_EXPERT)).any():
            raise MoeLensError(f"{path} is damaged: it names experts that are not; {AGAIN}")
        return Routes(
            layers=self.layers, router_width=self.router_width, texts=self.texts, **arrays
        )

    def _check_shapes(self, path: Path, entry: ShardEntry, parts: dict[str, Any]) -> None:
        per_layer = [len(self.layers), entry.tokens]
        for name, part in parts.items():
            last = {"router_logits": [self.router_width]}.get(name, [self.slots])
            scalar = name in ("token_ids", "prompt", "position")
            expected = [entry.tokens] if scalar else per_layer + last
            if part.get_shape() != expected:
                raise MoeLensError(
                    f"{path} is damaged: {name} has shape {part.get_shape()} where trace.json says "
                    f"{expected}; {AGAIN}"
                )


def _check_places(path: Path, entry: ShardEntry, arrays: dict[str, Any]) -> None:
    kinds = {"token_ids": "i", "prompt": "i", "position": "i", "expert_ids": "u"}
    wrong = [name for name, part in arrays.items() if part.dtype.kind != kinds.get(name, "f")]
    if wrong:
        raise damaged(path, f"{wrong[0]} is {arrays[wrong[0]].dtype}")
    prompts = arrays["prompt"]
    if ((prompts < entry.first_prompt) | (prompts >= entry.stop_prompt)).any():
        raise damaged(path, "it names prompts of other shards")
    if (arrays["token_ids"] < 0).any() or (arrays["position"] < 0).any():
        raise damaged(path, "it has tokens that are none")


def _check_size(path: Path, entry: ShardEntry) -> None:
    if not path.is_file():
        raise MoeLensError(f"{path} is missing from the trace; {AGAIN}")
    size = path.stat().st_size
    if size != entry.bytes:
        raise MoeLensError(
            f"{path} is {'cut short' if size < entry.bytes else 'damaged'}: {size} bytes where "
            f"trace.json says {entry.bytes}; {AGAIN}"
        )
