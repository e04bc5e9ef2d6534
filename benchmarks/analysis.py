"""Time and memory of every whole-trace analysis, at three sizes of the same synthetic trace.

    python benchmarks/analysis.py
    python benchmarks/analysis.py --tokens 100000 --layers 12 --experts 64 --json analysis.json

The trace is random but shaped like a real one: prompts of 1,000 tokens with one of 8 labels, token
ids as frequent as Zipf says, experts that a label prefers, distinct experts per token. Its quarter
and its half are its first prompts. Every analysis runs in a process of its own, so that its peak
memory is its own.

*reading* opens every shard and touches every array: one pass over the data. *counting* also counts
experts, the cheapest sum there is. All others are given as multiples of the reading and of the
counting of the same run, and as seconds for each million tokens, which stay the same if the cost is
linear.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table
from turns import where

from moe_lens.corpus.batches import plan_shards
from moe_lens.machine.process import usage
from moe_lens.recording.writer import TraceWriter
from moe_lens.trace import Routes, TokenTexts, Trace

LABELS, PROMPT, VOCABULARY = 8, 1000, 50_000
FRACTIONS = (0.25, 0.5, 1.0)


def reading(trace: Trace) -> None:
    """Touch every number once."""
    for routes in trace.shards():
        routes.expert_ids.max()
        routes.expert_weights.max()


def counting(trace: Trace) -> None:
    from moe_lens.analysis.counts import routed_counts

    routed_counts(trace)


def balance(trace: Trace) -> None:
    from moe_lens.analysis.balance import balance as find

    find(trace)


def experts(trace: Trace) -> None:
    from moe_lens.analysis.taxonomy import name_experts

    name_experts(trace)


def domains(trace: Trace) -> None:
    from moe_lens.analysis.domains import domains as find

    find(trace)


def vocabulary(trace: Trace) -> None:
    from moe_lens.analysis.vocabulary import count_ids, routed_vocabulary

    routed_vocabulary(count_ids(trace))


def coactivation(trace: Trace) -> None:
    from moe_lens.analysis.coactivation import coactivation as find

    find(trace)


def pipeline(trace: Trace) -> None:
    from moe_lens.analysis.pipeline import pipeline as find

    find(trace)


def locality(trace: Trace) -> None:
    from moe_lens.analysis.locality import locality as find

    find(trace)


def similarity(trace: Trace) -> None:
    """By routing."""
    from moe_lens.analysis.similarity.compared import Material, compare

    compare(Material(trace=trace), ("routing",))


def saturation(trace: Trace) -> None:
    """Of one checkpoint against another; both read the same files."""
    from moe_lens.analysis.saturation import saturation as find

    find([trace, trace])


ANALYSES: dict[str, Callable[[Trace], None]] = {
    each.__name__: each
    for each in (
        *(reading, counting, balance, experts, domains, vocabulary, coactivation, pipeline),
        *(locality, similarity, saturation),
    )
}


def write_trace(folder: Path, tokens: int, layers: int, experts: int, k: int) -> Trace:
    """The synthetic trace."""
    random = np.random.default_rng(0)
    prompts = max(LABELS, tokens // PROMPT)
    lengths = [tokens // prompts] * prompts
    labels = [f"label {place % LABELS}" for place in range(prompts)]
    shards = plan_shards(lengths, max(PROMPT, min(65536, (64 << 20) // (3 * k * layers))))
    header = {
        "format": "moe-lens trace",
        "version": 1,
        "model": {"name": f"{layers} x {experts}, k = {k}"},
        "layers": list(range(layers)),
        "num_experts": experts,
        "router_width": experts,
        "corpus": {"name": "random", "fingerprint": "", "tokens_sha256": "", "notes": []},
        "settings": {"router_logits": False},
        "versions": {"mlx": "", "mlx_lm": "", "device": ""},
    }
    content = {"tokens": lengths, "labels": labels, "sha256": [""] * prompts}
    words = (b" the", b"12", b"(", b"\n", b" Paris", b"ing", b"    ", b'"')
    texts = TokenTexts({each: words[each % len(words)] for each in range(VOCABULARY)})
    preferred = np.argsort(random.random((LABELS, layers, experts)), axis=-1).astype(np.uint16)
    with TraceWriter(folder, header, content, texts, shards) as writer:
        for shard in track(shards, description="writing the trace", transient=True):
            rows = sum(lengths[shard.start : shard.stop])
            prompt = np.repeat(np.arange(shard.start, shard.stop), lengths[shard.start])
            label = prompt % LABELS
            ids = np.empty((layers, rows, k), dtype=np.uint16)
            for layer in range(layers):
                # An odd stride never meets an expert twice where their number is a power of two.
                start = (experts * random.random((rows, 1)) ** 2).astype(np.int64)
                stride = 2 * random.integers(0, 3, (rows, 1)) + 1
                place = (start + stride * np.arange(k)) % experts
                ids[layer] = preferred[label[:, None], layer, place]
            weights = -np.sort(-random.random((1, rows, k), dtype=np.float32), axis=-1)
            weights = np.broadcast_to(weights, ids.shape).astype(np.float16)
            token_ids = np.minimum(random.zipf(1.3, rows), VOCABULARY - 1).astype(np.int32)
            position = np.tile(np.arange(lengths[shard.start]), len(shard))
            writer.write(
                Routes(
                    layers=tuple(range(layers)),
                    router_width=experts,
                    token_ids=token_ids,
                    prompt=prompt.astype(np.int32),
                    position=position.astype(np.int32),
                    expert_ids=ids,
                    expert_weights=weights,
                )
            )
        writer.finish()
    return Trace.open(folder)


def part_of(trace: Trace, fraction: float, folder: Path) -> Trace:
    """The first shards of a trace as a trace of its own; the files are shared."""
    folder.mkdir()
    entries = trace.header["shards"][: max(1, round(fraction * len(trace.entries)))]
    prompts = json.loads((trace.path / "prompts.json").read_text())
    stop = entries[-1]["stop_prompt"]
    parts = {
        "trace.json": trace.header | {"shards": entries},
        "prompts.json": {name: column[:stop] for name, column in prompts.items()},
    }
    for name, content in parts.items():
        (folder / name).write_text(json.dumps(content))
    os.link(trace.path / "tokens.json", folder / "tokens.json")
    for entry in entries:
        os.link(trace.path / entry["file"], folder / entry["file"])
    return Trace.open(folder)


def measure(name: str, folder: Path) -> dict[str, float]:
    """Seconds and peak memory of one analysis, in a process of its own."""
    context = multiprocessing.get_context("spawn")
    with context.Pool(1) as pool:
        return pool.apply(_measured, (name, folder))


def _measured(name: str, folder: Path) -> dict[str, float]:
    trace = Trace.open(folder)
    small = trace.prompt(0)  # what is imported and mapped once is not what is measured
    del small
    start, cpu = time.perf_counter(), time.process_time()
    ANALYSES[name](trace)
    return {
        "seconds": time.perf_counter() - start,
        "cpu_seconds": time.process_time() - cpu,
        "peak_bytes": usage().peak_memory or 0,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=1_000_000)
    parser.add_argument("--layers", type=int, default=48)
    parser.add_argument("--experts", type=int, default=128)
    parser.add_argument("-k", type=int, default=8)
    parser.add_argument("--only", nargs="*", choices=list(ANALYSES), default=list(ANALYSES))
    parser.add_argument("--json", type=Path, default=None)
    given = parser.parse_args()
    names = [name for name in ANALYSES if name in {"reading", "counting", *given.only}]
    folder = Path(tempfile.mkdtemp(prefix="moe-lens-analysis-"))
    try:
        whole = write_trace(folder / "whole", given.tokens, given.layers, given.experts, given.k)
        parts = {
            fraction: whole if fraction == 1 else part_of(whole, fraction, folder / str(fraction))
            for fraction in FRACTIONS
        }
        found: dict[str, Any] = {
            "where": where(),
            "settings": {
                name: getattr(given, name) for name in ("tokens", "layers", "experts", "k")
            },
            "tokens": {str(fraction): trace.num_tokens for fraction, trace in parts.items()},
            "analyses": {
                name: {
                    str(fraction): measure(name, trace.path) for fraction, trace in parts.items()
                }
                for name in track(names, description="measuring", transient=True)
            },
        }
    finally:
        shutil.rmtree(folder)
    _show(found)
    if given.json is not None:
        given.json.write_text(json.dumps(found, indent=2) + "\n")


def _show(found: dict[str, Any]) -> None:
    asked = found["settings"]
    table = Table(
        title=f"{asked['tokens']:,} tokens x {asked['layers']} MoE layers x {asked['experts']} "
        f"experts, k = {asked['k']}: time of a quarter, half and all of it"
    )
    for column in ("analysis", "seconds", "s per M tokens", "x reading", "x counting", "peak MB"):
        table.add_column(column, justify="left" if column == "analysis" else "right")
    last = str(FRACTIONS[-1])
    one = {name: found["analyses"][name][last]["seconds"] for name in ("reading", "counting")}
    for name, sizes in found["analyses"].items():
        seconds = [sizes[str(fraction)]["seconds"] for fraction in FRACTIONS]
        tokens = [found["tokens"][str(fraction)] / 1e6 for fraction in FRACTIONS]
        peaks = [sizes[str(fraction)]["peak_bytes"] / 1e6 for fraction in FRACTIONS]
        table.add_row(
            name,
            " / ".join(f"{each:.1f}" for each in seconds),
            " / ".join(f"{each / size:.1f}" for each, size in zip(seconds, tokens, strict=True)),
            f"{seconds[-1] / one['reading']:.1f}",
            f"{seconds[-1] / one['counting']:.1f}",
            " / ".join(f"{each:.0f}" for each in peaks),
        )
    Console().print(table)


if __name__ == "__main__":
    main()
