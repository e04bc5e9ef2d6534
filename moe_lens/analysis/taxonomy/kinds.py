"""Kinds of token that an expert can be named after, from its text and its neighbours.

Every token is in one class of each of three partitions: what it is (`token_classes`), where it
stands in code or markup, and where in its prompt. A kind is a union of classes of one partition,
so that all kinds come out of three tables of counts.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moe_lens.trace import Routes

from .token_classes import CLASSES, SCRIPTS, TokenTable

__all__ = ["COLUMNS", "KINDS", "Kind", "columns", "membership"]

START = 8
"""Tokens at the beginning of a prompt that are its start."""

_WORDS = ("lower case", "capitalised", "upper case", "single letter")
# Pieces of words are a class of their own for each case, since they are told by their neighbour.
_WHAT = (*CLASSES, *(f"{case}, inside a word" for case in _WORDS))
_WHERE = ("anywhere", "indentation", "tag", "key", "string")
_PLACE = ("first token", "start", "middle", "end")

COLUMNS = (*_WHAT, *_WHERE, *_PLACE)
"""The classes of the three partitions, one after the other."""

PARTITIONS = (len(_WHAT), len(_WHERE), len(_PLACE))


@dataclass(frozen=True)
class Kind:
    """A kind of token.

    Attributes:
        name: What a person calls it.
        definition: Which tokens are of the kind.
        role: Role of an expert that takes it: ``syntax``, ``positional`` or, for scripts,
            ``specialist``.
        classes: The classes that it unites, of one partition.
    """

    name: str
    definition: str
    role: str
    classes: tuple[str, ...]


def _syntax(name: str, definition: str, *classes: str) -> Kind:
    return Kind(name, definition, "syntax", classes or (name,))


KINDS: tuple[Kind, ...] = (
    _syntax("special tokens", "named special by the tokenizer", "special"),
    _syntax("parts of characters", "bytes that are no whole character", "part of a character"),
    _syntax("newlines", "whitespace with a newline", "newline"),
    _syntax("spaces", "whitespace without a newline"),
    _syntax("whitespace", "nothing but whitespace", "newline", "spaces"),
    _syntax("digits", "mostly digits"),
    _syntax("words", "letters that begin a Latin word", *_WORDS),
    _syntax(
        "single letters",
        "one Latin letter",
        "single letter",
        "single letter, inside a word",
    ),
    _syntax(
        "word pieces",
        "Latin letters right after a letter: they go on with a word",
        *(f"{case}, inside a word" for case in _WORDS),
    ),
    _syntax(
        "capitalised words", "begin a Latin word, the first letter is a capital", "capitalised"
    ),
    _syntax(
        "upper case",
        "two or more Latin letters, all capitals",
        "upper case",
        "upper case, inside a word",
    ),
    _syntax("opening brackets", "mostly ( [ {", "opening bracket"),
    _syntax("closing brackets", "mostly ) ] }", "closing bracket"),
    _syntax("brackets", "mostly ( [ { } ] )", "opening bracket", "closing bracket"),
    _syntax("quotes", "mostly quotation marks", "quote"),
    _syntax("punctuation", "mostly . , ; : ! ? and dashes"),
    _syntax("operators", "mostly + - * / = < > | & ^ % ~", "operator"),
    _syntax("symbols", "mostly other signs", "symbol"),
    *(
        Kind(name, f"mostly letters of the script {name}", "specialist", (name,))
        for name in SCRIPTS
    ),
    _syntax("indentation", "whitespace at the beginning of a line"),
    _syntax("tags", "from < of an HTML or XML tag to before its >", "tag"),
    _syntax("JSON keys", "in double quotes that a colon follows", "key"),
    _syntax("quoted text", "in double quotes on one line, no key", "string"),
    Kind("first token", "position 0 of the prompt", "positional", ("first token",)),
    Kind(
        "start of the prompt",
        f"the first {START} tokens of the prompt",
        "positional",
        ("first token", "start"),
    ),
    Kind("end of the prompt", "the last quarter of the prompt", "positional", ("end",)),
)
"""All kinds, in the order in which they win where two fit alike."""


def membership() -> NDArray[np.float64]:
    """[kinds, columns] 1 where a kind unites a class."""
    table = np.zeros((len(KINDS), len(COLUMNS)))
    for row, kind in enumerate(KINDS):
        table[row, [COLUMNS.index(name) for name in kind.classes]] = 1.0
    return table


def columns(routes: Routes, table: TokenTable) -> NDArray[np.int64]:
    """[3, tokens] place in `COLUMNS` of each token's class, in each of the three partitions.

    Args:
        routes: Whole prompts.
        table: Properties of their token ids.
    """
    first, second, _ = PARTITIONS
    found = np.stack([_what(routes, table), _where(routes, table), _place(routes)])
    return found + np.array([[0], [first], [first + second]])


def _what(routes: Routes, table: TokenTable) -> NDArray[np.int64]:
    ids = table.rows(routes.token_ids)
    found = table.kind[ids].astype(np.int64)
    inside = np.zeros(len(ids), dtype=bool)
    inside[1:] = table.joins[ids[1:]] & table.ends_in_letter[ids[:-1]] & _together(routes)
    lower = CLASSES.index(_WORDS[0])
    word = (found >= lower) & (found < lower + len(_WORDS))
    return np.where(word & inside, found - lower + len(CLASSES), found)


def _where(routes: Routes, table: TokenTable) -> NDArray[np.int64]:
    """Later lines win: what is indentation is no string."""
    ids = table.rows(routes.token_ids)
    found = np.zeros(len(ids), dtype=np.int64)
    inside, key = _strings(routes, table)
    found[inside] = _WHERE.index("string")
    found[inside & key] = _WHERE.index("key")
    found[_tags(routes, table)] = _WHERE.index("tag")
    begins = np.ones(len(ids), dtype=bool)
    begins[1:] = table.ends_in_newline[ids[:-1]] | ~_together(routes)
    spaces = table.kind[ids] == CLASSES.index("spaces")
    found[(spaces & begins) | table.indents[ids]] = _WHERE.index("indentation")
    return found


def _strings(routes: Routes, table: TokenTable) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Tokens between double quotes of one line, and whether a colon follows the closing one."""
    ids, count = table.rows(routes.token_ids), len(routes)
    quotes = table.quotes[ids].astype(np.int64)
    before = np.cumsum(quotes) - quotes
    # A line or a prompt begins outside of quotes, whatever came before.
    resets = np.ones(count, dtype=bool)
    resets[1:] = table.has_newline[ids[:-1]] | ~_together(routes)
    start = np.maximum.accumulate(np.where(resets, np.arange(count), 0))
    inside = ((before - before[start]) % 2 == 1) & (quotes == 0) & ~table.has_newline[ids]
    closes = np.where(quotes > 0, np.arange(count), count)
    closing = np.minimum.accumulate(closes[::-1])[::-1]
    ends_key = table.closes_key[ids].copy()
    ends_key[:-1] |= table.colon[ids[1:]] & (quotes[:-1] > 0)
    return inside, np.append(ends_key, False)[closing]


def _tags(routes: Routes, table: TokenTable) -> NDArray[np.bool_]:
    ids, count = table.rows(routes.token_ids), len(routes)
    angle = table.angle[ids].copy()
    maybe = angle == 2
    goes_on = np.zeros(count, dtype=bool)
    goes_on[:-1] = table.tag_goes_on[ids[1:]] & _together(routes)
    angle[maybe] = np.where(goes_on[maybe], 1, 0)
    begins = np.ones(count, dtype=bool)
    begins[1:] = ~_together(routes)
    last = np.maximum.accumulate(np.where((angle != 0) | begins, np.arange(count), 0))
    return angle[last] == 1


def _place(routes: Routes) -> NDArray[np.int64]:
    position = routes.position
    begins = np.flatnonzero(np.append(True, ~_together(routes)))
    sizes = np.diff(np.append(begins, len(routes)))
    length = np.repeat(sizes, sizes)
    found = np.full(len(routes), _PLACE.index("middle"))
    found[position >= length - length // 4] = _PLACE.index("end")
    found[position < START] = _PLACE.index("start")
    found[position == 0] = _PLACE.index("first token")
    return found


def _together(routes: Routes) -> NDArray[np.bool_]:
    """[tokens - 1] whether a token and the next one are of the same prompt."""
    return routes.prompt[1:] == routes.prompt[:-1]
