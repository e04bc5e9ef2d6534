"""From a name to a loaded model: the bundled `demo`, a folder, or an id on the hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from .checkpoint_files.config import check_counts, read_config
from .checkpoint_files.folder import stored_tensors
from .errors import MoeLensError, UnsupportedModelError, UsageError


def resolve(name: str | Path, revision: str | None = None) -> Path:
    """The folder of a model: ``demo``, an existing folder, or a hub id (downloaded once).

    Raises:
        UsageError: If there is no such folder and the name is no hub id.
        MoeLensError: If the hub cannot be reached or does not have it.
    """
    from . import demo

    if str(name) == "demo" and not Path("demo", "config.json").is_file():
        return demo.model_path()
    path = Path(name).expanduser()
    if path.is_file():
        raise UsageError(f"{name} is a file; name the model's folder (the one with config.json)")
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise UsageError(f"{name} has no config.json, so it is not a model folder")
        return path
    if str(name).count("/") != 1 or str(name).startswith((".", "/", "~")):
        raise UsageError(
            f"there is no model folder {name}: give a folder, a hub id (owner/name), or demo"
        )
    return _from_hub(str(name), revision)


def _from_hub(name: str, revision: str | None) -> Path:
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
    from mlx_lm.utils import _download

    try:
        return Path(_download(name, revision=revision))
    except LocalEntryNotFoundError as error:
        raise MoeLensError(
            f"{name} is neither a folder here nor in the cache, and the hub cannot be reached: "
            "check the network, or download it elsewhere and give its folder"
        ) from error
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise MoeLensError(
            f"{name} is no folder here, and the hub does not give it ({reason})"
        ) from error


def load(
    name: str | Path,
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
    trust_model_file: bool = False,
    lazy: bool = False,
) -> tuple[nn.Module, Any, dict[str, Any], Path]:
    """What stock ``mlx_lm.load`` gives, after checks: (model, tokenizer, config, folder).

    Weights keep the dtype of the checkpoint. With `lazy` they are read when first used.
    `trust_model_file` lets the model's own file run, and no code of its tokenizer.

    Raises:
        UsageError: For a name that is no model.
        UnsupportedModelError: For an architecture mlx-lm does not have, or one that needs
            remote code that was not allowed.
        MoeLensError: For missing or corrupt files.
    """
    import mlx_lm.utils

    path = resolve(name, revision)
    config = read_config(path)
    check_counts(path, config, len(stored_tensors(path)))
    if config.get("model_file") and not (trust_remote_code or trust_model_file):
        raise UnsupportedModelError(
            f"{name} wants to run its own code ({config['model_file']}): pass --trust-remote-code "
            "(trust_remote_code=True) if you trust it"
        )
    try:
        model, tokenizer, loaded = mlx_lm.utils.load(
            str(path),
            tokenizer_config={"trust_remote_code": True} if trust_remote_code else None,
            lazy=lazy,
            return_config=True,
            trust_remote_code=trust_remote_code or trust_model_file,
        )
    except Exception as error:
        # A config with impossible numbers fails wherever an architecture first uses them.
        reason = (str(error).strip() or repr(error)).splitlines()[0]
        if isinstance(error, ValueError) and "not supported" in reason:
            raise UnsupportedModelError(
                f"mlx-lm has no model type {config['model_type']!r}, so {name} cannot be loaded"
            ) from error
        raise MoeLensError(f"mlx-lm cannot load {name}: {reason}") from error
    return model, tokenizer, loaded, path


def read_weights(model: nn.Module, path: Path) -> None:
    """Read the weights of a lazily loaded model.

    Raises:
        MoeLensError: A file cannot be read, or does not fit into memory.
    """
    try:
        mx.eval(model.parameters())
    except (RuntimeError, OSError, MemoryError) as error:
        reason = (str(error).strip() or repr(error)).splitlines()[0]
        raise MoeLensError(f"the weights of {path} cannot be read: {reason}") from error


def compute_in_float32(model: nn.Module) -> str | None:
    """On the CPU backend, cast a half-precision MoE to float32; returns a note if it did.

    MLX's CPU cannot gather-multiply another dtype, and its quantised products accumulate in the
    dtype of the activations (relative error 1e-1 in bfloat16 at width 2048), so a quality
    measured in half precision would be that of the backend.
    """
    if mx.default_device() != mx.cpu:
        return None
    from mlx.utils import tree_flatten

    half = {
        value.dtype
        for _, value in tree_flatten(model.parameters())
        if value.dtype in (mx.bfloat16, mx.float16)
    }
    if not half:
        return None
    names = " and ".join(sorted(str(dtype).removeprefix("mlx.core.") for dtype in half))
    model.set_dtype(mx.float32)
    return (
        f"computing in float32: this is MLX's CPU backend, and the checkpoint is {names} "
        "(it is not changed on disk)"
    )
