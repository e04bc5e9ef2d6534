"""How a packed weight is stored."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Quantisation:
    """How the packed weight of one Linear is stored, as MLX names it."""

    group_size: int
    bits: int
    mode: str

    @classmethod
    def of(cls, module: Any) -> Quantisation | None:
        """That of a module; None where its weight is not packed."""
        if "scales" not in module:
            return None
        return cls(module.group_size, module.bits, getattr(module, "mode", "affine"))
