"""What the folder of a smaller model is to hold: config.json and all tensors, still lazy."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx

from moe_lens.compress.hugging_face.exported import exported
from moe_lens.compress.plan.plan import Plan
from moe_lens.compress.tensors.parameters import smaller_parameters
from moe_lens.compress.tensors.parent import Parent
from moe_lens.errors import UsageError
from moe_lens.telling import Say

from .config import exported_config, smaller_config

FORMATS = ("mlx", "hf")
"""Layouts of a checkpoint: that of mlx-lm, and that of Hugging Face transformers."""


@dataclass(frozen=True)
class Content:
    """config.json and tensors of one folder.

    `routed` are the tensors of experts and routers, `dtypes` what safetensors calls the dtypes of
    tensors where MLX's own name for them is another. `format` is one of `FORMATS`.
    """

    format: str
    config: dict[str, Any]
    tensors: dict[str, mx.array]
    routed: frozenset[str]
    dtypes: Mapping[str, str] = field(default_factory=dict)


def check_format(format: str, *, per_layer: bool = False) -> None:
    """Raise UsageError unless there is such a layout, and for layers of unequal size."""
    if format not in FORMATS:
        raise UsageError(f"there is no format {format!r}; give {' or '.join(FORMATS)}")
    if format == "hf" and per_layer:
        raise UsageError(
            "transformers has one number of experts for all layers: leave out either --per-layer "
            "or --format hf"
        )


def content_of(parent: Parent, plan: Plan, format: str, say: Say | None = None) -> Content:
    """The content of the folder that `plan` makes of `parent`, which it consumes.

    Raises:
        UnsupportedModelError: The model cannot be laid out so.
    """
    check_format(format, per_layer=plan.per_layer)
    unread = parent.unread
    if say is not None:
        for note in unread.notes(format):
            say(note)
    if format == "mlx":
        routed = {name for each in parent.layers for name in (*each.experts, *each.routers)}
        config = smaller_config(parent, plan)
        tensors = smaller_parameters(parent, plan) | unread.carried()
        dtypes = {each.name: each.dtype for each in unread.towers}
        return Content(format, config, tensors, frozenset(routed), dtypes)
    found = exported(parent, plan)
    config = exported_config(parent, plan, found)
    return Content(format, config, found.tensors, found.routed, found.dtypes)
