"""What a calibration costs, as ratios to the plain forward over the same text.

    python benchmarks/calibration.py
    python benchmarks/calibration.py --repetitions 15 --json calibration.json

All variants read the same batches, in turns in one process, in an order that rotates, so that a
busy machine slows all of them; a ratio is the median over the turns of variant / plain. On a CPU
the target is asked of processor time, which other programs disturb less than the clock. The plain
forward stops before the head, which a calibration does not compute either; what a forward with its
head costs is shown for comparison.

"routed sums" is what every method that removes experts needs. "with similarity" evaluates every
expert on a sample of the tokens, here one of eight; `moe-lens compress` takes 2048 at most, so that
on a longer text it costs less than here.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from capture import OneBlock, block_router
from rich.console import Console
from rich.table import Table
from turns import Measured, in_turns, paired, where

from moe_lens.compress.calibration.calibration import batch_tokens, collect
from moe_lens.compress.calibration.sink import CalibrationSink
from moe_lens.corpus import read_corpus
from moe_lens.corpus.batches import pad, plan_batches
from moe_lens.router import ExpertRouter

TARGET = 1.15
"""The most the routed sums may cost, as a multiple of the plain forward."""

EXPERT_WIDTH = 384
"""Of the random block."""

SAMPLED = 8
"""Every expert is evaluated on one token of so many, where similarities are asked for."""

LABELS = ("code", "prose", "dialogue")

Tokens = list[list[int]]
Unit = Callable[[ExpertRouter, Tokens], None]


def _batches(router: ExpertRouter, tokens: Tokens) -> list[tuple[np.ndarray, list[int]]]:
    lengths = [len(ids) for ids in tokens]
    return [
        pad([np.asarray(tokens[prompt], np.int32) for prompt in batch])
        for batch in plan_batches(range(len(tokens)), lengths, 64, batch_tokens(router))
    ]


def plain(router: ExpertRouter, tokens: Tokens) -> None:
    body: Any = router.model if isinstance(router.model, OneBlock) else router.model.model
    for ids, _ in _batches(router, tokens):
        mx.eval(body(mx.array(ids)))


def with_head(router: ExpertRouter, tokens: Tokens) -> None:
    for ids, real in _batches(router, tokens):
        mx.eval(router.forward(ids, real))


def _calibrated(router: ExpertRouter, tokens: Tokens, sampled: int, **asked: bool) -> None:
    sink = CalibrationSink(router.layers, **asked)
    labels = [LABELS[place % len(LABELS)] for place in range(len(tokens))]
    collect(router, sink, tokens, sampled, 0, labels=labels)
    assert sink.tokens == sum(map(len, tokens))


def routed_sums(router: ExpertRouter, tokens: Tokens) -> None:
    _calibrated(router, tokens, 0, similarity=False)


def with_mean_outputs(router: ExpertRouter, tokens: Tokens) -> None:
    _calibrated(router, tokens, 0, similarity=False, mean_outputs=True)


def with_similarity(router: ExpertRouter, tokens: Tokens) -> None:
    _calibrated(router, tokens, sum(map(len, tokens)) // SAMPLED, similarity=True)


VARIANTS: dict[str, Unit] = {
    "plain": plain,
    "plain with head": with_head,
    "routed sums": routed_sums,
    "with mean outputs": with_mean_outputs,
    "with similarity": with_similarity,
}


def cases() -> list[tuple[ExpertRouter, Tokens]]:
    """The bundled model on its calibration text, and one block on random tokens.

    The block has the proportions of Qwen3-30B-A3B, at half its hidden size.
    """
    demo = ExpertRouter.from_pretrained("demo")
    text = read_corpus("demo").sample(16).tokenize(demo.tokenizer, 512)
    drawn = np.random.default_rng(0)
    return [
        (demo, [list(ids) for ids in text]),
        (
            block_router("qwen3_moe", EXPERT_WIDTH),
            [drawn.integers(0, 256, 256).tolist() for _ in range(4)],
        ),
    ]


def measure(router: ExpertRouter, tokens: Tokens, repetitions: int) -> list[Measured]:
    """Run every variant in turns."""
    variants = {name: partial(unit, router, tokens) for name, unit in VARIANTS.items()}
    return in_turns(variants, repetitions, router.name)


def show(console: Console, title: str, results: list[Measured]) -> float:
    """Print the ratios of one model; returns that of the routed sums."""
    table = Table(title=title, title_justify="left")
    table.add_column("variant")
    for heading in ("wall, median", "wall ratio", "CPU ratio"):
        table.add_column(heading, justify="right")
    base = results[0]
    for each in results:
        table.add_row(
            each.variant,
            f"{statistics.median(each.wall):.2f} s",
            f"{paired(each.wall, base.wall):.3f}",
            f"{paired(each.cpu, base.cpu):.3f}",
        )
    console.print(table)
    found = next(each for each in results if each.variant == "routed sums")
    if mx.default_device() == mx.Device(mx.cpu):
        return paired(found.cpu, base.cpu)
    return paired(found.wall, base.wall)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--repetitions", type=int, default=7)
    parser.add_argument("--json", type=Path, help="also write all samples to this file")
    options = parser.parse_args()
    console = Console()
    report: dict[str, Any] = {**where(), "results": {}}
    for router, tokens in cases():
        title = f"{router.name}: {sum(map(len, tokens)):,} tokens"
        results = measure(router, tokens, options.repetitions)
        cost = show(console, f"{title} ({options.repetitions} repetitions)", results)
        report["results"][title] = [asdict(each) for each in results]
        met = "met" if cost <= TARGET else "missed"
        console.print(f"routed sums: {cost:.3f}, target {TARGET:.2f} {met}\n")
    if options.json is not None:
        options.json.write_text(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
