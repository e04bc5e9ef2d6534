"""config.json of a model folder, as far as it can be judged before a model is built from it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from moe_lens.errors import MoeLensError

__all__ = ["check_counts", "read_config"]

_COUNT = re.compile(r"(?:num|n)(?:_\w+)?_(?:layers?|experts?|blocks?|heads?|layer)(?:_\w+)?")
"""Keys that say how many modules are built: ``num_hidden_layers``, ``n_routed_experts``."""

_MOST = 1 << 16
"""More than any model has of anything that is counted; building so many would take hours."""


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a model folder.

    Raises:
        MoeLensError: If it is missing, not JSON, or names no model type.
    """
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise MoeLensError(f"{folder} has no config.json") from error
    except OSError as error:
        raise MoeLensError(f"{path} cannot be read: {error.strerror or error}") from error
    except RecursionError as error:
        raise MoeLensError(f"{path} is nested too deeply to be a model config") from error
    except ValueError as error:
        raise MoeLensError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        raise MoeLensError(f"{path} names no model_type, so it is no model config")
    return config


def check_counts(folder: Path, config: dict[str, Any], tensors: int) -> None:
    """Refuse a config that asks for more layers or experts than there can be.

    An architecture is built module by module before its weights are compared with it, so a
    nonsense number would keep the machine busy for hours or fill its memory.

    Args:
        folder: For the message.
        config: What config.json says.
        tensors: How many the weight files hold; every layer has at least one.

    Raises:
        MoeLensError: Naming the key.
    """
    for key, value in _numbers(config):
        if not _COUNT.fullmatch(key):
            continue
        most = tensors if "layer" in key else _MOST
        if value > most:
            raise MoeLensError(
                f"{folder / 'config.json'} says {key} = {value:.6g}, but the weight files hold "
                f"{tensors} tensors: config and weights are of different models, download both "
                "again"
            )


def _numbers(part: Any) -> Iterator[tuple[str, float]]:
    """Every number of a config with its key, wherever it is nested."""
    if isinstance(part, dict):
        for key, value in part.items():
            if isinstance(value, int | float) and not isinstance(value, bool):
                yield key, value
            else:
                yield from _numbers(value)
    elif isinstance(part, list):
        for value in part:
            yield from _numbers(value)
