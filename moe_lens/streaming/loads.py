"""Loading a checkpoint again and again, for a model whose weights are read layer by layer."""

from __future__ import annotations

from pathlib import Path

import mlx.nn as nn

from moe_lens.checkpoint_files.config import read_config
from moe_lens.checkpoint_files.unchanged import FolderState
from moe_lens.errors import UnsupportedModelError
from moe_lens.loading import compute_in_float32

from .lazy_layers import Fresh
from .memory import WeightMemory


def streamed_loads(model: nn.Module, path: Path, asked: bool | None) -> Fresh | None:
    """What loads the checkpoint at `path` once more, if its model is to be streamed.

    Args:
        model: What it was loaded as, lazily.
        path: Its folder.
        asked: Whether to stream; None: if the model is too large for this machine, and can be.

    Raises:
        UnsupportedModelError: It was asked for, but the model brings code of its own.
    """
    if asked is False or (asked is None and not WeightMemory.of(model).too_large):
        return None
    if not read_config(path).get("model_file"):
        return loads(path)
    if asked is None:
        return None
    raise UnsupportedModelError(
        f"{path} brings its own model code, and such a model is not read layer by layer; use a "
        "machine that can hold it whole, and leave --stream out"
    )


def loads(path: Path) -> Fresh:
    """What loads the checkpoint in the folder `path`, lazily, as it runs here.

    It raises MoeLensError if the folder has changed since.
    """
    from mlx_lm.utils import load_model

    state = FolderState.of(path)

    def load_again() -> nn.Module:
        state.check()
        model, _ = load_model(path, lazy=True)
        compute_in_float32(model)
        return model

    return load_again
