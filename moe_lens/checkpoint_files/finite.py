"""Whether stored numbers are numbers: NaN and infinity found in the bytes of a tensor.

The bytes are at hand while a tensor is written, and looking at their exponents costs a tenth of
copying them.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np

from .folder import stored_tensors
from .header import StoredTensor

__all__ = ["damaged_tensor", "is_finite"]

_EXPONENTS: dict[str, tuple[type[np.unsignedinteger], int]] = {
    "F16": (np.uint16, 0x7C00),
    "BF16": (np.uint16, 0x7F80),
    "F32": (np.uint32, 0x7F800000),
}
"""The unsigned type of the same width, and all bits of the exponent, which NaN and infinity set."""

_PIECE = 1 << 19
"""Numbers looked at together: they and what is made of them fit into a cache."""

_READ_BYTES = 32 << 20


def is_finite(name: str, dtype: str, data: bytes | memoryview) -> bool:
    """Whether a tensor, or a part of it, holds neither NaN nor infinity.

    Args:
        name: ``....scales`` of bytes are the scales of a floating-point quantisation.
        dtype: As safetensors calls it; whole numbers are always finite.
        data: Its bytes.
    """
    if dtype == "U8" and name.endswith(".scales"):
        # 255 is the NaN of E8M0, and one of E4M3.
        return bool(np.frombuffer(data, np.uint8).max(initial=0) < 255)
    if dtype not in _EXPONENTS:
        return True
    kind, exponent = _EXPONENTS[dtype]
    numbers = np.frombuffer(data, kind)
    shifted = np.empty(min(_PIECE, len(numbers)), kind)
    for start in range(0, len(numbers), _PIECE):
        part = numbers[start : start + _PIECE]
        # Without its sign, a number is finite if it is below the smallest with that exponent.
        if np.left_shift(part, 1, out=shifted[: len(part)]).max() >= 2 * exponent:
            return False
    return True


def damaged_tensor(folder: Path) -> StoredTensor | None:
    """The first tensor in the weight files that holds NaN or infinity; reads all of them."""
    return next((each for each in stored_tensors(folder).values() if not _all_finite(each)), None)


def _all_finite(tensor: StoredTensor) -> bool:
    return all(is_finite(tensor.name, tensor.dtype, part) for part in _parts(tensor))


def _parts(tensor: StoredTensor) -> Iterable[bytes]:
    with tensor.file.open("rb") as file:
        file.seek(tensor.start)
        left = tensor.size
        while left > 0:
            part = file.read(min(left, _READ_BYTES))
            if not part:
                return
            left -= len(part)
            yield part
