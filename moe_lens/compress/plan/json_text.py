"""JSON that a person can read and any program can parse."""

from __future__ import annotations

import json
import math
import re
from typing import Any

_FLAT_LIST = re.compile(r"\[[^\[\]{}]*\]")


def dump(plain: Any) -> str:
    """Indented JSON, lists of plain values on one line; NaN and infinities become null.

    JSON knows neither; Python would write words that other parsers refuse.
    """
    text = json.dumps(finite(plain), indent=2, allow_nan=False, ensure_ascii=False)
    return _FLAT_LIST.sub(lambda found: re.sub(r"\s*\n\s*", " ", found[0]), text) + "\n"


def finite(value: Any) -> Any:
    """`value` with None for every NaN and infinity in its dicts and lists."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [finite(each) for each in value]
    return value
