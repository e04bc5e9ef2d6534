"""Figures as files: which format a name asks for, and bytes that are the same every time."""

from __future__ import annotations

import io
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.backends.backend_pdf import PdfPages
from matplotlib.figure import Figure
from PIL import Image

from moe_lens.atomic import replacing

from .formats import picture_format

__all__ = ["save_picture", "write_pages", "write_picture", "write_small"]


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


def save_picture(
    draw: Callable[..., Figure],
    result: Any,
    path: str | os.PathLike[str],
    *,
    dpi: int = 150,
    **options: Any,
) -> Path:
    """Draw the picture of a result and write it, whole or not at all.

        save_picture(draw_domains, domains(trace), "domains.png", style="dark", subtitle="demo")

    Args:
        draw: The ``draw_...`` of the result.
        result: What is drawn.
        path: File to write; its ending chooses the format: ``.png``, ``.svg`` or ``.pdf``.
        dpi: Dots per inch of a PNG; 150 gives 1920 pixels of width.
        options: Handed to `draw`: ``style`` (``"light"`` or ``"dark"``), ``subtitle`` (put after
            the title, such as the name of the model) and what else it takes.

    Returns:
        The path written.

    Raises:
        UsageError: As `picture_format`, before anything is drawn; and as `draw`.
        MoeLensError: The file cannot be written.
    """
    return write_picture(path, lambda: draw(result, **options), dpi)


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
