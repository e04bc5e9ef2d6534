"""Token texts as a person reads them: every space, newline and stray byte visible.

A tokenizer's own pieces are made for machines: byte-level vocabularies write a space as ``Ġ`` and
an umlaut as ``Ã¼``, SentencePiece writes ``▁``, and part of a character decodes to U+FFFD. Here a
token is first taken back to its bytes, which is all it means, and then written so that nothing is
invisible and no two different tokens look the same by accident:

====================  =================================
space                 ``␣`` (four or more: ``␣×8``)
newline               ``↵``
tab                   ``⇥``
carriage return       ``␍``
part of a character   ``<E2>``, one per byte
control, zero-width   ``<U+200B>``
====================  =================================
"""

from __future__ import annotations

import functools
import json
import re
import unicodedata
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

__all__ = ["TokenTexts", "visible"]

_BYTE_PIECE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_MARKS = {" ": "␣", "\n": "↵", "\t": "⇥", "\r": "␍"}
_LONG_RUN = re.compile(r"([␣↵⇥])\1{3,}")
# Bytes that are part of a character whose other bytes lie in a neighbouring token come out of
# decode(errors="surrogateescape") as U+DC80 to U+DCFF.
_ESCAPED_BYTE = range(0xDC80, 0xDD00)


@dataclass(frozen=True)
class TokenTexts:
    """What each token id that occurs in a run means, so that it can be shown without the model.

    Attributes:
        pieces: Bytes of each ordinary token, by id. A token can be a part of a character.
        special: Names of the special tokens, such as ``<|endoftext|>``, by id.
    """

    pieces: Mapping[int, bytes] = field(default_factory=dict)
    special: Mapping[int, str] = field(default_factory=dict)

    @classmethod
    def from_tokenizer(cls, tokenizer: Any, token_ids: Iterable[int]) -> TokenTexts:
        """Look up the distinct ``token_ids`` in a ``transformers`` tokenizer or mlx-lm wrapper."""
        pieces: dict[int, bytes] = {}
        special: dict[int, str] = {}
        added = {int(token_id) for token_id in getattr(tokenizer, "all_special_ids", ())}
        byte_level = _is_byte_level(tokenizer)
        for token_id in sorted({int(token_id) for token_id in token_ids}):
            piece = tokenizer.convert_ids_to_tokens(token_id)
            if token_id in added and isinstance(piece, str):
                special[token_id] = piece
            else:
                pieces[token_id] = _piece_bytes(piece, token_id, tokenizer, byte_level)
        return cls(pieces, special)

    def visible(self, token_id: int) -> str:
        """The token as a person reads it; ``<id 7>`` for an id that the run never met."""
        token_id = int(token_id)
        if token_id in self.special:
            return self.special[token_id]
        if token_id in self.pieces:
            return visible(self.pieces[token_id])
        return f"<id {token_id}>"

    def to_json(self) -> str:
        """JSON: ``text`` by id; ``bytes`` in hex for parts of characters; ``special`` names."""
        text: dict[str, str] = {}
        raw: dict[str, str] = {}
        for token_id, piece in self.pieces.items():
            try:
                text[str(token_id)] = piece.decode()
            except UnicodeDecodeError:
                raw[str(token_id)] = piece.hex()
        special = {str(token_id): name for token_id, name in self.special.items()}
        content = {"text": text, "bytes": raw, "special": special}
        return json.dumps(content, ensure_ascii=False, indent=0) + "\n"

    @classmethod
    def from_json(cls, content: str) -> TokenTexts:
        """Read what `to_json` wrote."""
        data = json.loads(content)
        pieces = {int(token_id): text.encode() for token_id, text in data["text"].items()}
        pieces |= {int(token_id): bytes.fromhex(raw) for token_id, raw in data["bytes"].items()}
        special = {int(token_id): name for token_id, name in data["special"].items()}
        return cls(pieces, special)


def visible(piece: bytes | str) -> str:
    """``piece`` with everything invisible written out; see the table at the top of the module."""
    raw = piece.encode(errors="surrogateescape") if isinstance(piece, str) else piece
    text = raw.decode(errors="surrogateescape")
    shown = "".join(_show(character) for character in text)
    return _LONG_RUN.sub(lambda run: f"{run[1]}×{len(run[0])}", shown)


def _show(character: str) -> str:
    if character in _MARKS:
        return _MARKS[character]
    if ord(character) in _ESCAPED_BYTE:
        return f"<{ord(character) - 0xDC00:02X}>"
    category = unicodedata.category(character)
    if category[0] == "C" or category in ("Zl", "Zp", "Zs"):
        return f"<U+{ord(character):04X}>"
    if category in ("Mn", "Me"):
        return "◌" + character  # a combining mark needs something to stand on
    return character


def _piece_bytes(piece: str | None, token_id: int, tokenizer: Any, byte_level: bool) -> bytes:
    if piece is None:  # padding of the embedding matrix: an id without a token
        return f"<id {token_id}>".encode()
    alphabet = _byte_alphabet()
    if isinstance(piece, bytes):
        return piece
    if byte_level and all(character in alphabet for character in piece):
        return bytes(alphabet[character] for character in piece)
    if match := _BYTE_PIECE.fullmatch(piece):
        return bytes([int(match[1], 16)])
    if "▁" in piece:
        return piece.replace("▁", " ").encode()
    return str(tokenizer.decode([token_id])).encode()


def _is_byte_level(tokenizer: Any) -> bool:
    """Whether pieces are written in the 256-letter alphabet of GPT-2.

    No other kind of vocabulary has all of the letters that stand for the space, the newline and
    the bytes above 0x7F, and one that has them can only be read this way.
    """
    vocabulary: dict[str, int] = getattr(tokenizer, "get_vocab", dict)()
    return all(letter in vocabulary for letter in ("Ġ", "Ċ", "Ã", "ł"))


@functools.lru_cache(maxsize=1)
def _byte_alphabet() -> dict[str, int]:
    """Letter to byte, as in GPT-2's encoder: printable bytes are themselves, the rest follow 256.

    Source: https://github.com/openai/gpt-2/blob/master/src/encoder.py, ``bytes_to_unicode``.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    alphabet = {chr(byte): byte for byte in printable}
    return alphabet | {chr(256 + place): byte for place, byte in enumerate(others)}
