"""The shape that a JSON value must have before a program relies on it."""

from __future__ import annotations

from typing import Any

__all__ = ["NUMBER", "fits"]

NUMBER = float
"""In a shape: a finite number, whole or not."""


def fits(value: Any, shape: Any) -> bool:
    """Whether a JSON value has this shape.

        fits({"name": "a", "sizes": [1, 2]}, {"name": str, "sizes": [int]})

    Args:
        value: Anything that JSON can hold.
        shape: A type, alternatives (a tuple), the shape of each entry (a list of one), or those of
            some keys (an object; ``*`` stands for every key).
    """
    if isinstance(shape, tuple):
        return any(fits(value, each) for each in shape)
    if isinstance(shape, list):
        return isinstance(value, list) and all(fits(each, shape[0]) for each in value)
    if isinstance(shape, dict):
        if not isinstance(value, dict):
            return False
        if "*" in shape:
            return all(fits(each, shape["*"]) for each in value.values())
        return all(key in value and fits(value[key], each) for key, each in shape.items())
    if shape is NUMBER:
        return type(value) in (int, float) and abs(value) < 1e300
    return type(value) is shape
