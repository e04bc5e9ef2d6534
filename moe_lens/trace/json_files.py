"""The JSON files of a trace: read, and checked before arrays are read by what they say."""

from __future__ import annotations

import json
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

from moe_lens.errors import MoeLensError, UsageError
from moe_lens.json_shape import fits

from .tokens import TokenTexts

FORMAT = "moe-lens trace"
VERSION = 1
AGAIN = "record the trace again, or copy it again from where it came"

_HASH = re.compile(r"[0-9a-f]{64}")
_FILE = re.compile(r"shard-\d{5,9}\.safetensors")
_LARGEST = 1 << 40

_SHARD = {
    "file": str,
    "first_prompt": int,
    "stop_prompt": int,
    "tokens": int,
    "bytes": int,
    "sha256": str,
}
_BEGUN = {
    "complete": bool,
    "model": {"name": str},
    "layers": [int],
    "num_experts": int,
    "router_width": int,
    "corpus": {"name": str, "fingerprint": str, "tokens_sha256": str, "notes": [str]},
    "settings": {"router_logits": bool},
    "versions": {"mlx": str, "mlx_lm": str, "device": str},
    "shards": [_SHARD],
}
_PROMPTS = {"labels": [(str, type(None))], "sha256": [str], "tokens": [int]}


def read_header(folder: Path) -> dict[str, Any]:
    """``trace.json`` of a folder, after checking that it is one this version can read.

    Raises:
        UsageError: There is no trace in the folder.
        MoeLensError: It is damaged or of another version.
    """
    path = folder / "trace.json"
    if not path.is_file():
        raise UsageError(
            f"there is no trace in {folder}; record one with moe-lens trace MODEL --data FILE "
            f"--output {folder}"
        )
    header = read_json(path)
    if header.get("format") != FORMAT:
        raise MoeLensError(f"{path} does not describe a moe-lens trace; give a trace folder")
    if header.get("version") != VERSION:
        raise MoeLensError(
            f"the trace {folder} has format version {header.get('version')}, this moe-lens reads "
            f"version {VERSION}; use the moe-lens that wrote it, or record it again"
        )
    if wrong := _wrong_header(header):
        raise damaged(path, wrong)
    return header


def read_texts(path: Path) -> TokenTexts:
    """``tokens.json``; MoeLensError if it is missing or damaged."""
    content = _read_text(path)
    try:
        return TokenTexts.from_json(content)
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise damaged(path, "it holds no texts of tokens") from error


def damaged(path: Path, reason: str) -> MoeLensError:
    """The refusal of a file whose content cannot be right."""
    return MoeLensError(f"{path} is damaged ({reason}); {AGAIN}")


def read_json(path: Path) -> dict[str, Any]:
    """The object that a JSON file holds; MoeLensError if it is missing or damaged."""
    try:
        content = json.loads(_read_text(path))
        json.dumps(content, ensure_ascii=False).encode()  # half a character is no text
    except (ValueError, RecursionError) as error:
        raise damaged(path, str(error)) from error
    if not isinstance(content, dict):
        raise damaged(path, "it holds no JSON object")
    return content


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise MoeLensError(f"{path} is missing from the trace; {AGAIN}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise MoeLensError(f"{path} cannot be read ({error}); {AGAIN}") from error


def _wrong_header(header: dict[str, Any]) -> str | None:
    """What is wrong with ``trace.json``, of a complete trace or of one that is being recorded."""
    for name, shape in _BEGUN.items():
        if not fits(header.get(name), shape):
            return f'its "{name}" is missing or of the wrong kind'
    layers, slots = header["layers"], header.get("slots")
    if not layers or min(layers) < 0 or any(a >= b for a, b in pairwise(layers)):
        return 'its "layers" do not ascend'
    if not 0 < header["router_width"] < _LARGEST:
        return "it has no possible number of experts"
    if header["complete"] and (type(slots) is not int or not 0 < slots <= header["router_width"]):
        return "it has no possible number of slots"
    stop = 0
    for entry in header["shards"]:
        if set(entry) != set(_SHARD) or not _FILE.fullmatch(entry["file"]):
            return "it names a shard that is none"
        sizes = (entry["tokens"], entry["bytes"])
        if not all(0 < size < _LARGEST for size in sizes) or not _HASH.fullmatch(entry["sha256"]):
            return f"it says of {entry['file']} what cannot be"
        if not stop == entry["first_prompt"] < entry["stop_prompt"]:
            return "its shards do not follow one another"
        stop = entry["stop_prompt"]
    return None


def wrong_prompts(prompts: dict[str, Any], header: dict[str, Any]) -> str | None:
    """What is wrong with ``prompts.json`` of a complete trace."""
    for name, shape in _PROMPTS.items():
        if not fits(prompts.get(name), shape):
            return f'its "{name}" are missing or of the wrong kind'
    sizes = prompts["tokens"]
    if len({len(prompts[name]) for name in _PROMPTS}) > 1:
        return "it has not one label, hash and length for each prompt"
    if not all(0 <= size < _LARGEST for size in sizes):
        return "a prompt has no possible length"
    shards = header["shards"]
    if not shards or shards[-1]["stop_prompt"] != len(sizes):
        return f"it has {len(sizes)} prompts, trace.json another number"
    for entry in shards:
        if sum(sizes[entry["first_prompt"] : entry["stop_prompt"]]) != entry["tokens"]:
            return f"its prompts have not the tokens of {entry['file']}"
    return None
