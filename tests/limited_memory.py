"""Runs a calibration in a process whose memory the operating system limits; see the test of it.

usage: python tests/limited_memory.py FOLDER TEXT OUTPUT [--stream] [--limit BYTES]
       python tests/limited_memory.py --compress LIMIT FOLDER ARGUMENT ...
       python tests/limited_memory.py --generate FOLDER LAYERS

The first prints the bytes that the process took beyond what it had when the limit was set; the
second runs ``moe-lens compress FOLDER ARGUMENT ...``.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
from pathlib import Path

import mlx.core as mx
from mlx.utils import tree_flatten
from mlx_lm.models.qwen3_moe import Model, ModelArgs

from moe_lens.cli import main as cli
from moe_lens.compress import calibrate
from moe_lens.compress.checkpoint.tensor_file import write_shards
from moe_lens.compress.statistics.statistics_file import save_statistics
from moe_lens.corpus import read_corpus
from moe_lens.errors import MoeLensError
from moe_lens.router import ExpertRouter
from tiny_models import CONFIGS, save_checkpoint

SIZES = dict(hidden_size=256, num_experts=64, moe_intermediate_size=512, mlp_only_layers=[])


def generate(folder: Path, layers: int) -> None:
    """A checkpoint of 100 MB a layer, written tensor by tensor."""
    save_checkpoint("qwen3_moe", folder)
    (folder / "model.safetensors").unlink()
    config = CONFIGS["qwen3_moe"] | SIZES | {"num_hidden_layers": layers}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    mx.random.seed(0)
    model = Model(ModelArgs.from_dict(config))
    tensors = dict(tree_flatten(model.parameters()))
    del model  # nothing of it is computed yet, and nothing of it is to be kept
    write_shards(folder, tensors, 0, shard_bytes=256 << 20)


def status(name: str) -> int:
    """Bytes of a line of /proc/self/status."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise KeyError(name)


def limit(more: int) -> None:
    """Allow this process so many bytes of data more than it has."""
    most = status("VmData") + more
    resource.setrlimit(resource.RLIMIT_DATA, (most, most))


def _start_threads(folder: Path) -> None:
    """Reading and multiplying once, so that stacks and buffers of the libraries are there."""
    for shard in folder.glob("*.safetensors"):
        small = [value for value in mx.load(str(shard)).values() if value.nbytes < 1 << 20]
        mx.eval([value.astype(mx.float32) @ value.T for value in small if value.ndim == 2], small)


def main(words: list[str]) -> int:
    if words[0] == "--generate":
        generate(Path(words[1]), int(words[2]))
        return 0
    if words[0] == "--compress":
        _start_threads(Path(words[2]))
        limit(int(words[1]))
        return cli(["compress", *words[2:]])
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--stream", action="store_true")
    parser.add_argument("--limit", type=int)
    asked = parser.parse_args(words)
    _start_threads(asked.folder)
    before = status("VmRSS")
    if asked.limit is not None:
        limit(asked.limit)
    try:
        router = ExpertRouter.from_pretrained(asked.folder, stream=asked.stream)
        found = calibrate(router, read_corpus(asked.text), similarity_tokens=64)
    except MoeLensError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    save_statistics(found, asked.output)
    told = {"peak": status("VmHWM") - before, "notes": router.notes}
    sys.stdout.write(json.dumps(told) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
