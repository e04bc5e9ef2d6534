"""Checkpoints whose right compression is known, and texts of words for the tiny tokenizer."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.utils import load_model, save_model

from moe_lens.compress import ExpertGroup, LayerPlan, Plan
from moe_lens.compress.calibration.calibration import identify
from moe_lens.compress.plan.identity import CorpusIdentity
from moe_lens.families import find_moe_layers
from moe_lens.router import ExpertRouter
from tiny_models import save_checkpoint

NO_TEXT = CorpusIdentity(name="none", fingerprint="0" * 64, prompts=0, tokens=0)


def save_twins(folder: Path, name: str = "qwen3_moe/nonorm", noise: float = 0.02) -> Path:
    """A tiny model of 16 experts in which expert e + 8 is a noisy copy of expert e.

    Router rows are copied as well, so both copies are mostly chosen together by the 2 slots.
    """
    save_checkpoint(name, folder, experts=16)
    model, _ = load_model(folder)
    parameters = dict(tree_flatten(model.parameters()))
    mx.random.seed(1)
    changed = []
    for layer in find_moe_layers(model):
        for key in layer.expert_parameters() + layer.router_parameters():
            half = parameters[key][:8]
            copy = half + mx.random.normal(half.shape) * noise * mx.std(half)
            changed.append((key, mx.concatenate([half, copy])))
    model.update(tree_unflatten(changed))
    mx.eval(model.parameters())
    save_model(folder, model, donate_model=True)
    return folder


def write_words(path: Path, prompts: int, seed: int, labels: str = "ab", words: int = 40) -> Path:
    """A JSONL corpus of random words that the tiny tokenizer knows, labelled in turn."""
    source = random.Random(seed)
    lines = [
        json.dumps(
            {
                "text": " ".join(f"w{source.randrange(126)}" for _ in range(words)),
                "label": labels[number % len(labels)],
            }
        )
        for number in range(prompts)
    ]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def prune_plan(router: ExpertRouter, kept: Mapping[int, list[int]]) -> Plan:
    """A plan that keeps the given experts of each layer, whatever any text says."""
    model = identify(router)
    layers = tuple(
        LayerPlan(
            layer=layer,
            groups=tuple(ExpertGroup.single(expert) for expert in experts),
            removed=tuple(sorted(set(range(model.num_experts)) - set(experts))),
        )
        for layer, experts in sorted(kept.items())
    )
    count = len(layers[0].groups)
    return Plan("prune", model, NO_TEXT, count, model.experts_per_token, layers)


def merge_plan(router: ExpertRouter, groups: Mapping[int, list[tuple[int, ...]]]) -> Plan:
    """A plan that merges the given groups with unequal shares."""
    model = identify(router)
    layers = tuple(
        LayerPlan(layer=layer, groups=tuple(_group(experts) for experts in each))
        for layer, each in sorted(groups.items())
    )
    count = len(layers[0].groups)
    return Plan("merge", model, NO_TEXT, count, model.experts_per_token, layers)


def narrow_plan(
    router: ExpertRouter,
    width: int,
    kept: Mapping[int, list[int]] | None = None,
    whole_groups_of: int = 1,
) -> Plan:
    """A plan that keeps `width` channels of every expert, other ones in each, whatever text says.

    `kept` are the experts that stay; None: all. With `whole_groups_of` the channels are drawn in
    such groups of neighbours.
    """
    model = identify(router)
    source = random.Random(0)
    everything = {layer.index: list(range(model.num_experts)) for layer in router.layers}
    fewer = prune_plan(router, kept or everything)
    count = model.expert_width // whole_groups_of
    layers = tuple(
        replace(
            layer,
            channels=tuple(
                tuple(
                    group * whole_groups_of + place
                    for group in sorted(source.sample(range(count), width // whole_groups_of))
                    for place in range(whole_groups_of)
                )
                for _ in layer.groups
            ),
        )
        for layer in fewer.layers
    )
    kind = "channels" if kept is None else "prune"
    return replace(fewer, kind=kind, layers=layers, expert_width=width)


def _group(experts: tuple[int, ...]) -> ExpertGroup:
    if len(experts) == 1:
        return ExpertGroup.single(experts[0])
    rest = 0.5 / (len(experts) - 1)
    return ExpertGroup(experts, (0.5, *[rest] * (len(experts) - 1)))


def kept_per_layer(router: ExpertRouter, keep: int) -> dict[int, list[int]]:
    """`keep` experts of each layer, other ones in every layer, equally many of each group."""
    model = identify(router)
    size, per_group = model.group_size, keep // model.group_count
    kept = {}
    for number, layer in enumerate(router.layers):
        kept[layer.index] = [
            expert
            for start in range(0, model.num_experts, size)
            for expert in sorted(start + (3 * j + number) % size for j in range(per_group))
        ]
    return kept


def prepared(
    folder: Path,
    name: str = "qwen3_moe",
    quantise: int | None = None,
    dtype: mx.Dtype | None = None,
) -> tuple[Path, Plan]:
    """A checkpoint of 16 experts and a plan that keeps 8, other ones in each layer."""
    source = save_checkpoint(name, folder / "source", quantise, experts=16, dtype=dtype)
    router = ExpertRouter.from_pretrained(source)
    return source, prune_plan(router, kept_per_layer(router, 8))
