"""Whether a folder in the layout of transformers holds the smaller model, to the last bit.

Stock mlx-lm opens it, and every parameter that its loader makes of the files is compared with the
one that the plan makes of the parent. So a layout that is described wrongly cannot be written.
"""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import numpy as np
from mlx_lm.utils import load_model

from moe_lens.compress.plan.plan import Plan
from moe_lens.compress.tensors.parameters import smaller_parameters
from moe_lens.compress.tensors.parent import Parent
from moe_lens.errors import UnsupportedModelError
from moe_lens.telling import Progress

from .tensor_file import PIECE_BYTES, bytes_of

REMEDY = "leave --format hf out, and please report it"


def check_same_parameters(
    folder: Path, source: Path, plan: Plan, progress: Progress | None = None
) -> None:
    """Compare all parameters, one after the other.

    Args:
        folder: The smaller model, complete.
        source: The parent's folder.
        plan: What was made of it.
        progress: Called with bytes compared and bytes in all.

    Raises:
        UnsupportedModelError: Naming the first parameter that differs.
    """
    expected = smaller_parameters(_open(source), plan)
    found = _open(folder).take_parameters()
    if differing := sorted(set(expected) ^ set(found)):
        raise _wrong(differing[0], "which only one of them has")
    done, total = 0, sum(value.nbytes for value in expected.values())
    for name in list(expected):
        wanted, stored = expected.pop(name), found.pop(name)
        if wanted.dtype != stored.dtype or wanted.shape != stored.shape:
            raise _wrong(name, f"{stored.dtype} {stored.shape}, not {wanted.dtype} {wanted.shape}")
        if not _same_bytes(wanted, stored):
            raise _wrong(name, "whose bits differ")
        done += wanted.nbytes
        if progress is not None:
            progress(done, total)


def _open(folder: Path) -> Parent:
    """A folder by stock mlx-lm's own loader, nothing of its weights read."""
    try:
        model, config = load_model(folder, lazy=True)
    except (ValueError, RuntimeError, KeyError) as error:
        reason = (str(error).strip() or repr(error)).splitlines()[0]
        raise UnsupportedModelError(
            f"mlx-lm does not read the export ({reason}); {REMEDY}"
        ) from error
    return Parent.of(model, None, config, folder)


def _same_bytes(wanted: mx.array, stored: mx.array) -> bool:
    """Compared piece by piece, so that no more is in memory than both of them."""
    one, other = bytes_of(wanted), bytes_of(stored)
    return all(
        np.array_equal(
            np.frombuffer(one[start : start + PIECE_BYTES], np.uint8),
            np.frombuffer(other[start : start + PIECE_BYTES], np.uint8),
        )
        for start in range(0, len(one), PIECE_BYTES)
    )


def _wrong(name: str, what: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"what mlx-lm reads of the export is not the smaller model: {name}, {what}; {REMEDY}"
    )
