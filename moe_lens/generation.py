"""Text from a model: prompts to tokens, mlx-lm's generator, and the finished answer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import mlx.nn as nn

from .errors import UsageError

if TYPE_CHECKING:
    from mlx_lm.generate import GenerationResponse


@dataclass(frozen=True)
class Generation:
    """A finished generation.

    Attributes:
        text: What the model wrote, without the prompt.
        token_ids: Its tokens, the one that ended it included.
        prompt_token_ids: The tokens of the prompt.
        finish_reason: ``"stop"`` (an end token) or ``"length"``.
        prompt_tps: Tokens of the prompt read per second.
        generation_tps: Tokens written per second.
    """

    text: str
    token_ids: tuple[int, ...]
    prompt_token_ids: tuple[int, ...]
    finish_reason: str
    prompt_tps: float
    generation_tps: float

    def __str__(self) -> str:
        return self.text

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def collect(cls, prompt: Sequence[int], responses: Iterator[GenerationResponse]) -> Generation:
        """Run a stream to its end."""
        pieces = list(responses)
        last = pieces[-1]
        return cls(
            text="".join(each.text for each in pieces),
            token_ids=tuple(int(each.token) for each in pieces),
            prompt_token_ids=tuple(prompt),
            finish_reason=str(last.finish_reason),
            prompt_tps=float(last.prompt_tps),
            generation_tps=float(last.generation_tps),
        )


def encode_prompt(tokenizer: Any, prompt: str | Sequence[int], *, chat: bool = False) -> list[int]:
    """Token ids of a prompt; with `chat`, of the chat template with it as the user's message.

    Raises:
        UsageError: If `chat` is asked of a tokenizer without a template, or nothing is left.
    """
    if not isinstance(prompt, str):
        tokens = [int(token) for token in prompt]
    elif chat:
        if not tokenizer.has_chat_template:
            raise UsageError("the tokenizer has no chat template: give the prompt as it is")
        messages = [{"role": "user", "content": prompt}]
        tokens = list(tokenizer.apply_chat_template(messages, add_generation_prompt=True))
    else:
        bos = tokenizer.bos_token
        add_special = bos is None or not prompt.startswith(bos)
        tokens = list(tokenizer.encode(prompt, add_special_tokens=add_special))
    if not tokens:
        raise UsageError("the prompt is empty: give at least one token")
    return tokens


def stream_tokens(
    model: nn.Module,
    tokenizer: Any,
    prompt: Sequence[int],
    *,
    max_tokens: int = 256,
    temp: float = 0.0,
    top_p: float = 1.0,
    seed: int | None = None,
    **options: Any,
) -> Iterator[GenerationResponse]:
    """``mlx_lm.stream_generate`` with the sampler that `temp` and `top_p` ask for.

    Raises:
        UsageError: For numbers out of range.
    """
    from mlx_lm import stream_generate
    from mlx_lm.sample_utils import make_sampler

    if max_tokens == 0 or max_tokens < -1:
        raise UsageError("max_tokens must be at least 1 (or -1 for no limit)")
    if not temp >= 0 or not 0 <= top_p <= 1:
        raise UsageError("temp must not be negative, and top_p must be from 0 to 1")
    if seed is not None:
        mx.random.seed(seed)
    options.setdefault("sampler", make_sampler(temp=temp, top_p=top_p))
    yield from stream_generate(model, tokenizer, list(prompt), max_tokens=max_tokens, **options)
