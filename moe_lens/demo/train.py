"""Train the demo model from nothing: ``python -m moe_lens.demo.train --output DIR``.

Corpus and tokenizer are made first, then stage 1 trains 8 experts with one per token, every expert
is split into two near copies (:mod:`moe_lens.demo.upcycle`), stage 2 trains the 16 experts with
two per token, and the result is quantised to 8 bit. DIR then holds what ``mlx_lm.load`` reads,
and the held-out prompts lie in ``--corpus``.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx_lm.utils import quantize_model, save_config, save_model
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from moe_lens.demo import network, upcycle
from moe_lens.demo.batches import (
    held_out_prompts,
    save_prompts,
    save_streams,
    tokenise,
    tokenizer_sample,
)
from moe_lens.demo.domains import DOMAINS, build_corpus
from moe_lens.demo.parallel import Report, Stage, run_stage
from moe_lens.demo.tokenizer import END_OF_TEXT_ID, save_tokenizer, train_tokenizer

EXPERTS = 8
"""Experts of stage 1; the finished model has twice as many."""

BLAS_HINT = """\
[yellow]OpenBLAS is not preloaded.[/] MLX's CPU build for Linux brings a slow matrix library, and
training is several times faster with OpenBLAS in its place (Debian: libopenblas0-serial):
  LD_PRELOAD=/usr/lib/x86_64-linux-gnu/openblas-serial/libopenblas.so.0 \\
    python -m moe_lens.demo.train ..."""


@dataclass(frozen=True)
class Recipe:
    """Everything that shapes the result besides the length; stored in ``training.json``."""

    learning_rate: float = 3e-3
    second_learning_rate: float = 6e-4
    second_router_rate: float = 0.15
    second_share: float = 0.2
    expert_noise: float = 0.07
    router_noise: float = 0.015


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m moe_lens.demo.train", description=__doc__)
    parser.add_argument("--output", type=Path, required=True, help="folder for the model")
    parser.add_argument("--corpus", type=Path, help="folder for the prompts (OUTPUT/corpus)")
    parser.add_argument("--work", type=Path, help="folder for checkpoints (a temporary one)")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--steps", type=int, default=4000, help="steps of both stages together")
    length.add_argument("--minutes", type=float, help="train for a time instead of for steps")
    parser.add_argument("--processes", type=int, default=2, help="one per core")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--stage1", type=Path, help="start from this finished or interrupted stage 1 checkpoint"
    )
    for name, value in asdict(Recipe()).items():
        flag = "--" + name.replace("_", "-")
        parser.add_argument(flag, type=float, default=value, help=f"default {value}")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    """Train, quantise and write the model folder."""
    options = parse(arguments)
    console = Console()
    if sys.platform == "linux" and not openblas_preloaded():
        console.print(BLAS_HINT, highlight=False)
    recipe = Recipe(**{name: getattr(options, name) for name in asdict(Recipe())})
    corpus_folder = options.corpus or options.output / "corpus"
    with tempfile.TemporaryDirectory() as temporary:
        work = options.work or Path(temporary)
        work.mkdir(parents=True, exist_ok=True)
        data = prepare(options.output, corpus_folder, work, options.seed, console)
        base = Stage(
            config=network.configuration(EXPERTS, top_k=1),
            data=data,
            start=None,
            end=work / "stage1.safetensors",
            learning_rate=recipe.learning_rate,
            processes=options.processes,
            seed=options.seed,
        )
        record = train(options, recipe, base, work, console)
    path = options.output / "training.json"
    path.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    console.print(f"Model written to {options.output}; next, to measure it and write its card:")
    command = f"  python -m moe_lens.demo.card {options.output} --corpus {corpus_folder}"
    console.print(command, soft_wrap=True, highlight=False)


def prepare(output: Path, corpus_folder: Path, work: Path, seed: int, console: Console) -> Path:
    """Make corpus, tokenizer and held-out prompts; returns the file with the training tokens."""
    console.print("Reading the standard library and generating the other domains")
    corpus = build_corpus(seed)
    tokenizer = train_tokenizer(tokenizer_sample(corpus, seed))
    save_tokenizer(tokenizer, output)
    streams = {name: tokenise(corpus.texts(name, "train"), tokenizer) for name in DOMAINS}
    for name, stream in streams.items():
        console.print(f"  {name:8} {len(stream.tokens):>9,} training tokens")
    data = work / "tokens.npz"
    save_streams(streams, data)
    for split in ("calibration", "evaluation"):
        prompts = held_out_prompts(corpus, split, tokenizer, seed)
        save_prompts(prompts, corpus_folder / f"{split}.jsonl")
    return data


def train(
    options: argparse.Namespace, recipe: Recipe, base: Stage, work: Path, console: Console
) -> dict[str, Any]:
    """Both stages and the split between them; writes the model and returns the training record."""
    lengths = []
    for share in (1 - recipe.second_share, recipe.second_share):
        if options.minutes:
            lengths.append({"steps": 0, "seconds": 60 * options.minutes * share})
        else:
            lengths.append({"steps": max(1, round(options.steps * share)), "seconds": 0.0})
    started = time.monotonic()
    reports: list[Report] = []
    first = replace(base, **lengths[0])
    if options.stage1 is None:
        reports.append(_shown("stage 1", first, console))
    pairs = upcycle.draw_pairs(EXPERTS, options.seed)
    weights = mx.load(str(options.stage1 or first.end))
    assert isinstance(weights, dict)
    doubled = upcycle.split_experts(
        weights, pairs, recipe.expert_noise, recipe.router_noise, options.seed
    )
    split_file = work / "split.safetensors"
    mx.save_safetensors(str(split_file), doubled)
    second = replace(
        base,
        config=network.configuration(2 * EXPERTS, top_k=2),
        start=split_file,
        end=work / "stage2.safetensors",
        learning_rate=recipe.second_learning_rate,
        router_rate=recipe.second_router_rate,
        seed=options.seed + 1,  # other windows than stage 1 began with
        **lengths[1],
    )
    reports.append(_shown("stage 2", second, console))
    write_model(second.end, second.config, options.output)
    upcycle.save_pairs(pairs, options.output / "upcycling.json")
    return {
        "recipe": asdict(recipe),
        "seed": options.seed,
        "processes": options.processes,
        "windows_per_step": base.rows * base.processes,
        "window_tokens": base.length,
        "stages": [asdict(report) for report in reports],
        "minutes": round((time.monotonic() - started) / 60, 1),
        "python": platform.python_version(),
        "openblas_preloaded": openblas_preloaded(),
        "machine": f"{platform.system()} {platform.machine()}, {options.processes} processes",
        "command": command_line(sys.argv[1:]),
    }


def openblas_preloaded() -> bool:
    """Whether the loader was told to bring OpenBLAS in before everything else."""
    return "openblas" in os.environ.get("LD_PRELOAD", "")


def command_line(arguments: list[str]) -> str:
    """The command as a reader would repeat it: without the folder of the checkpoints."""
    kept, skip = [], False
    for argument in arguments:
        if not skip and argument != "--work":
            kept.append(argument)
        skip = argument == "--work"
    return " ".join(["python -m moe_lens.demo.train", *kept])


def write_model(weights: Path, config: dict[str, Any], output: Path) -> None:
    """Quantise float32 weights to 8 bit in groups of 64 and write the model folder.

    The scales stay float32: on MLX's CPU back end they decode more than twice as fast as bfloat16
    ones, for a sixteenth more space.
    """
    model = network.build(config)
    model.load_weights(str(weights))
    model, quantised = quantize_model(model, config, group_size=64, bits=8)
    save_model(output, model)
    (output / "model.safetensors.index.json").unlink()  # one file needs no index
    save_config(quantised, output / "config.json")
    generation = {"eos_token_id": END_OF_TEXT_ID, "do_sample": False, "max_length": 512}
    path = output / "generation_config.json"
    path.write_text(json.dumps(generation, indent=2) + "\n", encoding="utf-8")


def _shown(name: str, stage: Stage, console: Console) -> Report:
    """Run a stage with a progress bar, or with a line now and then where there is no terminal."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f} % {task.fields[state]}"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(name, total=1.0, state="")

        def show(report: Report) -> None:
            speed = report.tokens / max(report.seconds, 1e-9)
            state = (
                f"step {report.step:,}  loss {report.cross_entropy:.3f}  "
                f"balance {report.balance:.2f}  {speed:,.0f} tokens/s"
            )
            progress.update(task, completed=report.progress, state=state)
            if not console.is_terminal and report.step % 100 == 0:
                console.print(f"{name} {report.progress:4.0%} {state}", highlight=False)

        return run_stage(stage, show)


if __name__ == "__main__":
    main()
