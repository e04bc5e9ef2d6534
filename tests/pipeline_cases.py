"""Routes whose ways through the layers are known."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from moe_lens.trace import Routes
from route_cases import random_routes

CHAIN = (5, 2, 7)
"""The experts that label a's tokens take, one in each of three layers."""


def planted(
    seed: int = 0, *, chance: float = 0.8, prompts: int = 36, length: int = 40, width: int = 8
) -> tuple[Routes, list[str]]:
    """Random routes of labels a, b and c, k = 2; a's tokens take `CHAIN` first with `chance`."""
    routes = random_routes(seed, layers=(1, 2, 4), width=width, lengths=(length,) * prompts)
    labels = ["abc"[place % 3] for place in range(prompts)]
    taken = np.random.default_rng(seed + 1).random(len(routes)) < chance
    taken &= np.array([label == "a" for label in labels])[routes.prompt]
    ids = routes.expert_ids.copy()
    for layer, expert in enumerate(CHAIN):
        # Where it is the second choice already, the two change places.
        second = taken & (ids[layer, :, 1] == expert)
        ids[layer, second, 1] = ids[layer, second, 0]
        ids[layer, taken, 0] = expert
    return replace(routes, expert_ids=ids), labels


def alike_in_a_prompt(seed: int, *, prompts: int = 30, length: int = 40) -> tuple[Routes, list]:
    """Each prompt prefers experts of its own, whatever its label: no label has a chain."""
    routes = random_routes(seed, layers=(0, 1, 2), width=8, lengths=(length,) * prompts)
    random = np.random.default_rng(seed)
    liking = random.gumbel(size=(3, len(routes), 8))
    liking += random.normal(scale=1.0, size=(3, prompts, 8))[:, routes.prompt]
    ids = np.argsort(-liking, axis=2)[:, :, :2].astype(np.uint16)
    labels = random.permutation([place % 3 for place in range(prompts)])
    return replace(routes, expert_ids=ids), ["abc"[each] for each in labels]
