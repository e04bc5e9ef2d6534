"""Writing the smaller model as a folder that stock ``mlx_lm.load`` opens."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx_lm.utils import save_config

from moe_lens.errors import MoeLensError, UsageError

from .assemble import assemble
from .config import smaller_config
from .identity import fingerprint_folder
from .parameters import check_fits, smaller_parameters
from .parent import Parent, open_parent, release
from .plan import Plan
from .plan_json import read_plan, validate
from .size import Size
from .staging import Say, check_output, check_space, staged
from .tensor_file import SHARD_BYTES, write_shards

Progress = Callable[[int, int], None]

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
        "verification.json",
        "upcycling.json",
    }
)
"""Not copied: written anew, or true of the parent only."""

_LARGEST_COPY = 256 << 20


def write(
    plan: Plan | str | Path,
    source: str | Path,
    output: str | Path,
    *,
    force: bool = False,
    shard_bytes: int = SHARD_BYTES,
    revision: str | None = None,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
    say: Say | None = None,
) -> Path:
    """Apply a plan to the checkpoint it was made from; nothing is measured.

    The folder appears when it is complete, or not at all. Memory: the largest tensor and, where
    experts are merged, one group of them in float32.

    Args:
        plan: A plan, or the path of its JSON.
        source: The parent: a folder, a hub id, or ``demo``.
        output: The folder to make.
        force: Replace a model that stands at `output`, once the new one is complete.
        shard_bytes: Largest weight file.
        progress: Called with bytes written and bytes in all.
        say: Called with sentences a user should see.

    Raises:
        UsageError: The plan is for another checkpoint, or the output is refused.
        MoeLensError: The disk is full or cannot be written.
    """
    from .card import write_card

    checked = plan if isinstance(plan, Plan) else read_plan(plan)
    validate(checked)
    parent = open_parent(source, revision=revision, trust_remote_code=trust_remote_code)
    folder = Path(output).expanduser().absolute()
    check_output(folder, parent.path, force=force)
    with staged(folder, force=force, say=say) as partial:
        write_checkpoint(
            parent, checked, partial, shard_bytes=shard_bytes, progress=progress, say=say
        )
        write_card(partial, parent, checked)
    return folder


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
