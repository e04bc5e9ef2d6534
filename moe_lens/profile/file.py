"""A profile as one safetensors file: the arrays as tensors, the rest as JSON in its header.

One file, because one rename then makes the whole profile appear at once.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save
from scipy import sparse

from moe_lens.atomic import write_bytes
from moe_lens.errors import MoeLensError, UsageError

from .profile import OutputSums, Profile

__all__ = ["load_profile", "save_profile"]

FORMAT = "moe-lens profile"
VERSION = 1
_ARRAYS = (
    "counts",
    "first_counts",
    "weight_sums",
    "coactivation",
    "transitions",
    "label_tokens",
    "label_prompts",
    "label_counts",
    "block_tokens",
    "block_prompts",
    "block_counts",
)
_OUTPUTS = ("norms", "weighted_norms", "outputs")


def save_profile(profile: Profile, path: Path) -> None:
    """Write ``profile`` to ``path``; see `Profile.save`."""
    tensors = {name: getattr(profile, name) for name in _ARRAYS}
    if profile.outputs is not None:
        tensors |= {f"outputs.{name}": getattr(profile.outputs, name) for name in _OUTPUTS}
    header: dict[str, Any] = {
        "format": FORMAT,
        "version": VERSION,
        "model": profile.model,
        "layers": list(profile.layers),
        "router_width": profile.router_width,
        "num_tokens": profile.num_tokens,
        "num_prompts": profile.num_prompts,
        "labels": list(profile.labels),
        "vocabulary": None,
    }
    if profile.vocabulary is not None:
        matrix = profile.vocabulary
        header["vocabulary"] = list(matrix.shape)
        for name in ("data", "indices", "indptr"):
            tensors[f"vocabulary.{name}"] = getattr(matrix, name).astype(np.int64)
    tensors = {name: np.ascontiguousarray(array) for name, array in tensors.items()}
    write_bytes(path, save(tensors, metadata={"profile": json.dumps(header)}))


def load_profile(path: Path) -> Profile:
    """Read a profile from ``path``; see `Profile.load`."""
    if not path.is_file():
        raise UsageError(f"there is no profile {path}; save one with Profile.save")
    try:
        with safe_open(path, framework="numpy") as file:
            header = json.loads((file.metadata() or {}).get("profile", "{}"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise MoeLensError(f"{path} is damaged ({error}); save the profile again") from error
    if header.get("format") != FORMAT:
        raise MoeLensError(f"{path} is no moe-lens profile; give a file that Profile.save wrote")
    if header["version"] != VERSION:
        raise MoeLensError(
            f"the profile {path} has format version {header['version']}, this moe-lens reads "
            f"version {VERSION}; use the moe-lens that wrote it, or record it again"
        )
    outputs = None
    if "outputs.norms" in tensors:
        outputs = OutputSums(**{name: tensors[f"outputs.{name}"] for name in _OUTPUTS})
    return Profile(
        model=header["model"],
        layers=tuple(header["layers"]),
        router_width=header["router_width"],
        num_tokens=header["num_tokens"],
        num_prompts=header["num_prompts"],
        labels=tuple(header["labels"]),
        vocabulary=_vocabulary(header["vocabulary"], tensors),
        outputs=outputs,
        **{name: tensors[name] for name in _ARRAYS},
    )


def _vocabulary(shape: list[int] | None, tensors: dict[str, Any]) -> sparse.csr_array | None:
    if shape is None:
        return None
    parts = tuple(tensors[f"vocabulary.{name}"] for name in ("data", "indices", "indptr"))
    return sparse.csr_array(parts, shape=tuple(shape))
