"""Measurements of the demo model for its card, all on mlx_lm's own forward pass.

The functions expect float weights: a quantised model is dequantised first, which leaves its
function as it is and makes long prompts several times faster on a CPU.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models.activations import swiglu
from mlx_lm.models.qwen3_moe import Model, Qwen3MoeSparseMoeBlock
from numpy.typing import NDArray

from moe_lens.demo import generated, network
from moe_lens.demo.batches import Stream
from moe_lens.demo.domains import DOMAINS, split_of

Floats = NDArray[np.float64]


@dataclass
class Routing:
    """What the routers did on a list of prompts.

    ``chosen[layer]`` is a list over prompts of expert ids, shape (tokens, k); ``inputs[layer]``
    holds the hidden states the block received, shape (tokens, hidden).
    """

    chosen: dict[int, list[NDArray[np.int64]]] = field(default_factory=lambda: defaultdict(list))
    inputs: dict[int, list[mx.array]] = field(default_factory=lambda: defaultdict(list))


@contextmanager
def captured(model: Model) -> Iterator[Routing]:
    """Record the routing of every forward pass inside the ``with``."""
    stock = Qwen3MoeSparseMoeBlock.__call__
    layer_of = {id(block): layer for layer, block in network.moe_blocks(model).items()}
    routing = Routing()

    def forward(block: Qwen3MoeSparseMoeBlock, x: mx.array) -> mx.array:
        layer = layer_of[id(block)]
        flat = x.reshape(-1, x.shape[-1])
        # The same expression as in the stock block, so that ties break in the same way.
        probabilities = mx.softmax(block.gate(flat), axis=-1, precise=True)
        chosen = mx.argpartition(probabilities, kth=-block.top_k, axis=-1)[:, -block.top_k :]
        routing.chosen[layer].append(np.array(chosen).astype(np.int64))
        routing.inputs[layer].append(flat)
        output: mx.array = stock(block, x)
        return output

    Qwen3MoeSparseMoeBlock.__call__ = forward
    try:
        yield routing
    finally:
        Qwen3MoeSparseMoeBlock.__call__ = stock


def losses(model: Model, prompts: list[list[int]]) -> list[Floats]:
    """Per prompt the loss of every predicted token in nats, shape (tokens - 1,)."""
    result = []
    for ids in prompts:
        tokens = mx.array([ids])
        loss = nn.losses.cross_entropy(model(tokens[:, :-1]), tokens[:, 1:], reduction="none")
        result.append(np.array(loss[0]).astype(np.float64))
    return result


def perplexities(values: list[Floats], labels: list[str]) -> dict[str, float]:
    """exp of the mean token loss per domain."""
    return {
        domain: float(
            np.exp(
                np.concatenate(
                    [v for v, n in zip(values, labels, strict=True) if n == domain]
                ).mean()
            )
        )
        for domain in DOMAINS
    }


def baseline_perplexities(
    streams: dict[str, Stream], prompts: list[list[int]], labels: list[str], vocabulary: int
) -> dict[str, dict[str, float]]:
    """What guessing by counts reaches, counted on each domain's own training tokens.

    ``unigram`` adds 0.1 to every count. ``bigram`` mixes counts n(ab)/n(a) with the unigram in
    the ratio n(a) : 20, a simple Witten-Bell-like backing off.
    """
    result: dict[str, dict[str, float]] = {}
    for domain in DOMAINS:
        tokens = streams[domain].tokens
        single = np.bincount(tokens, minlength=vocabulary) + 0.1
        single = single / single.sum()
        double = np.zeros((vocabulary, vocabulary))
        np.add.at(double, (tokens[:-1], tokens[1:]), 1)
        seen = double.sum(axis=1)
        unigram, bigram = [], []
        for ids, label in zip(prompts, labels, strict=True):
            if label != domain:
                continue
            first, second = np.array(ids[:-1]), np.array(ids[1:])
            trust = seen[first] / (seen[first] + 20)
            conditional = double[first, second] / np.maximum(seen[first], 1)
            unigram.append(np.log(single[second]))
            bigram.append(np.log(trust * conditional + (1 - trust) * single[second]))
        result[domain] = {
            "uniform": float(vocabulary),
            "unigram": float(np.exp(-np.concatenate(unigram).mean())),
            "bigram": float(np.exp(-np.concatenate(bigram).mean())),
        }
    return result


def greedy(model: Model, prompts: list[list[int]], steps: int) -> list[list[int]]:
    """Greedy continuations of ``steps`` tokens; prompts of equal length run as one batch."""
    by_length: dict[int, list[int]] = defaultdict(list)
    for index, ids in enumerate(prompts):
        by_length[len(ids)].append(index)
    result: list[list[int]] = [[] for _ in prompts]
    for length, members in by_length.items():
        for start in range(0, len(members), 128):
            batch = members[start : start + 128]
            tokens = mx.array([prompts[index] for index in batch])
            for _ in range(steps):
                following = mx.argmax(model(tokens)[:, -1], axis=-1)
                tokens = mx.concatenate([tokens, following[:, None]], axis=1)
            for index, row in zip(batch, np.array(tokens).tolist(), strict=True):
                result[index] = row[length:]
    return result


def held_out_sums() -> list[tuple[int, int]]:
    """All ordered pairs of two-digit numbers whose addition was kept out of training."""
    numbers = range(10, 100)
    return [
        (first, second)
        for first in numbers
        for second in numbers
        if split_of(generated.sum_key(first, second)) != "train"
    ]


def addition_accuracy(model: Model, tokenizer: Any) -> tuple[int, int]:
    """Right answers and number of all held-out additions, asked as ``37+58=`` with no context."""
    sums = held_out_sums()
    prompts = [tokenizer.encode(f"{first}+{second}=") for first, second in sums]
    answers = [tokenizer.decode(ids) for ids in greedy(model, prompts, steps=4)]
    right = sum(
        answer.split("\n")[0] == str(first + second)
        for answer, (first, second) in zip(answers, sums, strict=True)
    )
    return right, len(sums)


def string_accuracy(model: Model, tokenizer: Any, seed: int) -> dict[str, tuple[int, int]]:
    """Right answers and number of held-out letter tasks by task, asked with no context."""
    right: dict[str, list[bool]] = defaultdict(list)
    lines = [text for key, text in generated.string_lines(seed) if split_of(key) == "evaluation"]
    lines = sorted(set(lines))[::8]
    questions = [line.split(" = ")[0] + " =" for line in lines]
    answers = greedy(model, [tokenizer.encode(question) for question in questions], steps=7)
    for line, ids in zip(lines, answers, strict=True):
        expected = line.split(" = ")[1]
        answer = tokenizer.decode(ids).split("\n")[0].strip()
        right[line.split(" ")[0]].append(answer == expected)
    return {task: (sum(right[task]), len(right[task])) for task in generated.STRING_TASKS}


def specialisation(
    routing: Routing, labels: list[str], experts: int, shuffles: int = 50
) -> dict[int, dict[str, float]]:
    """Per layer the mutual information of domain and expert, its null, and how even the load is.

    All domains weigh the same. ``mutual_information`` is I(domain; expert) in bits, at most
    log2(6) = 2.585. ``null`` is its mean with the labels permuted between prompts, which is what
    the finite sample gives where there is no relation. ``load_entropy`` is that of the experts'
    shares divided by log(experts): 1 means all experts are used alike.
    """
    result = {}
    source = np.random.default_rng(0)
    names = np.array(labels)
    for layer, chosen in routing.chosen.items():
        counts = np.stack([np.bincount(ids.reshape(-1), minlength=experts) for ids in chosen])
        null = [
            _mutual_information(_by_domain(counts, source.permutation(names)))
            for _ in range(shuffles)
        ]
        joint = _by_domain(counts, names)
        load = joint.sum(axis=0) / joint.sum()
        used = load[load > 0]
        result[layer] = {
            "mutual_information": _mutual_information(joint),
            "null": float(np.mean(null)),
            "null_max": float(np.max(null)),
            "load_entropy": float(-(used * np.log(used)).sum() / np.log(experts)),
            "most_loaded": float(load.max() * experts),
            "least_loaded": float(load.min() * experts),
        }
    return result


def _by_domain(counts: NDArray[np.int64], names: NDArray[np.str_]) -> Floats:
    """Expert shares per domain, (domains, experts), each row summing to 1."""
    rows = np.stack([counts[names == domain].sum(axis=0) for domain in DOMAINS])
    shares: Floats = rows / rows.sum(axis=1, keepdims=True)
    return shares


def _mutual_information(joint: Floats) -> float:
    joint = joint / joint.sum()
    independent = joint.sum(axis=1, keepdims=True) * joint.sum(axis=0, keepdims=True)
    there = joint > 0
    return float((joint[there] * np.log2(joint[there] / independent[there])).sum())


def expert_similarity(model: Model, routing: Routing) -> dict[int, dict[str, Floats]]:
    """Per layer three matrices (experts, experts) of how alike two experts are.

    ``jaccard``: tokens that chose both / tokens that chose either. ``output``: mean cosine of the
    two experts' outputs on the tokens that chose either, whether or not they chose this one.
    ``weight``: cosine of all weights of the two experts.
    """
    result = {}
    for layer, block in network.moe_blocks(model).items():
        experts = block.num_experts
        chosen = np.concatenate(routing.chosen[layer])
        member = np.zeros((len(chosen), experts), dtype=bool)
        np.put_along_axis(member, chosen, True, axis=1)
        both = member.T.astype(np.float64) @ member
        sizes = member.sum(axis=0)
        either = sizes[:, None] + sizes[None, :] - both
        cosines = np.zeros((experts, experts))
        start = 0
        for x in routing.inputs[layer]:
            outputs = _all_outputs(block, x)
            outputs = outputs / mx.linalg.norm(outputs, axis=-1, keepdims=True)
            cosine = np.array(outputs @ outputs.swapaxes(1, 2))
            here = member[start : start + len(x)]
            start += len(x)
            cosines += (cosine * (here[:, :, None] | here[:, None, :])).sum(axis=0)
        switch = block.switch_mlp
        parts = [switch.gate_proj.weight, switch.up_proj.weight, switch.down_proj.weight]
        flat = np.concatenate([np.array(part).reshape(experts, -1) for part in parts], axis=1)
        flat = flat / np.linalg.norm(flat, axis=1, keepdims=True)
        result[layer] = {
            "jaccard": both / np.maximum(either, 1),
            "output": cosines / np.maximum(either, 1),
            "weight": flat @ flat.T,
        }
    return result


def _all_outputs(block: Qwen3MoeSparseMoeBlock, x: mx.array) -> mx.array:
    """What every expert makes of every row of ``x`` (tokens, hidden): (tokens, experts, hidden)."""
    switch = block.switch_mlp
    gate = x @ switch.gate_proj.weight.swapaxes(1, 2)
    up = x @ switch.up_proj.weight.swapaxes(1, 2)
    down = swiglu(gate, up) @ switch.down_proj.weight.swapaxes(1, 2)
    by_token: mx.array = down.swapaxes(0, 1)
    return by_token
