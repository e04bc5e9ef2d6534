"""Writing the smaller model as a folder that stock ``mlx_lm.load`` opens."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Container
from pathlib import Path

from mlx_lm.utils import save_config

from moe_lens.checkpoint_files.unchanged import FolderState
from moe_lens.compress.plan.identity import fingerprint_folder
from moe_lens.compress.plan.plan import Plan
from moe_lens.compress.resuming.output_place import check_space
from moe_lens.compress.resuming.whole_shards import WholeShards
from moe_lens.compress.tensors.parameters import check_fits
from moe_lens.compress.tensors.parent import Parent, release
from moe_lens.compress.tensors.size import Size
from moe_lens.errors import MoeLensError, UnsupportedModelError, UsageError
from moe_lens.fingerprint import TOKENIZER_FILES
from moe_lens.telling import Progress, Say

from .assemble import assemble
from .content import Content, content_of
from .model_file import write_model_file
from .tensor_file import SHARD_BYTES, write_shards

_WEIGHTS = frozenset(
    ".safetensors .bin .pt .pth .ckpt .gguf .ggml .onnx .h5 .msgpack .npz .npy .tflite".split()
)
_OURS = frozenset(
    {
        "config.json",
        "model.safetensors.index.json",
        "README.md",
        "plan.json",
        "report.json",
        "card.json",
        "training.json",
        "upcycling.json",
    }
)
"""Not copied: written anew, or true of the parent only."""

_PACKING = "hf_quant_config.json"
"""How the parent is packed; true of a smaller model whose tensors are the parent's own."""

_LARGEST_COPY = 256 << 20


def write_checkpoint(
    parent: Parent,
    plan: Plan,
    folder: Path,
    *,
    format: str = "mlx",
    shard_bytes: int = SHARD_BYTES,
    whole: WholeShards | None = None,
    progress: Progress | None = None,
    say: Say | None = None,
) -> None:
    """Write weights, config, tokenizer and plan into an existing folder.

    Consumes `parent`: its parameters are freed on the way. The folder is empty, or holds weight
    files that are `whole`, which are not written again. `format` is one of `FORMATS`;
    what is written for transformers must then be compared (`check_same_parameters`).

    Raises:
        UsageError: The plan is for another checkpoint.
        UnsupportedModelError: The model cannot be laid out as transformers reads it.
        MoeLensError: Not enough room, a weight file of the parent cannot be read or changes
            meanwhile, or experts or routers hold NaN or infinity.
    """
    before = FolderState.of(parent.path)
    check_fingerprint(parent, plan)
    check_fits(parent, plan)
    content = content_of(parent, plan, format, say)
    size = _size(parent, content)
    stored = sum(value.nbytes for value in content.tensors.values())
    check_space(folder, stored - (0 if whole is None else whole.bytes))
    done = 0

    def written(size: int, now: bool) -> None:
        nonlocal done
        done += size
        if progress is not None and not now:
            progress(done, None)
        if progress is not None:
            progress(done, stored)

    try:
        write_shards(
            folder,
            content.tensors,
            size.parameters,
            shard_bytes=shard_bytes,
            whole=whole,
            written=written,
            finite=content.routed,
            dtypes=content.dtypes,
            made_for="pt" if format == "hf" else "mlx",
        )
    except (RuntimeError, ValueError) as error:
        raise MoeLensError(
            f"the weights of {parent.path} cannot be read or converted ({error}); check that the "
            "download is complete"
        ) from error
    before.check()
    save_config(copy.deepcopy(content.config), folder / "config.json", keep_vision_config=True)
    copy_small_files(parent.path, folder, say, without=() if format == "hf" else (_PACKING,))
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


def _size(parent: Parent, content: Content) -> Size:
    """The size of the model to be written; mlx-lm's loader checks every name and shape on the way.

    Nothing is read for this, and the model is let go of, so that it holds no tensor in memory.
    """
    try:
        model = assemble(
            parent.path,
            content.config,
            dict(content.tensors),
            # mlx-lm's own loader then drops the towers as well.
            as_stored=content.format == "hf" or bool(parent.unread.towers),
        )
    except (ValueError, RuntimeError) as error:
        kind = parent.config.get("model_type")
        if content.format == "hf":
            reason = " ".join(str(error).split()[:24])
            raise UnsupportedModelError(
                f"mlx-lm does not read this {kind} model in the layout of Hugging Face, so the "
                f"export cannot be checked ({reason}); leave --format hf out"
            ) from error
        raise MoeLensError(f"mlx-lm does not take a {kind} model of this size: {error}") from error
    size = Size.of(model)
    release(model)
    return size


def copy_small_files(
    source: Path, folder: Path, say: Say | None = None, *, without: Container[str] = ()
) -> None:
    """Copy tokenizer, chat templates, generation config, code and licences beside the weights.

    Weight files, what describes the parent only, hidden files and those in `without` stay. Links
    become files: the hub's cache is made of them. What other links lead to may be anything of this
    machine, and the copy may be published, so only those of the tokenizer are followed, which
    mlx-lm has read.
    """
    for file in sorted(source.iterdir()):
        if file.name == "additional_chat_templates" and file.is_dir() and not file.is_symlink():
            (folder / file.name).mkdir()
            for template in sorted(file.glob("*.jinja")):
                _copy(template, source, folder / file.name, say)
        elif not (
            file.is_dir()
            or file.name.startswith(".")
            or file.name in _OURS
            or file.name in without
            or file.suffix.lower() in _WEIGHTS
            or file.name.endswith(".safetensors.index.json")
        ):
            _copy(file, source, folder, say)


def _copy(file: Path, source: Path, folder: Path, say: Say | None) -> None:
    reason = None
    if not file.is_file():
        reason = "it is a link to nothing" if file.is_symlink() else "it is no plain file"
    elif file.stat().st_size > _LARGEST_COPY:
        reason = "it is larger than 256 MiB"
    elif not (_belongs(file, source) or file.name in TOKENIZER_FILES):
        reason = f"it is a link out of {source}; put a copy there to have it in the smaller model"
    if reason is None:
        shutil.copyfile(file, folder / file.name)
    elif say is not None:
        say(f"{file.name} is not copied: {reason}")


def _belongs(file: Path, source: Path) -> bool:
    """Whether a file is the model's own: in its folder, or in the hub's cache of it."""
    target, home = file.resolve(), source.resolve()
    if home.parent.name == "snapshots" and target.is_relative_to(home.parent.parent / "blobs"):
        return True
    return target.is_relative_to(home)
