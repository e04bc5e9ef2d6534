"""Two generations beside each other, and where they part."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from . import screen
from .quantities import some

if TYPE_CHECKING:
    from rich.text import Text

    from moe_lens import Generation

_WIDE = 100
_MARK = "▸"


@dataclass(frozen=True)
class Pair:
    """The usual text and the changed one, of the same prompt."""

    baseline: Generation
    changed: Generation
    tokenizer: Any
    change: str

    @cached_property
    def place(self) -> int | None:
        """The number of tokens both begin with; None if they are the same throughout."""
        one, two = self.baseline.token_ids, self.changed.token_ids
        if one == two:
            return None
        pairs = zip(one, two, strict=False)
        return next((n for n, (a, b) in enumerate(pairs) if a != b), min(len(one), len(two)))

    def to_dict(self) -> dict[str, Any]:
        """Both generations, and the first token that differs (null if none does)."""
        return {
            "baseline": self.baseline.to_dict(),
            "changed": self.changed.to_dict(),
            "first_difference": self.place
            if self.place is None
            else {
                "token": self.place,
                "baseline": self._token(self.baseline),
                "changed": self._token(self.changed),
            },
        }

    def show(self) -> None:
        """Side by side where the terminal is wide enough, one below the other elsewhere."""
        titles = ("usual routing", self.change)
        texts = (self._marked(self.baseline), self._marked(self.changed))
        if _WIDE <= screen.out().width < screen.UNLIMITED:
            screen.show(_columns(titles, texts))
        else:
            screen.show(*_rows(titles, texts))
        screen.show("", self._sentence())

    def _sentence(self) -> str:
        if self.place is None:
            return f"The same text: all {some(len(self.baseline.token_ids), 'token')} agree."
        one, two = (self._name(each) for each in (self.baseline, self.changed))
        return (
            f"They part after {some(self.place, 'token')} ({_MARK}): {one} with the usual routing, "
            f"{two} with {self.change}."
        )

    def _token(self, made: Generation) -> dict[str, Any] | None:
        """The first differing token of one side; None if that side ended there."""
        assert self.place is not None
        if self.place >= len(made.token_ids):
            return None
        token = made.token_ids[self.place]
        return {"id": token, "text": self.tokenizer.decode([token])}

    def _name(self, made: Generation) -> str:
        from moe_lens.trace import TokenTexts

        found = self._token(made)
        if found is None:
            return "the end"
        return TokenTexts.from_tokenizer(self.tokenizer, [found["id"]]).visible(found["id"])

    @cached_property
    def _same(self) -> int:
        """How many characters both texts begin with, counted in whole shared tokens."""
        shared = self.tokenizer.decode(list(self.baseline.token_ids[: self.place]))
        texts = (shared.rstrip("\ufffd"), self.baseline.text, self.changed.text)
        letters = enumerate(zip(*texts, strict=False))
        return next((n for n, each in letters if len(set(each)) > 1), min(map(len, texts)))

    def _marked(self, made: Generation) -> Text:
        """The text with the mark before, and the first differing token in bold."""
        from rich.text import Text

        written = screen.printable(made.text)
        if self.place is None:
            return Text(written)
        upto = self.tokenizer.decode(list(made.token_ids[: self.place + 1]))
        end = max(len(upto.rstrip("\ufffd")), self._same)
        return Text.assemble(
            written[: self._same],
            (_MARK, "bold magenta"),
            (written[self._same : end], "bold underline magenta"),
            written[end:],
        )


def _columns(titles: tuple[str, str], texts: tuple[Text, Text]) -> Any:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(
        box=SIMPLE_HEAD, expand=True, pad_edge=False, show_edge=False, header_style="bold"
    )
    for title in titles:
        table.add_column(title, ratio=1, overflow="fold")
    table.add_row(*texts)
    return table


def _rows(titles: tuple[str, str], texts: tuple[Text, Text]) -> list[Any]:
    from rich.text import Text

    parts: list[Any] = []
    for title, text in zip(titles, texts, strict=True):
        parts += [Text(f"--- {title} ---", style="bold"), text]
    return parts
