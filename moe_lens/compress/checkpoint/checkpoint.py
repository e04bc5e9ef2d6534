"""Writing the smaller model as a folder that stock ``mlx_lm.load`` opens."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx_lm.utils import save_config

from moe_lens.compress.plan.identity import fingerprint_folder
from moe_lens.compress.plan.plan import Plan
from moe_lens.compress.telling import Progress, Say
from moe_lens.compress.tensors.parameters import check_fits, smaller_parameters
from moe_lens.compress.tensors.parent import Parent, release
from moe_lens.compress.tensors.size import Size
from moe_lens.errors import MoeLensError, UsageError

from .assemble import assemble
from .config import smaller_config
from .model_file import write_model_file
from .staging import check_space
from .tensor_file import SHARD_BYTES, write_shards

_WEIGHTS = frozenset(
    ".safetensors .bin .pt .pth .ckpt .gguf .ggml .onnx .h5 .msgpack .npz .npy .tflite".split()
)
_OURS = frozenset(
    {
        "config.json",
        "model.safetensors.index.json",
        "hf_quant_config.json",
        "README.md",
        "plan.json",
        "report.json",
        "card.json",
        "training.json",
        "upcycling.json",
    }
)
"""Not copied: written anew, or true of the parent only."""

_LARGEST_COPY = 256 << 20


def write_checkpoint(
    parent: Parent,
    plan: Plan,
    folder: Path,
    *,
    shard_bytes: int = SHARD_BYTES,
    progress: Progress | None = None,
    say: Say | None = None,
) -> None:
    """Write weights, config, tokenizer and plan into an existing empty folder.

    Consumes `parent`: its parameters are freed on the way.

    Raises:
        UsageError: The plan is for another checkpoint.
        MoeLensError: Not enough room, or a weight file of the parent cannot be read.
    """
    check_fingerprint(parent, plan)
    check_fits(parent, plan)
    config = smaller_config(parent, plan)
    tensors = smaller_parameters(parent, plan)
    size = _size(parent, config, tensors)
    check_space(folder, size.bytes)
    done = 0

    def written(bytes_written: int) -> None:
        nonlocal done
        done += bytes_written
        if progress is not None:
            progress(done, size.bytes)

    try:
        write_shards(folder, tensors, size.parameters, shard_bytes=shard_bytes, written=written)
    except (RuntimeError, ValueError) as error:
        raise MoeLensError(
            f"the weights of {parent.path} cannot be read or converted ({error}); check that the "
            "download is complete"
        ) from error
    save_config(copy.deepcopy(config), folder / "config.json", keep_vision_config=True)
    copy_small_files(parent.path, folder, say)
    if plan.per_layer:
        write_model_file(folder)
    (folder / "plan.json").write_text(plan.to_json(), encoding="utf-8")


def check_fingerprint(parent: Parent, plan: Plan) -> None:
    """Raise UsageError unless the plan was made from this very checkpoint."""
    if plan.model.fingerprint and plan.model.fingerprint != fingerprint_folder(parent.path):
        raise UsageError(
            f"the plan was made from another checkpoint than {parent.path} (their fingerprints "
            f"differ; the plan names {plan.model.name}); make a plan for this one"
        )


def _size(parent: Parent, config: dict[str, Any], tensors: dict[str, mx.array]) -> Size:
    """The size of the model to be written; mlx-lm's loader checks every name and shape on the way.

    Nothing is read for this, and the model is let go of, so that it holds no tensor in memory.
    """
    try:
        model = assemble(parent.path, config, dict(tensors))
    except (ValueError, RuntimeError) as error:
        raise MoeLensError(
            f"mlx-lm does not take a {parent.config.get('model_type')} model of this size: {error}"
        ) from error
    size = Size.of(model)
    release(model)
    return size


def copy_small_files(source: Path, folder: Path, say: Say | None = None) -> None:
    """Copy tokenizer, chat templates, generation config, code and licences beside the weights.

    Weight files, what describes the parent only, and hidden files stay. Links (the hub's cache is
    made of them) become files.
    """
    for file in sorted(source.iterdir()):
        if file.is_dir():
            if file.name == "additional_chat_templates":
                shutil.copytree(file, folder / file.name)
            continue
        if file.name.startswith(".") or file.name in _OURS or file.suffix.lower() in _WEIGHTS:
            continue
        if file.name.endswith(".safetensors.index.json"):
            continue
        if file.stat().st_size > _LARGEST_COPY:
            if say is not None:
                say(f"{file.name} is not copied: it is larger than 256 MiB")
            continue
        shutil.copyfile(file, folder / file.name)
