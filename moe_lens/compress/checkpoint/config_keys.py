"""Finding and changing numbers in config.json, wherever a wrapper keeps them."""

from __future__ import annotations

from typing import Any

NESTED = ("text_config", "ffn_config", "llm_config", "language_config")
"""Where wrappers keep the config of the language model."""


def parts(config: dict[str, Any]) -> list[dict[str, Any]]:
    """The config itself, and the configs of the language model inside it."""
    found = [config]
    for key in NESTED:
        if isinstance(config.get(key), dict):
            found += parts(config[key])
    return found


def change_number(config: dict[str, Any], keys: set[str], old: int, new: int) -> set[str]:
    """Replace `old` by `new` under any of `keys`, also in lists with one number for each layer.

    Returns:
        The keys that held `old`.
    """
    changed = set()
    for part in parts(config):
        for key in keys & set(part):
            value = part[key]
            if type(value) is int and value == old:
                part[key] = new
            elif isinstance(value, list) and old in value:
                part[key] = [new if item == old else item for item in value]
            else:
                continue
            changed.add(key)
    return changed


def places_of(config: dict[str, Any], keys: set[str], number: int) -> list[tuple[str, ...]]:
    """Where `config` says `number` under any of `keys`: the keys that lead there."""
    found: list[tuple[str, ...]] = [
        (key,)
        for key in sorted(keys & set(config))
        if config[key] == number or (isinstance(config[key], list) and number in config[key])
    ]
    for outer in NESTED:
        if isinstance(config.get(outer), dict):
            found += [(outer, *place) for place in places_of(config[outer], keys, number)]
    return found
