"""Arrays and what belongs to them as one safetensors file, with JSON in its header.

Nothing in such a file can run code, and it is there whole or not at all.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from moe_lens.atomic import write_bytes
from moe_lens.errors import MoeLensError

_KEY = "moe-lens"

Arrays = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class Kind:
    """What files of one kind hold.

    Attributes:
        format: What stands in the file, so that no other is taken for it.
        version: Which is read; another is refused.
        what: The content in words, for messages: "the statistics".
        remedy: What to do about a file that cannot be read.
    """

    format: str
    version: int
    what: str
    remedy: str


def write_arrays(path: Path, kind: Kind, content: Mapping[str, Any], arrays: Arrays) -> None:
    """Write arrays of any shape, with plain values.

    Raises:
        DiskError: The disk refuses.
    """
    header = {"format": kind.format, "version": kind.version, **content}
    whole = {name: np.ascontiguousarray(value) for name, value in arrays.items()}
    write_bytes(path, save(whole, metadata={_KEY: json.dumps(header)}))


def read_arrays(path: Path, kind: Kind) -> tuple[dict[str, Any], Arrays]:
    """Read what `write_arrays` wrote.

    Raises:
        MoeLensError: The file is damaged, of another kind or of another version.
    """
    try:
        with safe_open(path, framework="numpy") as file:
            content = json.loads((file.metadata() or {}).get(_KEY, "{}"))
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError, RecursionError, TypeError) as error:
        raise MoeLensError(f"{path} is damaged ({error}); {kind.remedy}") from error
    if not isinstance(content, dict) or content.get("format") != kind.format:
        raise MoeLensError(f"{path} holds no {kind.format.removeprefix('moe-lens ')} of moe-lens")
    if content.get("version") != kind.version:
        raise MoeLensError(
            f"{kind.what} {path} have version {content.get('version')!r}, this moe-lens reads "
            f"{kind.version}; {kind.remedy}"
        )
    return content, arrays
