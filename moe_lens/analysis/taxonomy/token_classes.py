"""What a token is, read from its text alone: one class for each token id.

Classes exclude each other, so that counts by class are one table; the kinds that experts are named
after (`kinds`) are unions of them.
"""

from __future__ import annotations

import functools
import unicodedata
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moe_lens.trace.tokens import TokenTexts

__all__ = ["CLASSES", "SCRIPTS", "TokenTable", "class_of"]

SCRIPTS = (
    "Cyrillic", "Greek", "Han", "Japanese kana", "Hangul", "Arabic", "Hebrew", "Devanagari",
    "Thai", "other script",
)  # fmt: skip
"""Scripts that are told apart, other than Latin."""

# How Unicode's names of letters begin, and what they are here.
_SCRIPT_OF = {
    "LATIN": "Latin",
    "FULLWIDTH": "Latin",
    "CYRILLIC": "Cyrillic",
    "GREEK": "Greek",
    "CJK": "Han",
    "HIRAGANA": "Japanese kana",
    "KATAKANA": "Japanese kana",
    "HANGUL": "Hangul",
    "ARABIC": "Arabic",
    "HEBREW": "Hebrew",
    "DEVANAGARI": "Devanagari",
    "THAI": "Thai",
}

CLASSES = (
    "special", "part of a character", "newline", "spaces", "digits", "lower case", "capitalised",
    "upper case", "single letter", *SCRIPTS, "opening bracket", "closing bracket", "quote",
    "punctuation", "operator", "symbol",
)  # fmt: skip
"""The classes, in the order of their numbers."""

_NUMBER = {name: place for place, name in enumerate(CLASSES)}
_QUOTES = "\"'`´‘’“”„‚«»‹›"
_PUNCTUATION = ".,;:!?…–—·。、，；：！？¿¡"
_OPERATORS = "+-*/=<>|&^%~×÷±≤≥≠→←"


@dataclass(frozen=True, eq=False)
class TokenTable:
    """Properties of token ids, as arrays that are indexed by id: [highest id + 2].

    Ids without a text are symbols; the last place stands for all that are higher.

    Attributes:
        kind: uint8, place in `CLASSES`.
        joins: bool, the first character is a letter: after a letter it goes on with a word.
        ends_in_letter: bool, the last character is a letter.
        ends_in_newline: bool, a newline comes last, spaces after it left out.
        has_newline: bool.
        indents: bool, whitespace only and a newline with spaces after it.
        quotes: uint8, double quotes in it.
        closes_key: bool, a double quote with a colon right after it.
        colon: bool, begins with a colon.
        angle: int8, the last of its angle brackets: 1 opens a tag, -1 closes, 0 none; 2 opens one
            if the next token goes on with a letter, ``/`` or ``!``.
        tag_goes_on: bool, begins with a letter, ``/`` or ``!``.
    """

    kind: NDArray[np.uint8]
    joins: NDArray[np.bool_]
    ends_in_letter: NDArray[np.bool_]
    ends_in_newline: NDArray[np.bool_]
    has_newline: NDArray[np.bool_]
    indents: NDArray[np.bool_]
    quotes: NDArray[np.uint8]
    closes_key: NDArray[np.bool_]
    colon: NDArray[np.bool_]
    angle: NDArray[np.int8]
    tag_goes_on: NDArray[np.bool_]

    @classmethod
    def of(cls, texts: TokenTexts) -> TokenTable:
        """The table of all token ids that occur in a run."""
        size = max([*texts.pieces, *texts.special, 0]) + 2
        table = cls(
            kind=np.full(size, _NUMBER["symbol"], dtype=np.uint8),
            quotes=np.zeros(size, dtype=np.uint8),
            angle=np.zeros(size, dtype=np.int8),
            **{
                name: np.zeros(size, dtype=bool)
                for name in (
                    *("joins", "ends_in_letter", "ends_in_newline", "has_newline", "indents"),
                    *("closes_key", "colon", "tag_goes_on"),
                )
            },
        )
        for token_id in texts.special:
            table.kind[token_id] = _NUMBER["special"]
        for token_id, piece in texts.pieces.items():
            table._fill(token_id, piece)
        return table

    def rows(self, token_ids: NDArray[np.integer]) -> NDArray[np.integer]:
        """Where the table has these ids."""
        return np.minimum(token_ids, len(self.kind) - 1)

    def _fill(self, place: int, piece: bytes) -> None:
        self.kind[place] = _NUMBER[class_of(piece)]
        text = piece.decode(errors="replace")
        if not text:
            return
        self.joins[place] = text[0].isalpha()
        self.ends_in_letter[place] = text[-1].isalpha()
        self.ends_in_newline[place] = text.rstrip(" \t").endswith("\n")
        self.has_newline[place] = "\n" in text
        self.indents[place] = text.isspace() and "\n" in text and text[-1] in " \t"
        self.quotes[place] = min(text.count('"'), 255)
        self.closes_key[place] = '":' in text
        self.colon[place] = text.startswith(":")
        self.tag_goes_on[place] = _tag_goes_on(text[0])
        last = max(text.rfind("<"), text.rfind(">"))
        if last >= 0 and text[last] == ">":
            self.angle[place] = -1
        elif last == len(text) - 1 and last >= 0:
            self.angle[place] = 2
        elif last >= 0 and _tag_goes_on(text[last + 1]):
            self.angle[place] = 1


def class_of(piece: bytes) -> str:
    """The class of an ordinary token: that of most of its characters, spaces left out.

    Where two are equally frequent, the one that comes first in the token.
    """
    try:
        text = piece.decode()
    except UnicodeDecodeError:
        return "part of a character"
    if not text.strip():
        return "newline" if "\n" in text else "spaces"
    found: dict[str, int] = {}
    for character in text:
        if not character.isspace():
            name = _class_of_character(character)
            found[name] = found.get(name, 0) + 1
    most = max(found, key=lambda name: found[name])
    return _case(text) if most == "Latin" else most


def _case(text: str) -> str:
    """``The`` is capitalised, ``HTTP`` upper, ``getName`` lower case; ``x`` is a single letter."""
    letters = [character for character in text if character.isalpha()]
    if len(letters) == 1:
        return "single letter"
    if not letters[0].isupper():
        return "lower case"
    return "upper case" if all(letter.isupper() for letter in letters) else "capitalised"


@functools.cache
def _class_of_character(character: str) -> str:
    category = unicodedata.category(character)
    if category[0] == "N":
        return "digits"
    if category[0] in "LM":
        return _SCRIPT_OF.get(unicodedata.name(character, "").split(" ")[0], "other script")
    if character in _QUOTES:
        return "quote"
    if character in _PUNCTUATION:
        return "punctuation"
    if character in _OPERATORS:
        return "operator"
    return {"Ps": "opening bracket", "Pe": "closing bracket"}.get(category, "symbol")


def _tag_goes_on(character: str) -> bool:
    return character.isalpha() or character in "/!"
