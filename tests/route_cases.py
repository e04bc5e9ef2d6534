"""Synthetic routes: random, well-formed, and small enough to count by hand."""

from __future__ import annotations

import numpy as np

from moe_lens.trace import NO_EXPERT, Routes, TokenTexts

WORDS = (
    b" the",
    b"def",
    b"(",
    b"):\n",
    b"    ",
    b"$x$",
    b"\xe4\xbd",
    "你".encode(),
    b"\t",
    b"<a&b>",
)
TEXTS = TokenTexts(dict(enumerate(WORDS)), {10: "<|end|>"})


def random_routes(
    seed: int = 0,
    *,
    layers: tuple[int, ...] = (1, 2, 3),
    width: int = 8,
    k: int = 2,
    lengths: tuple[int, ...] = (5, 0, 7, 1),
    uneven: bool = False,
    logits: bool = False,
    first_prompt: int = 0,
) -> Routes:
    """Routes of prompts of these ``lengths``; ``uneven``: the first layer uses one slot less."""
    random = np.random.default_rng(seed)
    tokens = sum(lengths)
    scores = random.random((len(layers), tokens, width))
    ids = np.argsort(-scores, axis=2)[:, :, :k].astype(np.uint16)
    weights = -np.sort(-random.random((len(layers), tokens, k)), axis=2).astype(np.float16)
    if uneven:
        ids[0, :, -1], weights[0, :, -1] = NO_EXPERT, 0
    places = [np.arange(length) for length in lengths]
    return Routes(
        layers=layers,
        router_width=width,
        token_ids=random.integers(0, len(WORDS), tokens).astype(np.int32),
        prompt=(np.repeat(np.arange(len(lengths)), lengths) + first_prompt).astype(np.int32),
        position=np.concatenate([*places, np.zeros(0)]).astype(np.int32),
        expert_ids=ids,
        expert_weights=weights,
        router_logits=random.normal(size=scores.shape).astype(np.float16) if logits else None,
        texts=TEXTS,
    )
