"""Calibrating a model larger than memory, against reading its weights once and running it whole.

    python benchmarks/streaming.py
    python benchmarks/streaming.py --layers 8 --tokens 512 --json streaming.json

A Qwen3-MoE checkpoint in bfloat16 is generated (64 experts of width 256 behind 1024 hidden values,
0.1 GB a layer) and deleted again. Each row is a process of its own:

- read: every tensor is read from the files, once, and let go of;
- forward: the model is loaded whole, and runs the text; seconds of the forwards alone;
- whole: the same, calibrated: routed statistics, and with --similarity every expert on every token;
- streamed: calibrated layer by layer, in a process that Linux grants a quarter of the bytes of the
  checkpoint as memory beyond what Python and its libraries take (RLIMIT_DATA).

The ratio is streamed / (read + forward); the statistics of `whole` and `streamed` are compared bit
for bit. The experts are computed by segment on a CPU, as `compress` does. The second table takes
the streamed calibration, without a limit, at three numbers of layers and three numbers of tokens:
where the cost is linear, seconds per layer and token stay.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
from generated import copy_tokenizer, qwen3_moe_config
from mlx.utils import tree_flatten
from mlx_lm.models.qwen3_moe import Model, ModelArgs
from rich.console import Console
from rich.table import Table
from turns import where

from moe_lens.compress import calibrate
from moe_lens.compress.checkpoint.tensor_file import write_shards
from moe_lens.compress.statistics.statistics_file import save_statistics
from moe_lens.corpus import Corpus, Prompt
from moe_lens.router import ExpertRouter

HIDDEN, WIDTH, EXPERTS, ACTIVE, PROMPT = 1024, 256, 64, 8, 256


@dataclass(frozen=True)
class Run:
    """One process: what it did, for how long, and the most memory it took beyond its start."""

    name: str
    layers: int
    tokens: int
    seconds: float
    peak_mb: float


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--similarity", action="store_true", help="calibrate for a merge")
    parser.add_argument("--place", help="a folder on the disk to use; default: a temporary one")
    parser.add_argument("--json", help="write all figures there")
    parser.add_argument("--child", nargs=4, metavar="ARG", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    """Measure and print."""
    asked, console = _arguments(), Console()
    if asked.child:
        name, folder, tokens, output = asked.child
        print(json.dumps(_child(name, Path(folder), int(tokens), Path(output), asked.similarity)))
        return
    with tempfile.TemporaryDirectory(dir=asked.place, prefix="streaming-") as place:
        model = Path(place, "model")
        _generate(model, asked.layers)
        size = sum(file.stat().st_size for file in model.glob("*.safetensors"))
        runs = []
        for name in ("read", "forward", "whole", "streamed"):
            console.print(f"{name} ...", style="dim")
            runs.append(_run(name, model, asked.layers, asked.tokens, asked.similarity))
        same = (model / "whole.st").read_bytes() == (model / "streamed.st").read_bytes()
        console.print(_table(runs))
        read, forward, _, streamed = runs
        ratio = streamed.seconds / (read.seconds + forward.seconds)
        console.print(
            f"{size / 1e9:.2f} GB of weights, {size / 4e9:.2f} GB of memory granted; "
            f"streamed / (read + forward): {ratio:.2f}; statistics bit for bit the same: {same}"
        )
        linear = [
            _run("unlimited", model, asked.layers, asked.tokens * times, asked.similarity)
            for times in (1, 2, 4)
        ]
        for layers in (asked.layers // 2, asked.layers // 4):
            shutil.rmtree(model)
            _generate(model, layers)
            linear.append(_run("unlimited", model, layers, asked.tokens, asked.similarity))
        console.print(_table(linear))
    if asked.json:
        content = {
            **where(),
            "bytes": size,
            "ratio": ratio,
            "same_statistics": same,
            "runs": [asdict(each) for each in runs],
            "linear": [asdict(each) for each in linear],
        }
        Path(asked.json).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _table(runs: list[Run]) -> Table:
    table = Table("", "layers", "tokens", "seconds", "ms per layer and token", "peak memory")
    for run in runs:
        table.add_row(
            run.name,
            str(run.layers),
            str(run.tokens),
            f"{run.seconds:.1f}",
            f"{1e3 * run.seconds / run.layers / run.tokens:.3f}",
            f"{run.peak_mb:.0f} MB",
        )
    return table


def _generate(folder: Path, layers: int) -> None:
    """Random weights, written tensor by tensor; the tokenizer is the demo's."""
    folder.mkdir()
    copy_tokenizer(folder)
    config = qwen3_moe_config(
        layers=layers,
        hidden=HIDDEN,
        width=WIDTH,
        experts=EXPERTS,
        active=ACTIVE,
        vocabulary=4096,
        heads=(8, 4, 128),
    )
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    mx.random.seed(0)
    model = Model(ModelArgs.from_dict(config))
    model.set_dtype(mx.bfloat16)
    tensors = dict(tree_flatten(model.parameters()))
    del model  # nothing of it is computed yet, and nothing of it is to be kept
    write_shards(folder, tensors, 0, shard_bytes=1 << 30)


def _run(name: str, model: Path, layers: int, tokens: int, similarity: bool) -> Run:
    command = [sys.executable, __file__, *(["--similarity"] if similarity else [])]
    command += ["--child", name, str(model), str(tokens)]
    done = subprocess.run(
        [*command, str(model / f"{name}.st")], stdout=subprocess.PIPE, text=True, check=True
    )
    found = json.loads(done.stdout)
    return Run(name, layers, tokens, found["seconds"], found["peak"] / 1e6)


def _child(name: str, folder: Path, tokens: int, output: Path, similarity: bool) -> dict[str, Any]:
    for file in folder.glob("*.safetensors"):  # threads and their stacks are there before we count
        small = [value for value in mx.load(str(file)).values() if value.size < 1 << 18]
        mx.eval([value.astype(mx.float32) for value in small])
    mx.eval(mx.zeros((256, 256)) @ mx.zeros((256, 256)))
    start_memory = _status("VmRSS")
    if name == "streamed":
        size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
        most = _status("VmData") + size // 4
        resource.setrlimit(resource.RLIMIT_DATA, (most, most))
    seconds = _seconds(name, folder, tokens, output, similarity)
    return {"seconds": seconds, "peak": _status("VmHWM") - start_memory}


def _seconds(name: str, folder: Path, tokens: int, output: Path, similarity: bool) -> float:
    start = time.perf_counter()
    if name == "read":
        for file in sorted(folder.glob("*.safetensors")):
            for tensor in list(values := mx.load(str(file))):
                mx.eval(values.pop(tensor))
        return time.perf_counter() - start
    router = ExpertRouter.from_pretrained(folder, stream=name in ("streamed", "unlimited"))
    router.cpu_experts = "auto"
    text = _text(router, tokens)
    if name == "forward":
        ids = [router.encode(prompt.text)[:PROMPT] for prompt in text.prompts]
        mx.eval(router.forward(ids[:1]))
        start = time.perf_counter()
        for each in ids:  # the head is not computed in a calibration
            mx.eval(router.model.model(mx.array([each])))
        return time.perf_counter() - start
    if name == "whole":
        start = time.perf_counter()
    found = calibrate(router, text, sequence_length=PROMPT, similarity=similarity)
    seconds = time.perf_counter() - start
    save_statistics(found, output)
    return seconds


def _text(router: ExpertRouter, tokens: int) -> Corpus:
    """Prompts of `PROMPT` tokens or a little more, which are cut."""
    words = [f"{number * number % 9973} " for number in range(4 * tokens)]
    prompts, start = [], 0
    for _ in range(tokens // PROMPT):
        stop = start
        while len(router.encode("".join(words[start:stop]) or " ")) < PROMPT:
            stop += 16
        prompts.append(Prompt(text="".join(words[start:stop])))
        start = stop
    return Corpus(name="numbers", prompts=tuple(prompts))


def _status(line: str) -> int:
    """Bytes of a line of /proc/self/status."""
    for each in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if each.startswith(f"{line}:"):
            return int(each.split()[1]) * 1024
    raise SystemExit("this benchmark reads /proc/self/status, which only Linux has")


if __name__ == "__main__":
    main()
