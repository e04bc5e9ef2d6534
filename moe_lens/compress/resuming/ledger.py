"""The ledger of a run: what it was asked for, what it said, and which weight files are whole.

JSON that a program of yours may read; what is read here is checked, since a name in it leads to a
file.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moe_lens.atomic import write_bytes
from moe_lens.errors import MoeLensError

from .request import Fact, Request

FORMAT = "moe-lens ledger"
VERSION = 1
FILE = "ledger.json"

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,200}\.safetensors")
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class WholeFile:
    """A file that was written to its end and brought to the disk."""

    bytes: int
    sha256: str
    """`fingerprint.sampled_sha256`."""


@dataclass(frozen=True)
class Ledger:
    """What a run has done."""

    request: Request
    notes: tuple[str, ...] = ()
    """What was said until the plan was made; it belongs to the report."""
    packed: int | None = None
    """`unpacked.packed_modules` of the model that was calibrated; None until it was."""
    plan: str | None = None
    """SHA-256 of the plan's file; None until it is made."""
    shards: Mapping[str, WholeFile] = field(default_factory=dict)
    """Weight files by name."""

    def write(self, path: Path) -> None:
        """Write it, whole or not at all.

        Raises:
            DiskError: The disk refuses.
        """
        content = {
            "format": FORMAT,
            "version": VERSION,
            "request": dict(self.request.facts),
            "notes": list(self.notes),
            "packed": self.packed,
            "plan": self.plan,
            "shards": {name: vars(file) for name, file in self.shards.items()},
        }
        write_bytes(path, json.dumps(content, indent=2) + "\n")


def read_ledger(path: Path) -> Ledger:
    """Read what `Ledger.write` wrote.

    Raises:
        MoeLensError: It cannot be read, is no ledger, is damaged, or of another version.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        json.dumps(content, ensure_ascii=False).encode()  # what cannot be shown is no text
    except (OSError, ValueError, RecursionError) as error:
        raise _damaged(path, str(error) or type(error).__name__) from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise _damaged(path, f'"format" must be "{FORMAT}"')
    if content.get("version") != VERSION:
        raise _damaged(
            path, f"it has version {content.get('version')!r}, this moe-lens reads {VERSION}"
        )
    names = ("request", "notes", "packed", "plan", "shards")
    facts, notes, packed, plan, shards = (content.get(name) for name in names)
    if not isinstance(facts, dict) or not all(isinstance(each, Fact) for each in facts.values()):
        raise _damaged(path, '"request" must hold plain values')
    if not isinstance(notes, list) or not all(isinstance(note, str) for note in notes):
        raise _damaged(path, '"notes" must be a list of sentences')
    if packed is not None and not _is_count(packed):
        raise _damaged(path, '"packed" must be a number')
    if plan is not None and not _is_hash(plan):
        raise _damaged(path, '"plan" must be a hash')
    if not isinstance(shards, dict):
        raise _damaged(path, '"shards" must be an object')
    files = {name: _whole_file(path, name, entry) for name, entry in shards.items()}
    return Ledger(Request(facts), tuple(notes), packed, plan, files)


def _whole_file(path: Path, name: str, entry: Any) -> WholeFile:
    if not _NAME.fullmatch(name):
        raise _damaged(path, f"{name[:80]!r} is no name of a weight file")
    known: dict[str, Any] = entry if isinstance(entry, dict) else {}
    size: Any = known.get("bytes")
    sha256: Any = known.get("sha256")
    if not _is_count(size) or not _is_hash(sha256):
        raise _damaged(path, f'{name} needs "bytes" and "sha256"')
    return WholeFile(size, sha256)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_hash(value: Any) -> bool:
    return isinstance(value, str) and bool(_SHA256.fullmatch(value))


def _damaged(path: Path, reason: str) -> MoeLensError:
    return MoeLensError(
        f"{path} is no ledger that can be gone on with ({reason}); leave --resume out to begin anew"
    )
