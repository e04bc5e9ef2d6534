"""The two texts of a compression: one to calibrate on, another to measure the loss on."""

from __future__ import annotations

from pathlib import Path

from moe_lens.corpus import Corpus, read_corpus

_BUNDLED = {"calibration": ("demo", "--data"), "evaluation": ("demo:evaluation", "--eval-data")}
"""What comes with moe-lens for each purpose, and the option that names another text."""


def bundled(name: str) -> bool:
    """Whether this is the name of a text that comes with moe-lens."""
    return name in [text for text, _ in _BUNDLED.values()]


def read_text(purpose: str, given: Corpus | str | Path | None) -> Corpus:
    """The text for ``calibration`` or ``evaluation``: what was given, or else the bundled one."""
    return read_corpus(_BUNDLED[purpose][0] if given is None else given)


def bundled_note(model: str | Path, purposes: list[str]) -> str | None:
    """What a user should know of bundled text that serves these purposes; None: none does."""
    if not purposes:
        return None
    note = f"{' and '.join(purposes)} on the text that comes with moe-lens"
    if str(model) != "demo":
        options = " and ".join(_BUNDLED[purpose][1] for purpose in purposes)
        note += (
            "; it is small and may not resemble what your model is for: give your own with "
            f"{options}"
        )
    return note
