"""The smaller model in memory: stock mlx-lm's own loader, given our config and our tensors."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.utils import _get_classes, load_model

from moe_lens.errors import UnsupportedModelError

from .model_file import is_ours
from .unequal_layers import resize_layers


def assemble(
    folder: Path,
    config: dict[str, Any],
    parameters: dict[str, mx.array],
    *,
    as_stored: bool = False,
) -> nn.Module:
    """What ``mlx_lm.load`` would give if `config` and `parameters` were written to a folder.

    The architecture is built, quantised and filled by mlx-lm itself. Only the reading of weight
    files is replaced, so nothing has to be written to try a plan.

    Args:
        folder: The parent's folder.
        config: Of the model to build.
        parameters: All of them, under mlx-lm's own names; may be lazy.
        as_stored: They are in a layout that mlx-lm's loader has to translate first.

    Raises:
        UnsupportedModelError: The model brings code of its own.
    """
    unequal = is_ours(config)
    if config.get("model_file") and not unequal:
        raise UnsupportedModelError(
            f"{folder} brings its own model code ({config['model_file']}); a plan for it cannot "
            "be tried in memory, so give the experts per token (--experts-per-token)"
        )
    original, arguments = _get_classes(config)
    given = dict(parameters)
    translate = as_stored and hasattr(original, "sanitize")

    class Given(original):  # type: ignore[valid-type, misc]
        def sanitize(self, weights: dict[str, mx.array]) -> dict[str, mx.array]:
            return super().sanitize(dict(given)) if translate else given

    def build(args: Any) -> nn.Module:
        model = Given(args)
        return resize_layers(model, config) if unequal else model

    model, _ = load_model(
        folder,
        lazy=True,
        # What the file would do is done here, so none has to be there and be trusted.
        model_config={"quantization": None, **copy.deepcopy(config), "model_file": None},
        get_model_classes=lambda config: (build, arguments),
    )
    model.__class__ = original
    given.clear()  # the class lives until the garbage is collected, its tensors must not
    return model
