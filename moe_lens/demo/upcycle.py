"""Doubling the experts of a trained model without changing its function.

Sparse upcycling (arXiv:2212.05055) from experts to experts: every expert becomes two copies that
differ by a little noise, and each token takes two experts instead of one. The softmax over twice
the rows gives each copy half of the original's probability, and since the copies score alike, a
token that chose the original now chooses both: p/2 x y + p/2 x y = p x y. The result is a model of
which one knows, and not only believes, which experts are redundant.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

import mlx.core as mx

from moe_lens.demo.network import DENSE_LAYERS, LAYERS, Weights

Pairs = dict[int, list[tuple[int, int]]]
"""Per layer the pairs of expert ids that come from one original, smaller id first."""

_PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


def draw_pairs(experts: int, seed: int) -> Pairs:
    """Where the copies of each original go: shuffled ids, so that neighbours mean nothing.

    ``pairs[layer][original]`` holds the two ids among ``2 x experts``.
    """
    pairs: Pairs = {}
    for layer in range(LAYERS):
        if layer in DENSE_LAYERS:
            continue
        ids = list(range(2 * experts))
        random.Random(f"pairs {seed} {layer}").shuffle(ids)
        pairs[layer] = [
            (min(ids[2 * number : 2 * number + 2]), max(ids[2 * number : 2 * number + 2]))
            for number in range(experts)
        ]
    return pairs


def _routed_names(layer: int) -> tuple[str, list[str]]:
    """Names of the router's and of the experts' weights of a layer."""
    prefix = f"model.layers.{layer}.mlp"
    return f"{prefix}.gate.weight", [f"{prefix}.switch_mlp.{n}.weight" for n in _PROJECTIONS]


def split_experts(
    weights: Weights, pairs: Pairs, expert_noise: float, router_noise: float, seed: int
) -> Weights:
    """Replace each expert by its two copies; noise is relative to each tensor's own spread.

    The two copies get opposite noise, so that their mean is exactly the original.
    """
    key = mx.random.key(seed)
    result = dict(weights)
    for layer, members in pairs.items():
        router, projections = _routed_names(layer)
        first = mx.array([pair[0] for pair in members])
        second = mx.array([pair[1] for pair in members])
        for name in [router, *projections]:
            original = weights[name]
            key, here = mx.random.split(key)
            amount = router_noise if name == router else expert_noise
            noise = mx.random.normal(original.shape, key=here) * (amount * mx.std(original))
            doubled = mx.zeros((2 * original.shape[0], *original.shape[1:]))
            doubled[first] = original + noise
            doubled[second] = original - noise
            result[name] = doubled
    mx.eval(result)
    return result


def merge_pairs(weights: Weights, pairs: Pairs) -> Weights:
    """The reverse: each pair becomes one expert, the mean of the weights and router rows."""
    result = dict(weights)
    for layer, members in pairs.items():
        router, projections = _routed_names(layer)
        first = mx.array([pair[0] for pair in members])
        second = mx.array([pair[1] for pair in members])
        for name in [router, *projections]:
            result[name] = (weights[name][first] + weights[name][second]) / 2
    return result


def save_pairs(pairs: Pairs, path: Path) -> None:
    """Write ``upcycling.json``: layer -> list of pairs."""
    content = {"pairs": {str(layer): [list(pair) for pair in pairs[layer]] for layer in pairs}}
    path.write_text(json.dumps(content) + "\n", encoding="utf-8")


def load_pairs(path: Path) -> Pairs:
    """Read ``upcycling.json``."""
    content = json.loads(path.read_text(encoding="utf-8"))
    return {
        int(layer): [(int(pair[0]), int(pair[1])) for pair in members]
        for layer, members in content["pairs"].items()
    }
