"""Colours shared by the terminal and the pictures.

The scale runs evenly in lightness, so it survives colour blindness and grey printing. The colours
that tell expert ids apart cannot all be distinct to everyone: the id is always written, too.
"""

from __future__ import annotations

import colorsys
from functools import lru_cache

__all__ = ["RGB", "contrast", "hex_color", "readable_on", "scale_color", "tag_color"]

RGB = tuple[int, int, int]

BLACK: RGB = (0, 0, 0)
WHITE: RGB = (255, 255, 255)

# Nine evenly spaced colours of matplotlib's viridis (CC0), without importing matplotlib.
_VIRIDIS: tuple[RGB, ...] = (
    (68, 1, 84),
    (71, 45, 123),
    (59, 82, 139),
    (44, 114, 142),
    (33, 145, 140),
    (39, 173, 129),
    (92, 200, 99),
    (170, 220, 50),
    (253, 231, 37),
)
_GOLDEN = 0.618034


def scale_color(share: float) -> RGB:
    """The colour of a number between 0 and 1: dark violet, blue, green, yellow."""
    place = min(max(share, 0.0), 1.0) * (len(_VIRIDIS) - 1)
    low = min(int(place), len(_VIRIDIS) - 2)
    part = place - low
    one, two = _VIRIDIS[low], _VIRIDIS[low + 1]
    red, green, blue = (round(a + (b - a) * part) for a, b in zip(one, two, strict=True))
    return red, green, blue


@lru_cache(maxsize=4096)
def tag_color(number: int) -> RGB:
    """A colour for an expert id: neighbouring ids differ in hue, and in lightness."""
    hue = (number * _GOLDEN) % 1.0
    lightness = (0.38, 0.62, 0.80)[number % 3]
    red, green, blue = colorsys.hls_to_rgb(hue, lightness, 0.55)
    return round(red * 255), round(green * 255), round(blue * 255)


def readable_on(background: RGB) -> RGB:
    """Black or white, whichever has the higher contrast. It is at least 4.58 to 1."""
    return max((BLACK, WHITE), key=lambda ink: contrast(ink, background))


def contrast(one: RGB, two: RGB) -> float:
    """Contrast ratio of two colours, 1 to 21 (WCAG 2.1)."""
    light, dark = sorted((_luminance(one), _luminance(two)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def hex_color(color: RGB) -> str:
    """``#rrggbb``."""
    return "#{:02x}{:02x}{:02x}".format(*color)


def _luminance(color: RGB) -> float:
    """Relative luminance of sRGB, as WCAG 2.1 defines it."""
    linear = [
        part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4
        for part in (channel / 255 for channel in color)
    ]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
