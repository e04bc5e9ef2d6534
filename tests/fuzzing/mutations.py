"""Hypothesis strategies that damage JSON values and bytes: each draws a list of small steps."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from hypothesis import strategies as st

_NUMBERS = [0, -1, 1, 2, 7, 255, 2**16, 2**31 - 1, 2**31, 2**63, -(2**63), 10**18, 10**400]
_REALS = [0.0, -0.0, 0.5, 1e-300, 1e308, -1e308, float("nan"), float("inf"), float("-inf")]
_TEXTS = ["", " ", ".", "..", "../x", "/etc/passwd", "a/b", "a\0b", "\ud800", "\n", "\x1b[2J", "é"]
_TEXTS += ["x" * 5000, "nan", "1", "affine", "mxfp4", "true", "__proto__", "${HOME}", "~"]
_SHAPES = [[], {}, [[]], [{}], {"a": {}}, [0], [None], ["a"], [1, 2, 3], {"": 0}, [[[[[]]]]]]

junk = st.one_of(
    st.sampled_from(_NUMBERS),
    st.sampled_from(_REALS),
    st.sampled_from(_TEXTS),
    st.sampled_from(_SHAPES),
    st.sampled_from([None, True, False]),
    st.integers(-5, 300),
    st.floats(),
)
"""Values that have no business where they are put."""

_HOWS = ["replace", "replace", "replace", "delete", "add", "twice", "scale", "swap"]


@dataclass(frozen=True)
class JsonStep:
    """One change of a JSON value, at the place that `where` counts out."""

    where: int
    how: str
    value: Any

    def apply(self, content: Any) -> Any:
        """Change `content`, in place where that can be."""
        places = list(_places(content))
        if not places:
            return self.value
        holder, key = places[self.where % len(places)]
        if self.how == "replace":
            holder[key] = copy.deepcopy(self.value)
        elif self.how == "delete":
            del holder[key]
        elif self.how == "add":
            if isinstance(holder, dict):
                holder[str(self.value)[:50]] = copy.deepcopy(holder[key])
            else:
                holder.insert(key, copy.deepcopy(self.value))
        elif self.how == "twice" and isinstance(holder, list):
            holder.insert(key, copy.deepcopy(holder[key]))
        elif self.how == "scale" and type(holder[key]) in (int, float):
            holder[key] = holder[key] * 2 + 1
        else:
            other, there = places[(self.where // 7) % len(places)]
            holder[key] = copy.deepcopy(other[there])
        return content


def _places(content: Any) -> Iterator[tuple[Any, Any]]:
    """(container, key) of everything inside a JSON value."""
    keys: Any = ()
    if isinstance(content, dict):
        keys = list(content)
    elif isinstance(content, list):
        keys = range(len(content))
    for key in keys:
        yield content, key
        yield from _places(content[key])


json_steps = st.lists(
    st.builds(JsonStep, st.integers(0, 10**6), st.sampled_from(_HOWS), junk),
    min_size=1,
    max_size=3,
)


def changed_json(text: str, steps: list[JsonStep]) -> str:
    """The JSON `text` after the steps."""
    content = json.loads(text)
    for step in steps:
        content = step.apply(content)
    return json.dumps(content)


@dataclass(frozen=True)
class ByteStep:
    """One change of some bytes, at the place that `where` counts out."""

    where: int
    how: str
    data: bytes

    def apply(self, content: bytes) -> bytes:
        """The changed bytes."""
        at = self.where % (len(content) + 1)
        size = len(self.data)
        if self.how == "insert":
            return content[:at] + self.data + content[at:]
        if self.how == "overwrite":
            return content[:at] + self.data + content[at + size :]
        if self.how == "delete":
            return content[:at] + content[at + size :]
        if self.how == "cut":
            return content[:at]
        flipped = bytes([content[at] ^ (1 << size % 8)]) if at < len(content) else b""
        return content[:at] + flipped + content[at + 1 :]


def byte_steps(reach: int) -> st.SearchStrategy[list[ByteStep]]:
    """Steps within the first `reach` bytes, where formats say what they hold, or anywhere."""
    where = st.one_of(st.integers(0, 16), st.integers(0, reach), st.integers(0, 10**9))
    how = st.sampled_from(["insert", "overwrite", "delete", "cut", "flip"])
    step = st.builds(ByteStep, where, how, st.binary(min_size=1, max_size=12))
    return st.lists(step, min_size=1, max_size=3)


def changed_bytes(content: bytes, steps: list[ByteStep]) -> bytes:
    """`content` after the steps."""
    for step in steps:
        content = step.apply(content)
    return content
