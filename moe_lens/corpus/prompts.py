"""Prompts to run a model on, read from what people have lying around.

    corpus = read_corpus("prompts.jsonl")            # or prompts.txt, a folder, "demo"
    corpus = corpus.sample(200, seed=0)              # the same 200 on every machine
    tokens = corpus.tokenize(tokenizer, sequence_length=512)

Four forms are read, all of them UTF-8 text:

* a text file: one prompt per line, blank lines are separators;
* JSONL (``.jsonl`` or ``.ndjson``): one object per line with ``text``, ``prompt`` or
  ``messages`` (looked for in this order) and optionally ``label``;
* a folder: every text file in it is one prompt, the sub-folder it lies in is its label, hidden
  files are left out;
* ``"demo"``, the bundled calibration text, and ``"demo:evaluation"``, the bundled held-out text.

The prompts of a corpus are held in memory; what a model makes of them never is.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from moe_lens.errors import MoeLensError, UsageError

__all__ = ["Corpus", "Prompt"]


@dataclass(frozen=True)
class Prompt:
    """One prompt: plain ``text`` or chat ``messages``, and the ``label`` of its kind, if any."""

    text: str | None
    messages: tuple[dict[str, Any], ...] | None = None
    label: str | None = None

    @property
    def sha256(self) -> str:
        """Hash of the text or messages, so that a trace can say which prompt it saw."""
        return hashlib.sha256(self._canonical().encode()).hexdigest()

    def _canonical(self) -> str:
        content = self.text if self.messages is None else list(self.messages)
        return json.dumps(content, sort_keys=True, ensure_ascii=True)


@dataclass(frozen=True)
class Corpus:
    """Prompts in a fixed order, with the name they were read under.

    Attributes:
        name: What the user called it: a path or ``"demo"``.
        prompts: The prompts, in file order (folders: sorted by path).
        notes: What reading left out or changed, one sentence each, for the user to see.
    """

    name: str
    prompts: tuple[Prompt, ...]
    notes: tuple[str, ...] = field(default=(), compare=False)

    def __len__(self) -> int:
        return len(self.prompts)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over every prompt and label in order; the name does not enter."""
        digest = hashlib.sha256()
        for prompt in self.prompts:
            digest.update(f"{prompt.sha256} {json.dumps(prompt.label)}\n".encode())
        return digest.hexdigest()

    @property
    def labels(self) -> tuple[str, ...]:
        """The distinct labels, sorted. Empty when no prompt has one."""
        return tuple(sorted({p.label for p in self.prompts if p.label is not None}))

    def sample(self, size: int, seed: int = 0) -> Corpus:
        """A random subset of ``size`` prompts, kept in their order.

        Which prompts are drawn depends only on ``seed``, ``size`` and the number of prompts: a
        hash decides, not a random generator whose stream could change between library versions.
        Asking for more prompts than there are gives all of them.

        Raises:
            UsageError: ``size`` is below 1.
        """
        if size < 1:
            raise UsageError(f"the sample size is {size}; it must be at least 1")
        if size >= len(self.prompts):
            return self
        drawn = sorted(range(len(self.prompts)), key=lambda index: _draw(seed, index))[:size]
        kept = tuple(self.prompts[index] for index in sorted(drawn))
        note = f"{size} of {len(self.prompts)} prompts of {self.name} drawn with seed {seed}."
        return replace(self, prompts=kept, notes=(*self.notes, note))

    def tokenize(
        self,
        tokenizer: Any,
        sequence_length: int | None = None,
        chat_template: bool = False,
    ) -> list[list[int]]:
        """Token ids of every prompt, aligned with `prompts`.

        Plain text is encoded as ``mlx_lm.generate`` does: with the tokenizer's own special tokens,
        unless the text already starts with the beginning-of-sequence token. ``messages`` always
        go through the chat template, plain text does with ``chat_template`` (as one user message).
        The opening of an answer is added where the last message is not the assistant's.

        Args:
            tokenizer: A ``transformers`` tokenizer or mlx-lm's wrapper around one.
            sequence_length: Longer prompts are cut after this many tokens.
            chat_template: Render plain text through the chat template too.

        Returns:
            One list per prompt. A prompt that has no tokens gives an empty list; it is not left
            out, so that the caller can count it.

        Raises:
            UsageError: ``sequence_length`` is below 1, or the chat template that is needed is not
                there.
            MoeLensError: The chat template refuses a prompt.
        """
        if sequence_length is not None and sequence_length < 1:
            raise UsageError(f"the sequence length is {sequence_length}; it must be at least 1")
        tokens = []
        for number, prompt in enumerate(self.prompts, start=1):
            ids = _encode(prompt, number, tokenizer, chat_template)
            tokens.append(ids[:sequence_length])
        return tokens


def _draw(seed: int, index: int) -> bytes:
    return hashlib.sha256(f"{seed}:{index}".encode()).digest()


def _encode(prompt: Prompt, number: int, tokenizer: Any, chat_template: bool) -> list[int]:
    if prompt.messages is not None or chat_template:
        return _encode_chat(prompt, number, tokenizer)
    text = prompt.text or ""
    start = getattr(tokenizer, "bos_token", None)
    add_special = start is None or not text.startswith(start)
    return [int(i) for i in tokenizer.encode(text, add_special_tokens=add_special)]


def _encode_chat(prompt: Prompt, number: int, tokenizer: Any) -> list[int]:
    if not _has_chat_template(tokenizer):
        raise UsageError(
            f"prompt {number} must go through a chat template, but the tokenizer of this model "
            "has none; give plain `text` instead of `messages` and leave the chat template off"
        )
    messages: Iterable[dict[str, Any]]
    messages = prompt.messages or ({"role": "user", "content": prompt.text or ""},)
    messages = [dict(message) for message in messages]
    try:
        ids = tokenizer.apply_chat_template(
            messages, add_generation_prompt=messages[-1].get("role") != "assistant"
        )
    except Exception as error:  # a template is a program of the model's author: anything can come
        raise MoeLensError(
            f"the chat template of this model refuses prompt {number} ({error}); correct its "
            "messages or give plain `text`"
        ) from error
    if hasattr(ids, "keys"):  # a bare transformers tokenizer answers with a dictionary
        ids = ids["input_ids"]
    return [int(i) for i in ids]


def _has_chat_template(tokenizer: Any) -> bool:
    if hasattr(tokenizer, "has_chat_template"):
        return bool(tokenizer.has_chat_template)
    return getattr(tokenizer, "chat_template", None) is not None
