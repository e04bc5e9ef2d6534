"""Values that belong to objects which cannot be compared, such as rules that hold arrays."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

Value = TypeVar("Value")


class IdentityCache(Generic[Value]):
    """Remembers what was made for the very same objects.

    The objects are held, so that none that comes later can have the id of one that went.

    Args:
        most: How many values are kept; the one asked for least recently goes first.
    """

    def __init__(self, most: int = 512) -> None:
        self.most = most
        self._kept: OrderedDict[tuple[Hashable, ...], tuple[tuple[object, ...], Value]]
        self._kept = OrderedDict()

    def get(
        self, objects: tuple[object, ...], values: tuple[Hashable, ...], make: Callable[[], Value]
    ) -> Value:
        """What `make` gave for these `objects`, by identity, and these `values`, by equality."""
        key = (*map(id, objects), *values)
        found = self._kept.get(key)
        if found is None:
            found = self._kept[key] = (objects, make())
            if len(self._kept) > self.most:
                self._kept.popitem(last=False)
        else:
            self._kept.move_to_end(key)
        return found[1]
