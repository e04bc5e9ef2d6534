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
import gc
import json
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from capture import OneBlock
from mlx_lm.models import qwen3_moe
from rich.console import Console
from rich.progress import track
from rich.table import Table

from moe_lens.compress.calibration.calibration import batch_tokens, collect
from moe_lens.compress.calibration.sink import CalibrationSink
from moe_lens.corpus import read_corpus
from moe_lens.corpus.batches import pad, plan_batches
from moe_lens.router import ExpertRouter

TARGET = 1.15
"""The most the routed sums may cost, as a multiple of the plain forward."""

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


@dataclass(frozen=True)
class Measured:
    """The turns of one variant, in seconds."""

    variant: str
    cpu: list[float]
    wall: list[float]


def block_router() -> ExpertRouter:
    """One random block with the proportions of Qwen3-30B-A3B, at half its hidden size."""
    mx.random.seed(0)
    args = qwen3_moe.ModelArgs.from_dict(
        dict(
            model_type="qwen3_moe",
            vocab_size=256,
            hidden_size=1024,
            intermediate_size=1024,
            moe_intermediate_size=384,
            num_hidden_layers=1,
            num_attention_heads=8,
            num_key_value_heads=8,
            num_experts=64,
            num_experts_per_tok=8,
            norm_topk_prob=True,
            decoder_sparse_step=1,
            mlp_only_layers=[],
            head_dim=128,
            tie_word_embeddings=False,
            rms_norm_eps=1e-6,
            rope_theta=10000.0,
            max_position_embeddings=4096,
        )
    )
    model = OneBlock(qwen3_moe.Qwen3MoeSparseMoeBlock(args))
    mx.eval(model.parameters())
    return ExpertRouter(model, None, {"model_type": "qwen3_moe"}, name="one qwen3_moe block")


def cases() -> list[tuple[ExpertRouter, Tokens]]:
    """The bundled model on its calibration text, and one block on random tokens."""
    demo = ExpertRouter.from_pretrained("demo")
    text = read_corpus("demo").sample(16).tokenize(demo.tokenizer, 512)
    drawn = np.random.default_rng(0)
    return [
        (demo, [list(ids) for ids in text]),
        (block_router(), [drawn.integers(0, 256, 256).tolist() for _ in range(4)]),
    ]


def measure(router: ExpertRouter, tokens: Tokens, repetitions: int) -> list[Measured]:
    """Run every variant in turns, after one turn that is not counted."""
    names = list(VARIANTS)
    cpu: dict[str, list[float]] = {name: [] for name in names}
    wall: dict[str, list[float]] = {name: [] for name in names}
    for turn in track(range(repetitions + 1), description=router.name, transient=True):
        shift = turn % len(names)
        for name in names[shift:] + names[:shift]:
            gc.collect()
            wall_start, cpu_start = time.perf_counter(), time.process_time()
            VARIANTS[name](router, tokens)
            if turn:
                cpu[name].append(time.process_time() - cpu_start)
                wall[name].append(time.perf_counter() - wall_start)
    return [Measured(name, cpu[name], wall[name]) for name in names]


def ratio(variant: list[float], base: list[float]) -> float:
    """The median over the turns of variant / plain."""
    return statistics.median(v / p for v, p in zip(variant, base, strict=True))


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
            f"{ratio(each.wall, base.wall):.3f}",
            f"{ratio(each.cpu, base.cpu):.3f}",
        )
    console.print(table)
    found = next(each for each in results if each.variant == "routed sums")
    if mx.default_device() == mx.Device(mx.cpu):
        return ratio(found.cpu, base.cpu)
    return ratio(found.wall, base.wall)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--repetitions", type=int, default=7)
    parser.add_argument("--json", type=Path, help="also write all samples to this file")
    options = parser.parse_args()
    console = Console()
    report: dict[str, Any] = {
        "mlx": version("mlx"),
        "mlx_lm": version("mlx-lm"),
        "device": str(mx.default_device()),
        "machine": f"{platform.system()} {platform.machine()}",
        "results": {},
    }
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
