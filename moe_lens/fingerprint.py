"""Hashes that tell whether two runs used the same model and the same tokenizer.

The weights of a model are not read whole for this: their file names, sizes, safetensors headers
and sixteen evenly spaced samples of each file enter the hash. That tells two fine-tunes of the
same shape apart and costs milliseconds for a model of any size.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

__all__ = [
    "canonical_sha256",
    "file_sha256",
    "sampled_sha256",
    "tokenizer_sha256",
    "weights_sha256",
]

SAMPLES = 16
SAMPLE_BYTES = 4096
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)


def canonical_sha256(value: Any) -> str:
    """SHA-256 of a JSON value; the order of keys does not matter."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def tokenizer_sha256(folder: Path) -> str:
    """SHA-256 over the tokenizer files of a model folder."""
    return _files_sha256(folder / name for name in TOKENIZER_FILES)


def weights_sha256(folder: Path) -> str:
    """SHA-256 over names, sizes, headers and samples of the safetensors files of a folder."""
    return _sampled(sorted(folder.glob("*.safetensors")))


def sampled_sha256(path: Path) -> str:
    """SHA-256 over name, size, header and samples of one safetensors file."""
    return _sampled([path])


def _sampled(paths: Iterable[Path]) -> str:
    digest = hashlib.sha256()
    for path in paths:
        size = path.stat().st_size
        digest.update(f"{path.name} {size}\n".encode())
        with path.open("rb") as file:
            header = int.from_bytes(file.read(8), "little")
            digest.update(file.read(min(header, size)))
            for sample in range(SAMPLES):
                file.seek(size * sample // SAMPLES)
                digest.update(file.read(SAMPLE_BYTES))
    return digest.hexdigest()


def _files_sha256(paths: Iterable[Path]) -> str:
    digest = hashlib.sha256()
    for path in paths:
        if path.is_file():
            digest.update(f"{path.name} {file_sha256(path)}\n".encode())
    return digest.hexdigest()
