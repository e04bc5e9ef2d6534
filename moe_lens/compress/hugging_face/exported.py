"""All tensors of the smaller model as transformers names them, and how they are stored."""

from __future__ import annotations

import shlex
from dataclasses import dataclass, field

from mlx_lm.utils import MODEL_REMAPPING

from moe_lens.compress.plan.plan import Plan
from moe_lens.compress.tensors.parameters import smaller_parameters
from moe_lens.compress.tensors.parent import Parent
from moe_lens.errors import UnsupportedModelError
from moe_lens.experts.quantisation import Quantisation

from .expert_layout import Tensors
from .from_mlx import REMEDY, from_mlx
from .from_own import OwnFiles, check_known, from_own
from .layouts import FP4_BLOCKS, LAYOUTS, Layout

_FP4 = Quantisation(32, 4, "mxfp4")


@dataclass(frozen=True)
class Export:
    """What is written.

    `routed` are the tensors of experts and routers. `dtypes` are the names that safetensors has for
    tensors that MLX reads as plain bytes, such as fp8. `own` says whether they are laid out as in
    the parent's files.
    """

    tensors: Tensors
    routed: frozenset[str]
    own: bool
    dtypes: dict[str, str] = field(default_factory=dict)


def check_exportable(parent: Parent, *, changed: bool) -> None:
    """Refuse before anything else is done what cannot be laid out as transformers reads it.

    Args:
        parent: Nothing of it is read.
        changed: Whether experts may get weights that none of the parent's has: they are merged,
            or made narrower.

    Raises:
        UnsupportedModelError: With the reason and what can be done.
    """
    files, layout = OwnFiles.of(parent), _layout(parent)
    if files.in_mlx_layout(parent):
        _check_from_mlx(parent, layout)
    else:
        check_known(parent, files, layout, changed=changed)


def exported(parent: Parent, plan: Plan) -> Export:
    """The smaller model in the layout of transformers, lazily; consumes `parent`.

    Raises:
        UnsupportedModelError: It cannot be laid out so, with the reason and what can be done.
    """
    files, layout = OwnFiles.of(parent), _layout(parent)
    if files.in_mlx_layout(parent):
        _check_from_mlx(parent, layout)
        tensors, routed = from_mlx(parent, smaller_parameters(parent, plan), layout)
        return Export(tensors, routed, own=False)
    tensors, routed = from_own(parent, plan, files, smaller_parameters(parent, plan), layout)
    dtypes = {name: files.stored[name].dtype for name in tensors}
    return Export(tensors, routed, own=True, dtypes=dtypes)


def _layout(parent: Parent) -> Layout:
    kind = parent.config["model_type"]
    if parent.config.get("model_file"):
        raise UnsupportedModelError(
            f"{parent.path} brings its own model code ({parent.config['model_file']}), so its "
            "layout in transformers is not known; leave --format hf out"
        )
    layout = LAYOUTS.get(MODEL_REMAPPING.get(kind, kind))
    if layout is None:
        raise UnsupportedModelError(
            f"what checkpoints of {kind} look like in the layout of Hugging Face is not known; "
            "leave --format hf out"
        )
    return layout


def _check_from_mlx(parent: Parent, layout: Layout) -> None:
    kind = parent.config["model_type"]
    if layout.lost is not None:
        raise UnsupportedModelError(
            f"{parent.path} was converted for MLX, and for {kind} that cannot be taken back "
            f"({layout.lost}); {REMEDY}"
        )
    for tower in (*parent.unread.towers, *parent.unread.stranded):
        raise UnsupportedModelError(
            f"{parent.path} was converted for MLX together with {tower.name}, whose layout there "
            f"is not known; {REMEDY}"
        )
    packed = dict(parent.quantisations)
    if FP4_BLOCKS in layout.experts:
        for name in (name for layer in parent.layers for name in layer.experts):
            path, _, leaf = name.rpartition(".")
            if leaf == "weight" and packed.pop(path, None) != _FP4:
                raise UnsupportedModelError(
                    f"mlx-lm reads {kind} in the layout of Hugging Face only where its experts are "
                    f"in mxfp4, which {path} of {parent.path} is not; leave --format hf out"
                )
    if packed:
        each, place = next(iter(packed.values())), shlex.quote(str(parent.path))
        raise UnsupportedModelError(
            f"{parent.path} is quantised for MLX ({each.mode}, {each.bits} bits), which "
            f"transformers does not read; unpack it first (mlx_lm.convert --hf-path {place} "
            "--dequantize --mlx-path DIR), or leave --format hf out"
        )
