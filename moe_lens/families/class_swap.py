"""Another ``__call__`` for single instances of a module, and the way back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.nn as nn


def call_original(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Call `module` as mlx-lm wrote it, whether or not its class is swapped at the moment."""
    original = getattr(type(module), "_moe_lens_original", type(module))
    return original.__call__(module, *args, **kwargs)


class ClassSwaps:
    """The modules whose class stands swapped."""

    def __init__(self) -> None:
        self._swapped: list[tuple[nn.Module, type]] = []

    def __bool__(self) -> bool:
        return bool(self._swapped)

    def swap(self, module: nn.Module, call: Callable[..., Any]) -> None:
        """Give this one instance another ``__call__``, leaving the module tree as it is."""
        base = type(module)
        original = getattr(base, "_moe_lens_original", base)
        module.__class__ = type(
            base.__name__,
            (base,),
            {"__call__": call, "_moe_lens_original": original, "__module__": base.__module__},
        )
        self._swapped.append((module, base))

    def undo(self) -> None:
        """Put every class back, the last one first."""
        while self._swapped:
            module, base = self._swapped.pop()
            module.__class__ = base  # type: ignore[assignment]
