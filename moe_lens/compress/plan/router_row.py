"""A router row that a plan brings with it, as text that gives the same bits again."""

from __future__ import annotations

import base64
import binascii
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moe_lens.errors import UsageError


@dataclass(frozen=True)
class RouterRow:
    """The row of one new expert in the router's projection, and the numbers beside it.

    `weight` is float32, little-endian, in base64: exact, and a third of the length of decimal
    numbers. `bias` is there where the projection has one, `selection_bias` where the router
    corrects its selection.
    """

    weight: str
    bias: float | None = None
    selection_bias: float | None = None

    @classmethod
    def of(
        cls,
        row: NDArray[np.float64],
        bias: float | None = None,
        selection_bias: float | None = None,
    ) -> RouterRow:
        """Take a row [hidden], rounded to float32."""
        return cls(base64.b64encode(row.astype("<f4").tobytes()).decode(), bias, selection_bias)

    def values(self) -> NDArray[np.float32]:
        """[hidden] float32.

        Raises:
            UsageError: The text is no base64 of float32 numbers, or one of them is not finite.
        """
        try:
            raw = base64.b64decode(self.weight, validate=True)
            found = np.frombuffer(raw, "<f4").astype(np.float32)
        except (binascii.Error, ValueError) as error:
            raise UsageError(f"it is no base64 of float32 numbers ({error})") from error
        if not np.isfinite(found).all():
            raise UsageError("it holds NaN or infinity")
        return found

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        plain: dict[str, Any] = {"weight": self.weight}
        for name in ("bias", "selection_bias"):
            if getattr(self, name) is not None:
                plain[name] = getattr(self, name)
        return plain

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> RouterRow:
        """Read what `to_dict` wrote.

        Raises:
            UsageError: Something is missing, or no number.
        """
        weight = content.get("weight")
        if not isinstance(weight, str):
            raise UsageError('it has no "weight"')
        numbers = {}
        for name in ("bias", "selection_bias"):
            value = content.get(name)
            if value is not None and (
                isinstance(value, bool) or not isinstance(value, int | float)
            ):
                raise UsageError(f'its "{name}" is no number')
            numbers[name] = None if value is None else float(value)
        row = cls(weight, **numbers)
        row.values()
        return row
