"""How fast a smaller checkpoint is written, against copying the same bytes, and in how much memory.

    python benchmarks/checkpoint_io.py
    python benchmarks/checkpoint_io.py --gigabytes 2 --cases mlx-4bit-merge --json io.json

A Qwen3-MoE checkpoint of several gigabytes is generated (128 experts of width 768 behind 2048
hidden values, as in Qwen3-30B-A3B, and as many layers as fit), written smaller by a process of its
own, copied (read, written, `fsync`) in turns with that, and deleted again. Speeds are bytes of the
smaller model per second, from the first read of the parent to the last `fsync`; the copy is of the
smaller model. Peak memory is that of the writing process beyond what it has after its imports; the
bound is three times the largest tensor of the parent as MLX holds it, plus 300 MB. Cases are named
by the layout of the parent and what is done: `export` prunes it into the layout of Hugging Face.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from generated import copy_tokenizer, qwen3_moe_config
from mlx.utils import tree_flatten
from mlx_lm.models.qwen3_moe import Model, ModelArgs
from rich.console import Console
from rich.table import Table
from turns import where

from moe_lens.compress.checkpoint.tensor_file import write_shards

HIDDEN, WIDTH, EXPERTS, ACTIVE, VOCABULARY = 2048, 768, 128, 8, 32768
CASES = ("mlx-bf16-prune", "mlx-bf16-merge", "mlx-4bit-prune", "mlx-4bit-merge", "hf-bf16-prune")
CASES += ("hf-bf16-merge", "mlx-bf16-export", "hf-bf16-export")
MARGIN = 300_000_000


@dataclass(frozen=True)
class Result:
    """One case: medians over the turns."""

    case: str
    parent_gb: float
    written_gb: float
    write_seconds: float
    copy_seconds: float
    peak_mb: float
    bound_mb: float

    @property
    def ratio(self) -> float:
        """Speed of writing over speed of copying."""
        return self.copy_seconds / self.write_seconds


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gigabytes", type=float, default=3.0, help="of each parent")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=CASES)
    parser.add_argument("--ratio", type=float, default=0.25, help="of the experts that go")
    parser.add_argument("--place", help="a folder on the disk to measure; default: a temporary one")
    parser.add_argument("--json", help="write all figures there")
    parser.add_argument("--child", nargs=4, metavar="ARG", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    """Measure and print."""
    asked, console = _arguments(), Console()
    if asked.child:
        print(json.dumps(_write(*asked.child)))
        return
    results: list[Result] = []
    for layout in dict.fromkeys(case.rpartition("-")[0] for case in asked.cases):
        kinds = [case for case in asked.cases if case.startswith(layout)]
        with tempfile.TemporaryDirectory(dir=asked.place, prefix="checkpoint-io-") as place:
            parent = Path(place, "parent")
            largest = _generate(parent, layout, asked.gigabytes)
            for case in kinds:
                console.print(f"{case} ...", style="dim")
                results.append(_measure(case, parent, largest, asked))
    console.print(_table(results))
    if asked.json:
        rows = [{**asdict(each), "ratio": each.ratio} for each in results]
        content = {**where(), "cores": os.cpu_count(), "ratio": asked.ratio, "results": rows}
        Path(asked.json).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _table(results: list[Result]) -> Table:
    table = Table("case", "parent", "written", "write", "copy", "speed", "memory", "bound")
    for each in results:
        table.add_row(
            each.case,
            f"{each.parent_gb:.2f} GB",
            f"{each.written_gb:.2f} GB",
            f"{each.write_seconds:.2f} s",
            f"{each.copy_seconds:.2f} s",
            f"{each.ratio:.2f} x",
            f"{each.peak_mb:.0f} MB",
            f"{each.bound_mb:.0f} MB",
        )
    return table


def _measure(case: str, parent: Path, largest: int, asked: argparse.Namespace) -> Result:
    output, copied = parent.with_name("smaller"), parent.with_name("copied")
    kind = case.rpartition("-")[2]
    writes, copies, peaks = [], [], []
    for _ in range(asked.repetitions):
        command = [sys.executable, __file__, "--child", str(parent), str(output), kind]
        done = subprocess.run(
            [*command, str(asked.ratio)], stdout=subprocess.PIPE, text=True, check=True
        )
        found = json.loads(done.stdout)
        writes.append(found["seconds"])
        peaks.append(found["peak"])
        copies.append(_copy(output, copied))
        size = _size(output)
        shutil.rmtree(output)
        shutil.rmtree(copied)
    return Result(
        case,
        _size(parent) / 1e9,
        size / 1e9,
        statistics.median(writes),
        statistics.median(copies),
        max(peaks) / 1e6,
        (3 * largest + MARGIN) / 1e6,
    )


def _copy(source: Path, target: Path) -> float:
    """Read and write every byte; `cp` may let the file system share them instead."""
    start = time.perf_counter()
    target.mkdir()
    for file in (file for file in source.iterdir() if file.is_file()):
        with file.open("rb") as content, (target / file.name).open("wb") as copied:
            shutil.copyfileobj(content, copied, 1 << 20)
            copied.flush()
            os.fsync(copied.fileno())
    return time.perf_counter() - start


def _size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def _write(parent: str, output: str, kind: str, ratio: str) -> dict[str, float]:
    """In a process of its own: seconds and peak memory of one smaller model."""
    from moe_lens.compress.checkpoint.checkpoint import write_checkpoint
    from moe_lens.compress.plan.plan import Plan
    from moe_lens.compress.tensors.parent import open_parent
    from moe_lens.machine.process import usage

    before = usage().peak_memory or 0
    start = time.perf_counter()
    opened = open_parent(parent)
    exported = kind == "export"
    plan: Plan = _plan(opened, "prune" if exported else kind, float(ratio))
    Path(output).mkdir()
    write_checkpoint(opened, plan, Path(output), format="hf" if exported else "mlx")
    return {"seconds": time.perf_counter() - start, "peak": (usage().peak_memory or 0) - before}


def _plan(parent: Any, kind: str, ratio: float) -> Any:
    """A plan that removes every n-th expert, or merges it into the one before."""
    from moe_lens.compress.plan.identity import CorpusIdentity, ModelIdentity
    from moe_lens.compress.plan.plan import ExpertGroup, LayerPlan, Plan

    model = ModelIdentity("generated", "qwen3_moe", "qwen3_moe", "", EXPERTS, EXPERTS, ACTIVE)
    step = round(1 / ratio)
    gone = set(range(step - 1, EXPERTS, step))
    groups = tuple(
        ExpertGroup((e, e + 1), (0.5, 0.5))
        if kind == "merge" and e + 1 in gone
        else ExpertGroup.single(e)
        for e in range(EXPERTS)
        if e not in gone
    )
    removed = () if kind == "merge" else tuple(sorted(gone))
    layers = tuple(LayerPlan(each.layer, groups, removed) for each in parent.layers)
    text = CorpusIdentity("none", "0" * 64, 0, 0)
    return Plan(kind, model, text, EXPERTS - len(gone), ACTIVE, layers)


def _generate(folder: Path, layout: str, gigabytes: float) -> int:
    """Write a parent; returns the bytes of its largest tensor as MLX holds it."""
    bits = 4 if layout.endswith("4bit") else None
    layer = EXPERTS * 3 * HIDDEN * WIDTH * (4.5 / 8 if bits else 2)
    config = qwen3_moe_config(
        layers=max(1, round((gigabytes * 1e9 - 4 * VOCABULARY * HIDDEN) / layer)),
        hidden=HIDDEN,
        width=WIDTH,
        experts=EXPERTS,
        active=ACTIVE,
        vocabulary=VOCABULARY,
        heads=(16, 4, 128),
    )
    model = Model(ModelArgs.from_dict(config))
    model.set_dtype(mx.bfloat16)
    if bits:
        nn.quantize(model, 64, bits)
        config["quantization"] = {"group_size": 64, "bits": bits}
    shapes = {name: (v.shape, v.dtype) for name, v in tree_flatten(model.parameters())}
    folder.mkdir()
    write_shards(
        folder,
        dict(_tensors(shapes, per_expert=layout.startswith("hf"))),
        sum(math.prod(shape) for shape, _ in shapes.values()),
        shard_bytes=1 << 30,
    )
    (folder / "config.json").write_text(json.dumps(config, indent=4), encoding="utf-8")
    copy_tokenizer(folder)
    return max(math.prod(shape) * dtype.size for shape, dtype in shapes.values())


def _tensors(shapes: dict[str, Any], *, per_expert: bool) -> Iterator[tuple[str, mx.array]]:
    """Lazy tensors of harmless numbers; what they are does not change how fast they are copied."""
    base = np.random.default_rng(0).integers(0, 1 << 16, 1 << 22, dtype=np.uint16)
    numbers = {
        mx.bfloat16: mx.array((base & 0x807F) | 0x3C00).view(mx.bfloat16),
        mx.uint32: mx.array(base).view(mx.uint32),
    }
    for name, (shape, dtype) in shapes.items():
        if per_expert and ".switch_mlp." in name:
            for expert in range(shape[0]):
                single = name.replace("switch_mlp", f"experts.{expert}")
                yield single, _filled(shape[1:], numbers[dtype])
        else:
            yield name, _filled(shape, numbers[dtype])


def _filled(shape: tuple[int, ...], numbers: mx.array) -> mx.array:
    count = math.prod(shape)
    whole = mx.broadcast_to(numbers, (-(-count // numbers.size), numbers.size))
    return whole.reshape(-1)[:count].reshape(shape)


if __name__ == "__main__":
    main()
