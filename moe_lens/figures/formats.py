"""Which format the name of a picture asks for. Imports nothing that draws."""

from __future__ import annotations

import os
from pathlib import Path

from moe_lens.errors import UsageError

__all__ = ["FORMATS", "picture_format"]

FORMATS = ("png", "svg", "pdf")


def picture_format(path: str | os.PathLike[str]) -> str:
    """One of `FORMATS`, from the ending of the name.

    Raises:
        UsageError: Pictures are not written in that format.
    """
    target = Path(path)
    kind = target.suffix.lower().removeprefix(".")
    if kind not in FORMATS:
        raise UsageError(
            f"pictures are written as {', '.join(FORMATS)}, not {target.suffix or 'no ending'!r}; "
            f"name the file {target.stem}.png"
        )
    return kind
