"""Figures as files: which format a name asks for, and bytes that are the same every time."""

from __future__ import annotations

import io
import os
from collections.abc import Callable
from pathlib import Path

from matplotlib import rc_context
from matplotlib.backends.backend_pdf import PdfPages
from matplotlib.figure import Figure
from PIL import Image

from moe_lens.atomic import replacing
from moe_lens.errors import UsageError

__all__ = ["FORMATS", "picture_format", "write_pages", "write_picture", "write_small"]

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


def write_pages(pages: list[Figure], target: Path, dpi: int) -> None:
    """Write figures, whole or not at all; of several, only a PDF takes all.

    Raises:
        UsageError: As `picture_format`.
        MoeLensError: The file cannot be written.
    """
    kind = picture_format(target)
    with replacing(target) as part:
        if kind == "pdf":
            with PdfPages(part, metadata={"CreationDate": None}) as pdf:
                for page in pages:
                    pdf.savefig(page, facecolor=page.get_facecolor())
            return
        metadata = {"Date": None} if kind == "svg" else None
        with rc_context({"svg.hashsalt": "moe-lens"}):  # else ids in the file are random
            pages[0].savefig(part, format=kind, dpi=dpi, metadata=metadata)


def write_picture(path: str | os.PathLike[str], draw: Callable[[], Figure], dpi: int = 150) -> Path:
    """Draw one figure and write it, whole or not at all; returns where.

    Raises:
        UsageError: As `picture_format`, before anything is drawn; and as `draw`.
        MoeLensError: The file cannot be written.
    """
    target = Path(path).expanduser()
    picture_format(target)
    write_pages([draw()], target, dpi)
    return target


def write_small(page: Figure, target: Path, dpi: int = 100) -> None:
    """Write a PNG of 256 colours, about a third of the bytes: to travel with a checkpoint.

    Raises:
        MoeLensError: The file cannot be written.
    """
    full = io.BytesIO()
    page.savefig(full, format="png", dpi=dpi)
    with replacing(target) as part, Image.open(full) as image:
        few = image.convert("RGB").quantize(256, dither=Image.Dither.NONE)
        few.save(part, format="png", optimize=True)
