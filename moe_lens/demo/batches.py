"""Tokens, training windows and held-out prompts.

A domain becomes one long array of token ids, documents separated by the end-of-text token, plus
the positions at which a line starts. Windows and prompts begin at such positions, because that is
where a person's prompt begins too.
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from moe_lens.demo.domains import DOMAINS, SHARES, SPLITS, Corpus, Split
from moe_lens.demo.tokenizer import END_OF_TEXT_ID

PROMPTS_PER_DOMAIN = 32
PROMPT_TOKENS = (144, 240)
"""Shortest and longest held-out prompt, in tokens."""

NATURAL = ("prose", "code")
"""Domains whose documents quote each other, so that a split of the documents is not enough."""

QUOTATION = 80
"""A held-out prompt that shares this many characters in a row with another split is not used."""

TOKENIZER_SAMPLE = 400_000
"""Characters per domain that the tokenizer is trained on."""


@dataclass(frozen=True)
class Stream:
    """One domain as tokens: ``tokens`` of shape (n,), ``starts`` the positions of line starts."""

    tokens: NDArray[np.int32]
    starts: NDArray[np.int64]


def tokenizer_sample(corpus: Corpus, seed: int) -> list[str]:
    """Training documents of all domains, about equally many characters of each."""
    sample: list[str] = []
    for domain in DOMAINS:
        texts = list(corpus.texts(domain, "train"))
        random.Random(f"tokenizer {seed} {domain}").shuffle(texts)
        size = 0
        for text in texts:
            if size >= TOKENIZER_SAMPLE:
                break
            sample.append(text[: TOKENIZER_SAMPLE - size])
            size += len(text)
    return sample


def tokenise(texts: list[str], tokenizer: Tokenizer) -> Stream:
    """Concatenate documents to one stream, each followed by the end-of-text token."""
    breaks = np.array(["Ċ" in token for token in _tokens_by_id(tokenizer)])  # "Ċ" stands for \n
    breaks[END_OF_TEXT_ID] = True
    ids: list[int] = []
    for encoding in tokenizer.encode_batch(texts):
        ids.extend(encoding.ids)
        ids.append(END_OF_TEXT_ID)
    tokens = np.array(ids, dtype=np.int32)
    starts = np.concatenate([[0], np.flatnonzero(breaks[tokens[:-1]]) + 1])
    return Stream(tokens, starts.astype(np.int64))


def _tokens_by_id(tokenizer: Tokenizer) -> list[str]:
    size = tokenizer.get_vocab_size()
    return [tokenizer.id_to_token(index) or "" for index in range(size)]


def save_streams(streams: dict[str, Stream], path: Path) -> None:
    """Store the streams in one ``.npz`` file, so that every worker process reads the same."""
    arrays: dict[str, NDArray[np.generic]] = {}
    for domain, stream in streams.items():
        arrays[f"{domain}.tokens"] = stream.tokens
        arrays[f"{domain}.starts"] = stream.starts
    np.savez(path, allow_pickle=False, **arrays)


def load_streams(path: Path) -> dict[str, Stream]:
    """Read what :func:`save_streams` wrote."""
    with np.load(path, allow_pickle=False) as arrays:
        return {
            domain: Stream(arrays[f"{domain}.tokens"], arrays[f"{domain}.starts"])
            for domain in DOMAINS
        }


class Sampler:
    """Draws batches of single-domain windows in which every domain has its fixed share.

    Counts are drawn by systematic sampling (one random offset against the cumulated shares):
    right on average and never off by more than one window, so the loss is less noisy than with
    independent draws.
    """

    def __init__(self, streams: dict[str, Stream], seed: int) -> None:
        """Sample from ``streams``; each process has a seed of its own."""
        self._streams = streams
        self._random = np.random.default_rng(seed)

    def batch(self, rows: int, length: int) -> NDArray[np.int32]:
        """Windows of ``length + 1`` tokens (inputs and shifted targets), shape (rows, length+1)."""
        edges = np.cumsum([SHARES[domain] for domain in DOMAINS])
        points = (np.arange(rows) + self._random.random()) / rows
        chosen = np.searchsorted(edges / edges[-1], points, side="right")
        return np.stack([self._window(DOMAINS[index], length) for index in chosen])

    def _window(self, domain: str, length: int) -> NDArray[np.int32]:
        stream = self._streams[domain]
        usable = np.searchsorted(stream.starts, len(stream.tokens) - length - 1)
        start = stream.starts[self._random.integers(usable)]
        return stream.tokens[start : start + length + 1]


def held_out_prompts(
    corpus: Corpus, split: Split, tokenizer: Tokenizer, seed: int
) -> list[dict[str, str]]:
    """Prompts of one held-out split, ``{"text", "label"}``, PROMPTS_PER_DOMAIN of each domain.

    A prompt is a stretch of one document from a line start on; prompts never overlap, and none
    stands in the text of another split. Every round takes one stretch per document, so that as
    many documents as possible are present.
    """
    prompts: list[dict[str, str]] = []
    for domain in DOMAINS:
        source = random.Random(f"prompts {seed} {split} {domain}")
        others = [
            text for other in SPLITS if other != split for text in corpus.texts(domain, other)
        ]
        elsewhere = "\0".join(others)
        streams = [tokenise([text], tokenizer) for text in corpus.texts(domain, split)]
        source.shuffle(streams)
        offsets = [0] * len(streams)
        found: list[str] = []
        progress = True
        while len(found) < PROMPTS_PER_DOMAIN and progress:
            progress = False
            for number, stream in enumerate(streams):
                length = source.randint(*PROMPT_TOKENS)
                later = stream.starts[stream.starts >= offsets[number]]
                if not len(later) or len(found) == PROMPTS_PER_DOMAIN:
                    continue
                start = int(later[0])
                ids = stream.tokens[start : start + length].tolist()
                if ids and ids[-1] == END_OF_TEXT_ID:
                    ids.pop()
                offsets[number] = start + length
                progress = True
                text = tokenizer.decode(ids)
                if len(ids) >= PROMPT_TOKENS[0] and not _quotes(text, elsewhere, domain):
                    found.append(text)
        if len(found) < PROMPTS_PER_DOMAIN:
            raise ValueError(f"only {len(found)} {split} prompts of the domain {domain}")
        prompts.extend({"text": text, "label": domain} for text in found)
    return prompts


def _quotes(text: str, elsewhere: str, domain: str) -> bool:
    """Whether a prompt stands in another split's text, as a whole or, in natural text, in part."""
    if domain not in NATURAL:
        # Markup repeats its frame everywhere; what must be new there is the text as a whole.
        return text in elsewhere
    starts = range(0, max(1, len(text) - QUOTATION), QUOTATION // 4)
    return any(text[start : start + QUOTATION] in elsewhere for start in starts)


def save_prompts(prompts: list[dict[str, str]], path: Path) -> None:
    """Write prompts as JSON lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(prompt, ensure_ascii=False) for prompt in prompts]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def load_prompts(path: Path) -> list[dict[str, str]]:
    """Read prompts as JSON lines."""
    with path.open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines if line.strip()]
