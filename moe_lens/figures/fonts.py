"""Token texts that a picture can really show.

Matplotlib draws an empty box where no font has a character, and every such box looks the same. So
a token is drawn with whatever installed fonts cover it, and a character that none of them has is
written as its code point, ``<U+4F60>``.
"""

from __future__ import annotations

from functools import lru_cache

from matplotlib import font_manager
from matplotlib.ft2font import FT2Font

__all__ = ["drawable", "token_families"]

# Ships with matplotlib; has ␣ ↵ ⇥ and the Latin, Greek and Cyrillic letters.
MONOSPACE = "DejaVu Sans Mono"
# Looked for on the machine, in this order, for the scripts that DejaVu lacks.
FALLBACKS = (
    "Noto Sans Mono CJK SC",
    "Noto Sans CJK SC",
    "Noto Sans CJK JP",
    "Hiragino Sans GB",
    "PingFang SC",
    "Arial Unicode MS",
    "WenQuanYi Zen Hei",
    "DejaVu Sans",
    "Noto Sans",
)


@lru_cache(maxsize=1)
def token_families() -> tuple[str, ...]:
    """Font families for token texts: monospace first, then what the machine has."""
    installed = set(font_manager.get_font_names())
    return (MONOSPACE, *(name for name in FALLBACKS if name in installed))


def drawable(text: str, longest: int = 18) -> str:
    """``text`` with characters no font has written out, and cut with an ellipsis if too long."""
    known = _characters()
    shown = "".join(c if ord(c) in known else f"<U+{ord(c):04X}>" for c in text)
    return shown if len(shown) <= longest else shown[: longest - 1] + "…"


@lru_cache(maxsize=1)
def _characters() -> frozenset[int]:
    """Code points that the families of `token_families` cover together."""
    covered: set[int] = set()
    for family in token_families():
        covered.update(FT2Font(font_manager.findfont(family)).get_charmap())
    return frozenset(covered)
