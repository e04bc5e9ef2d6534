"""What routing costs: launches, bytes and time, of mlx-lm's own code, the reference and the kernel.

    python benchmarks/routing.py
    python benchmarks/routing.py launches counting --output routing.json

Four parts, all of them unless some are named:

- ``launches``: kernels a GPU starts for one layer of each family, and the bytes they move, counted
  on the graph of the tiny models of the tests with 128 experts, 8 of them active, in bfloat16.
- ``reference``: the reference on this machine's CPU against other ways to the same experts.
- ``counting``: co-activation counts on this machine's CPU against other ways to the same integers.
- ``kernel``: the reference and the fused kernel on this machine's GPU, if it has one.

Every time is CPU time of this process, on one core where BLAS is concerned (wall time in
``kernel``), all ways in turn on the same input in an order that rotates; a time is the shortest
turn's, and a ratio to "reference" or "ours" is the median over the turns.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # read when numpy is loaded

import mlx.core as mx
import numpy as np
from counting import WAYS
from family_costs import ACTIVE, DECODE, EXPERTS, FAMILIES, PREFILL, Cost, family_costs
from rich.console import Console
from rich.progress import track
from rich.table import Table

from moe_lens.kernels import Kernel, Routed, Rule, reference_routed, route

LAYERS = 48
"""MoE layers in a row, as many as Qwen3-30B-A3B has, of one timed unit on a GPU."""
COUNTED_EXPERTS, COUNTED_ACTIVE = (64, 128, 256, 512), (4, 8)
COUNTED_TOKENS = (1, 256, 2048, 32768)
COUNTED_LAYERS = 8
TURN = 0.01
"""Seconds that a function fills in its turn with as many calls as it takes."""
SLOWEST = 0.2
"""A way to count that takes longer than this many seconds is left out of the turns."""

SOFTMAX_RULE = Rule("softmax_precise", normalise="sum")
"""That of Qwen3 MoE."""

Parts = list[dict[str, Any]]


def launch_part(console: Console, options: argparse.Namespace) -> Parts:
    found = {name: family_costs(name) for name in track(FAMILIES, "launches", transient=True)}
    ways = list(found[FAMILIES[0]])
    table = Table(title=f"Launches of one layer, E={EXPERTS}, k={ACTIVE}", title_justify="left")
    moved = Table(title=f"KiB moved, {DECODE} and {PREFILL} tokens", title_justify="left")
    for each in (table, moved):
        each.add_column("family")
        for way in ways:
            each.add_column(way, justify="right")
    for name, costs in found.items():
        table.add_row(name, *(_or_dash(cost, cost.launches) for cost in costs.values()))
        moved.add_row(name, *(_or_dash(cost, _kib(cost)) for cost in costs.values()))
    console.print(table, moved, sep="\n")
    for name, costs in found.items():
        for way, cost in costs.items():
            if cost.reason:
                console.print(f"{name}, {way}: {cost.reason}")
    return [
        {"family": name, "way": way, **asdict(cost)}
        for name, costs in found.items()
        for way, cost in costs.items()
    ]


def _or_dash(cost: Cost, value: object) -> str:
    return "-" if cost.launches is None else str(value)


def _kib(cost: Cost) -> str:
    return f"{cost.decode_bytes / 1024:.1f}, {cost.prefill_bytes / 1024:,.0f}"


def in_turns(
    functions: dict[str, Callable[[], Any]],
    repetitions: int,
    clock: Callable[[], float] = time.process_time,
) -> dict[str, list[float]]:
    """Seconds of one call of each function, `repetitions` times in turn.

    In its turn a function is called as often as fills `TURN` seconds.
    """
    calls = {name: _calls(function, clock) for name, function in functions.items()}
    taken: dict[str, list[float]] = {name: [] for name in functions}
    names = list(functions)
    for turn in range(repetitions):
        shift = turn % len(names)
        gc.collect()
        for name in names[shift:] + names[:shift]:
            start = clock()
            for _ in range(calls[name]):
                functions[name]()
            taken[name].append((clock() - start) / calls[name])
    return taken


def _calls(function: Callable[[], Any], clock: Callable[[], float]) -> int:
    """How often `function` is called in one turn; the first call of all is not counted."""
    function()
    start = clock()
    function()
    return max(1, int(TURN / max(1e-6, clock() - start)))


def ratio(taken: list[float], base: list[float]) -> float:
    """The median over the turns of one function to the base."""
    return statistics.median(one / two for one, two in zip(taken, base, strict=True))


def evaluated(function: Callable[..., Any], *args: Any) -> Callable[[], None]:
    """A call that evaluates what `function` returns."""
    return lambda: mx.eval(function(*args))


def _by_argmax(logits: mx.array) -> list[mx.array]:
    scores = left = mx.softmax(logits, axis=-1, precise=True)
    chosen = []
    for _ in range(ACTIVE):
        chosen.append(mx.argmax(left, axis=-1, keepdims=True))
        left = mx.put_along_axis(left, chosen[-1], mx.array(-1, left.dtype), axis=-1)
    ids = mx.concatenate(chosen, axis=-1)
    weights = mx.take_along_axis(scores, ids, axis=-1)
    return [ids, weights / weights.sum(axis=-1, keepdims=True)]


def _by_numpy(logits: mx.array) -> list[mx.array]:
    values = np.array(logits.astype(mx.float32))
    exponents = np.exp(values - values.max(-1, keepdims=True))
    ids = np.argpartition(-exponents, ACTIVE - 1, axis=-1)[:, :ACTIVE]
    chosen = np.take_along_axis(exponents, ids, -1)
    return [mx.array(ids), mx.array(chosen / chosen.sum(-1, keepdims=True))]


def _by_rule(rule: Rule, logits: mx.array) -> list[mx.array]:
    return list(route(rule, logits, ACTIVE))


REFERENCES: dict[str, Callable[[mx.array], list[mx.array]]] = {
    "reference": partial(_by_rule, SOFTMAX_RULE),
    "compiled": mx.compile(partial(_by_rule, SOFTMAX_RULE)),
    "whole sort": partial(_by_rule, replace(SOFTMAX_RULE, side="sorted")),
    "k x argmax": _by_argmax,
    "numpy": _by_numpy,
}


def reference_part(console: Console, options: argparse.Namespace) -> Parts:
    table = Table(
        title=f"Reference on the CPU, softmax then top-k, E={EXPERTS}, k={ACTIVE}",
        title_justify="left",
    )
    for heading in ("tokens", "dtype", "reference"):
        table.add_column(heading, justify="right")
    others = [name for name in REFERENCES if name != "reference"]
    for name in others:
        table.add_column(f"{name} /", justify="right")
    results: Parts = []
    values = np.random.default_rng(0).standard_normal((PREFILL, EXPERTS)).astype(np.float32)
    with mx.stream(mx.cpu):
        for tokens in (DECODE, PREFILL):
            for dtype in (mx.float32, mx.bfloat16):
                logits = mx.array(values[:tokens]).astype(dtype)
                if dtype == mx.float32:
                    _same_experts(logits)
                calls = {name: evaluated(way, logits) for name, way in REFERENCES.items()}
                taken = in_turns(calls, options.repetitions)
                base = min(taken["reference"])
                ratios = {name: ratio(taken[name], taken["reference"]) for name in others}
                kind = str(dtype).removeprefix("mlx.core.")
                table.add_row(
                    str(tokens),
                    kind,
                    f"{base * 1e6:.0f} us",
                    *(f"{ratios[name]:.2f}" for name in others),
                )
                results.append(dict(tokens=tokens, dtype=kind, seconds=base, ratios=ratios))
    console.print(table)
    return results


def _same_experts(logits: mx.array) -> None:
    """Without ties every way must choose alike."""
    wanted = np.sort(np.array(REFERENCES["reference"](logits)[0]), -1)
    for name, way in REFERENCES.items():
        if not np.array_equal(np.sort(np.array(way(logits)[0]), -1), wanted):
            raise SystemExit(f"{name} chose other experts than the reference")


def counting_part(console: Console, options: argparse.Namespace) -> Parts:
    table = Table(
        title=f"Co-activation of {COUNTED_LAYERS} layers on the CPU", title_justify="left"
    )
    for heading in ("E", "k", "tokens", "ours"):
        table.add_column(heading, justify="right")
    others = [name for name in WAYS if name != "ours"]
    for name in others:
        table.add_column(f"{name} /", justify="right")
    results: Parts = []
    shapes = [(e, k, t) for e in COUNTED_EXPERTS for k in COUNTED_ACTIVE for t in COUNTED_TOKENS]
    rng = np.random.default_rng(0)
    with mx.stream(mx.cpu):
        for experts, k, tokens in track(shapes, "counting", transient=True):
            ids = _random_ids(rng, (COUNTED_LAYERS, tokens, k), experts)
            calls = _counting_calls(ids, experts)
            taken = in_turns(calls, options.repetitions)
            base = min(taken["ours"])
            ratios = {name: ratio(taken[name], taken["ours"]) for name in calls if name != "ours"}
            table.add_row(
                *map(str, (experts, k, tokens)),
                f"{base * 1e6:.0f} us",
                *(f"{ratios[name]:.2f}" if name in ratios else "-" for name in others),
            )
            shape = dict(experts=experts, k=k, tokens=tokens)
            results.append(dict(shape, seconds=base, ratios=ratios))
    console.print(table, f"-: takes more than {SLOWEST:g} s, left out", sep="\n")
    return results


def _random_ids(rng: np.random.Generator, shape: tuple[int, int, int], experts: int) -> Any:
    """[layers, tokens, k] uint16, no expert twice in a token, in the order of a partition."""
    layers, tokens, k = shape
    scores = (rng.random((tokens, experts), dtype=np.float32) for _ in range(layers))
    return np.stack([each.argpartition(k, -1)[:, :k].astype(np.uint16) for each in scores])


def _counting_calls(ids: Any, experts: int) -> dict[str, Callable[[], Any]]:
    """Every way that gives the same table as the first and is not too slow."""
    wanted = WAYS["ours"](ids, experts)
    calls = {}
    for name, way in WAYS.items():
        start = time.process_time()
        if not np.array_equal(way(ids, experts), wanted):
            raise SystemExit(f"{name} counted other than ours")
        if time.process_time() - start < SLOWEST:
            calls[name] = partial(way, ids, experts)
    return calls


def kernel_part(console: Console, options: argparse.Namespace) -> Parts:
    try:
        kernels = [Kernel("always"), Kernel("always", one_launch=True)]
    except ValueError as error:
        console.print(f"The kernel is not measured: {error}.")
        return []
    ways: dict[str, Callable[..., Routed]] = {
        "reference": _plain,
        "reference, statistics": reference_routed,
        "kernel": kernels[0].routed,
        "kernel, one launch": kernels[1].routed,
    }
    return time_layers(console, ways, options.repetitions)


def _plain(rule: Rule, logits: mx.array, k: int) -> Routed:
    ids, weights = route(rule, logits, k)
    return Routed(ids, weights, weights, weights, weights)


def time_layers(
    console: Console, ways: dict[str, Callable[..., Routed]], repetitions: int
) -> Parts:
    """Wall time of LAYERS routings in a row, each waiting for the one before."""
    title = f"{LAYERS} layers in a row on {mx.default_device()}, us per layer"
    table = Table(title=title, title_justify="left")
    table.add_column("tokens", justify="right")
    for name in ways:
        table.add_column(name, justify="right")
    results: Parts = []
    for tokens in (DECODE, PREFILL):
        logits = mx.random.normal((tokens, EXPERTS)).astype(mx.bfloat16)
        mx.eval(logits)
        calls = {name: evaluated(partial(_layers, way), logits) for name, way in ways.items()}
        taken = in_turns(calls, repetitions, time.perf_counter)
        each = {name: min(seconds) / LAYERS for name, seconds in taken.items()}
        table.add_row(str(tokens), *(f"{seconds * 1e6:.1f}" for seconds in each.values()))
        results += [dict(tokens=tokens, way=name, seconds=s) for name, s in each.items()]
    console.print(table, "Each layer adds one more launch, which makes it wait.", sep="\n")
    return results


def _layers(way: Callable[..., Routed], logits: mx.array) -> list[mx.array]:
    kept = []
    for _ in range(LAYERS):
        found = way(SOFTMAX_RULE, logits, ACTIVE)
        kept += [found.ids, found.entropy, found.margin, found.mass]
        logits = logits + found.weights[..., :1]
    return kept


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    gpu = next((name for name in ("metal", "cuda") if getattr(mx, name).is_available()), None)
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "processor": _processor(),
        "python": platform.python_version(),
        "gpu": gpu,
        "device": str(mx.default_device()),
        **{name: version(name) for name in ("mlx", "mlx-lm", "numpy", "scipy")},
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{len(models)} x {models[0]}" if models else platform.processor()


PARTS: dict[str, Callable[[Console, argparse.Namespace], Parts]] = {
    "launches": launch_part,
    "reference": reference_part,
    "counting": counting_part,
    "kernel": kernel_part,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("parts", nargs="*", metavar="part", help=", ".join(PARTS))
    parser.add_argument("--repetitions", type=int, default=7)
    parser.add_argument("--output", type=Path, help="also write all figures to this JSON file")
    options = parser.parse_args()
    unknown = set(options.parts) - set(PARTS)
    if unknown:
        parser.error(f"no part {', '.join(sorted(unknown))}: choose from {', '.join(PARTS)}")
    console = Console()
    found = machine()
    console.print(", ".join(f"{name}: {value}" for name, value in found.items()))
    results = {name: PARTS[name](console, options) for name in options.parts or PARTS}
    if options.output is not None:
        options.output.write_text(json.dumps({"machine": found, "results": results}, indent=2))


if __name__ == "__main__":
    main()
