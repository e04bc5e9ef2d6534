"""The token that a person means by a text."""

from __future__ import annotations

from moe_lens.errors import UsageError
from moe_lens.trace import TokenTexts

__all__ = ["token_of"]


def token_of(text: str, texts: TokenTexts) -> int:
    """The id of the token with this text, or with the number in ``id:NUMBER``.

    Args:
        text: As it stands in a prompt, with its spaces; ``↵`` and ``␣`` as they are shown also do.
        texts: The tokens among which to look.

    Raises:
        UsageError: There is no such token; says which is near.
    """
    number = text.removeprefix("id:")
    if number != text and number.isdecimal():
        token_id = int(number)
        if token_id not in texts.pieces and token_id not in texts.special:
            raise UsageError(
                f"there is no token {token_id} among the {_size(texts):,} that are known"
            )
        return token_id
    by_text = {piece: token_id for token_id, piece in texts.pieces.items()}
    by_text |= {name.encode(): token_id for token_id, name in texts.special.items()}
    plain = text.replace("␣", " ").replace("↵", "\n").replace("⇥", "\t").encode()
    if plain in by_text:
        return by_text[plain]
    near = next((each for each in (b" " + plain, plain.strip()) if each in by_text), None)
    hint = "it takes several, or does not occur; give one token, or id:NUMBER"
    if near is not None:
        hint = f"did you mean {near.decode(errors='replace')!r}?"
    raise UsageError(f"no single token has the text {text!r}: {hint}")


def _size(texts: TokenTexts) -> int:
    return len(texts.pieces) + len(texts.special)
