"""Calibration on one core of a CPU, against the plain forward of stock MLX and of torch.

    python benchmarks/cpu.py
    python benchmarks/cpu.py --torch /somewhere/bin/python --json cpu.json

A random Qwen3-MoE of 4 layers with 64 experts (hidden 256, width 256, 8 per token) reads 4096
tokens, in 8 rows. Every variant runs in a process of its own on one core, with and without
OpenBLAS preloaded (MLX's Linux wheel carries the reference BLAS), in turns whose order rotates.
Counted is processor time, after a first forward that is not counted. Plain forwards stop before
the head, which a calibration does not compute either. A calibration is what `calibrate` does for
methods that remove experts: the forward, the routed sums, and the proof that watching changes
nothing.

The torch forward is that of transformers' `Qwen3MoeForCausalLM` from the same checkpoint, on one
thread, with its own default experts and attention. It needs an interpreter that has both.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

HIDDEN, EXPERTS, ACTIVE, WIDTH, VOCAB, ROWS = 256, 64, 8, 256, 1024, 8
OPENBLAS = "/usr/lib/x86_64-linux-gnu/openblas-serial/libopenblas.so.0"

SLOWER, FASTER = 1.6, 2.5
"""A segmented calibration with OpenBLAS takes at most so many plain torch forwards, and is at least
so many times faster than stock MLX's plain forward without it."""


@dataclass(frozen=True)
class Variant:
    """What runs in a process of its own."""

    work: str
    """``forward`` or ``calibration``."""
    by: str
    """``torch``, or how MLX computes experts: ``stock`` or ``segmented``."""
    openblas: bool = False

    @property
    def name(self) -> str:
        blas = {"torch": ""}.get(self.by, ", OpenBLAS" if self.openblas else ", reference BLAS")
        return f"{self.by} {self.work}{blas}"


TORCH = Variant("forward", "torch")
STOCK = Variant("forward", "stock")
TARGET = Variant("calibration", "segmented", openblas=True)
VARIANTS = (
    TORCH,
    *(
        Variant(work, by, openblas)
        for openblas in (False, True)
        for by in ("stock", "segmented")
        for work in ("forward", "calibration")
    ),
)


# In a process of its own -------------------------------------------------------------------------


def token_ids(tokens: int) -> np.ndarray:
    """[8, tokens / 8]."""
    return np.random.default_rng(1).integers(0, VOCAB, (ROWS, tokens // ROWS))


def torch_forward(folder: Path, ids: np.ndarray) -> tuple[Callable[[], Any], np.ndarray]:
    """The plain forward, and the logits of the first row."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    given = torch.from_numpy(ids)

    def run() -> None:
        with torch.no_grad():
            model.model(given, use_cache=False)

    with torch.no_grad():
        return run, model(given[:1]).logits.numpy()


def mlx_work(
    folder: Path, ids: np.ndarray, work: str, cpu_experts: str
) -> tuple[Callable[[], Any], np.ndarray]:
    """The forward or the calibration, and the logits of the first row."""
    import mlx.core as mx
    from mlx_lm.utils import load_model

    from moe_lens.compress.calibration.calibration import collect
    from moe_lens.compress.calibration.sink import CalibrationSink
    from moe_lens.router import ExpertRouter

    model, config = load_model(folder)
    router = ExpertRouter(model, None, config)
    router.cpu_experts = cpu_experts
    body: Any = model
    given = mx.array(ids)

    def forward() -> None:
        mx.eval(body.model(given))

    def calibration() -> None:
        sink = CalibrationSink(router.layers, similarity=False)
        collect(router, sink, ids.tolist(), 0, 0)
        assert sink.tokens == ids.size

    logits = np.array(router.forward(ids[:1]))
    return {"forward": forward, "calibration": calibration}[work], logits


def child(options: argparse.Namespace) -> None:
    """Run one variant, and print what it took."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    ids = token_ids(options.tokens)
    if options.by == "torch":
        run, logits = torch_forward(options.folder, ids)
    else:
        run, logits = mlx_work(options.folder, ids, options.work, options.by)
    np.save(options.folder / f"{options.by}.npy", logits)
    run()
    cpu, wall = time.process_time(), time.perf_counter()
    run()
    taken = {"cpu": time.process_time() - cpu, "wall": time.perf_counter() - wall}
    print(json.dumps(taken))


# All variants ------------------------------------------------------------------------------------


def save_model(folder: Path, layers: int) -> None:
    """A random model in Hugging Face's layout, which MLX and torch both read."""
    from generated import qwen3_moe_config
    from safetensors.numpy import save_file

    heads, pairs, head = 4, 2, HIDDEN // 4
    config = qwen3_moe_config(
        layers=layers,
        hidden=HIDDEN,
        width=WIDTH,
        experts=EXPERTS,
        active=ACTIVE,
        vocabulary=VOCAB,
        heads=(heads, pairs, head),
    )
    config |= {"architectures": ["Qwen3MoeForCausalLM"], "torch_dtype": "float32"}
    draw = np.random.default_rng(0)

    def random(*shape: int) -> np.ndarray:
        return draw.standard_normal(shape, dtype=np.float32) / np.float32(shape[-1] ** 0.5)

    ones = np.ones(HIDDEN, np.float32)
    tensors = {"model.norm.weight": ones, "lm_head.weight": random(VOCAB, HIDDEN)}
    tensors["model.embed_tokens.weight"] = random(VOCAB, HIDDEN) * 4
    for layer in range(layers):
        at = f"model.layers.{layer}"
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{at}.{norm}.weight"] = ones
        for name, out in (("q", heads), ("k", pairs), ("v", pairs)):
            tensors[f"{at}.self_attn.{name}_proj.weight"] = random(out * head, HIDDEN)
        tensors[f"{at}.self_attn.o_proj.weight"] = random(HIDDEN, heads * head)
        for norm in ("q_norm", "k_norm"):
            tensors[f"{at}.self_attn.{norm}.weight"] = np.ones(head, np.float32)
        tensors[f"{at}.mlp.gate.weight"] = random(EXPERTS, HIDDEN)
        for expert in range(EXPERTS):
            for name, shape in (("gate", (WIDTH, HIDDEN)), ("up", (WIDTH, HIDDEN))):
                tensors[f"{at}.mlp.experts.{expert}.{name}_proj.weight"] = random(*shape)
            tensors[f"{at}.mlp.experts.{expert}.down_proj.weight"] = random(HIDDEN, WIDTH)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))


def run(variant: Variant, options: argparse.Namespace, folder: Path) -> dict[str, float]:
    """One turn of a variant."""
    interpreter = options.torch if variant is TORCH else sys.executable
    words = [str(Path(__file__)), "--tokens", str(options.tokens), "--folder", str(folder)]
    words += ["--by", variant.by, "--work", variant.work]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    environment |= {"MKL_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    environment.pop("LD_PRELOAD", None)
    if variant.openblas:
        environment["LD_PRELOAD"] = options.openblas
    done = subprocess.run(
        [interpreter, *words], env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(f"{variant.name} failed:\n{done.stderr[-2000:]}")
    taken: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return taken


def possible(options: argparse.Namespace) -> tuple[list[Variant], list[str]]:
    """The variants that can run here, and why others cannot."""
    chosen, reasons = list(VARIANTS), []
    tried = subprocess.run(
        [options.torch, "-c", "import torch, transformers"], capture_output=True, check=False
    )
    if tried.returncode:
        chosen.remove(TORCH)
        reasons.append(f"{options.torch} lacks torch or transformers: give --torch PYTHON")
    if not Path(options.openblas).is_file():
        chosen = [each for each in chosen if not each.openblas]
        reasons.append(f"there is no {options.openblas}: install libopenblas0-serial")
    return chosen, reasons


def agreement(folder: Path) -> dict[str, dict[str, float]]:
    """How far the logits of the first row are from those of stock MLX."""
    stock = np.load(folder / "stock.npy")
    found = {}
    for by in ("segmented", "torch"):
        if (folder / f"{by}.npy").is_file():
            logits = np.load(folder / f"{by}.npy")
            found[by] = {
                "relative": float(np.abs(logits - stock).max() / np.abs(stock).max()),
                "same_argmax": float((logits.argmax(-1) == stock.argmax(-1)).mean()),
            }
    return found


def show(taken: dict[Variant, list[dict[str, float]]]) -> None:
    """Print the table."""
    from rich.console import Console
    from rich.table import Table

    title = f"processor time on one core; torch: {TORCH.name}, stock: {STOCK.name}"
    table = Table(title=title, title_justify="left")
    table.add_column("variant", no_wrap=True)
    for heading in ("median", "fastest", "/ torch", "stock /"):
        table.add_column(heading, justify="right")
    for variant, turns in taken.items():
        cpu = [turn["cpu"] for turn in turns]
        table.add_row(
            variant.name,
            f"{statistics.median(cpu):.2f} s",
            f"{min(cpu):.2f} s",
            f"{ratio(taken, variant, TORCH):.2f}" if TORCH in taken else "",
            f"{ratio(taken, STOCK, variant):.2f}",
        )
    Console().print(table)


def ratio(
    taken: dict[Variant, list[dict[str, float]]], variant: Variant, against: Variant
) -> float:
    """The median over the turns of variant / against, in processor time."""
    pairs = zip(taken[variant], taken[against], strict=True)
    return statistics.median(one["cpu"] / other["cpu"] for one, other in pairs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--torch", default=sys.executable, help="Python with torch, transformers")
    parser.add_argument("--openblas", default=OPENBLAS, help="the library to preload")
    parser.add_argument("--json", type=Path, help="also write all samples to this file")
    for hidden in ("--by", "--work"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.by is not None:
        child(options)
        return
    from rich.progress import track
    from turns import where

    chosen, reasons = possible(options)
    taken: dict[Variant, list[dict[str, float]]] = {variant: [] for variant in chosen}
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        save_model(folder, options.layers)
        for turn in track(range(options.repetitions), description="turns", transient=True):
            shift = turn % len(chosen)
            for variant in chosen[shift:] + chosen[:shift]:
                taken[variant].append(run(variant, options, folder))
        close = agreement(folder)
    print(f"{options.tokens:,} tokens, {options.layers} layers, {options.repetitions} repetitions")
    show(taken)
    for by, found in close.items():
        print(
            f"{by}: logits within {found['relative']:.1e} of stock MLX (relative to the largest), "
            f"the same first choice on {found['same_argmax']:.2%} of the tokens"
        )
    for reason in reasons:
        print(f"left out: {reason}")
    report: dict[str, Any] = {
        **where(),
        "tokens": options.tokens,
        "layers": options.layers,
        "agreement": close,
        "left_out": reasons,
        "results": {variant.name: turns for variant, turns in taken.items()},
        "targets": targets(taken),
    }
    if options.json is not None:
        options.json.write_text(json.dumps(report, indent=2))


def targets(taken: dict[Variant, list[dict[str, float]]]) -> dict[str, float]:
    """Print and return the two ratios that have a target."""
    found: dict[str, float] = {}
    if TARGET not in taken:
        return found
    if TORCH in taken:
        found["of_torch"] = ratio(taken, TARGET, TORCH)
        met = "met" if found["of_torch"] <= SLOWER else "missed"
        print(f"{TARGET.name} / torch forward: {found['of_torch']:.2f}, target {SLOWER} {met}")
    # The same with the other BLAS, so that what segments bring is told from what OpenBLAS brings.
    slow = Variant("calibration", "segmented")
    for name, faster in (("times_faster", TARGET), ("times_faster_alone", slow)):
        found[name] = ratio(taken, STOCK, faster)
        met = "met" if found[name] >= FASTER else "missed"
        print(f"{STOCK.name} / {faster.name}: {found[name]:.2f}, target {FASTER} {met}")
    return found


if __name__ == "__main__":
    main()
