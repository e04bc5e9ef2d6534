"""Loading a model and reading a prompt, for the commands."""

from __future__ import annotations

import sys
from contextlib import nullcontext
from typing import TYPE_CHECKING

from moe_lens.errors import UsageError

from .progress import working

if TYPE_CHECKING:
    from moe_lens import ExpertRouter


def load(
    model: str,
    trust_remote_code: bool = False,
    kernel: str | None = None,
    stream: bool | None = None,
    *,
    spinner: bool = True,
) -> ExpertRouter:
    """The model; while it loads, a spinner on stderr, unless a stage of the command tells of it."""
    with working(f"loading {model}") if spinner else nullcontext():
        from moe_lens import ExpertRouter

        return ExpertRouter.from_pretrained(
            model, trust_remote_code=trust_remote_code, kernel=kernel, stream=stream
        )


def read_prompt(prompt: str) -> str:
    """The prompt; ``-`` reads stdin, without the newline that ends its last line.

    Raises:
        UsageError: If it is empty, or stdin is not UTF-8 text.
    """
    if prompt == "-":
        try:
            prompt = sys.stdin.buffer.read().decode("utf-8").removesuffix("\n")
        except UnicodeDecodeError as error:
            raise UsageError(f"the prompt on stdin is not UTF-8 text ({error})") from error
    if not prompt:
        raise UsageError("the prompt is empty: give some text")
    return prompt
