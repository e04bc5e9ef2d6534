"""What this machine gives: versions, device, memory, speed of products, the hub, cached models.

    found = examine()
    found.advice            # what would help, with the commands
    found.to_dict()

Everything is measured or read here and now (see `machine` and `hub`); nothing is changed.
"""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .facts import Device, Memory, Products, device, memory, products, versions
from .hub import CachedModel, Hub, cached_models, hub

__all__ = ["Advice", "Diagnosis", "advice", "examine"]


@dataclass(frozen=True)
class Advice:
    """What would help: a sentence, and the shell commands that do it."""

    text: str
    commands: tuple[str, ...]


@dataclass(frozen=True)
class Diagnosis:
    """What `examine` found.

    Attributes:
        kernel: Whether overridden routing runs in the fused kernel here, and why.
        problems: What keeps moe-lens from working, in sentences. Empty: it works.
        advice: What would make it work better.
    """

    versions: dict[str, str | None]
    system: str
    demo: bool
    device: Device | None
    memory: Memory
    products: Products | None
    kernel: str
    hub: Hub
    cache_folder: str
    cached_models: tuple[CachedModel, ...]
    problems: tuple[str, ...]
    advice: tuple[Advice, ...]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=2)


def examine(*, hub_timeout: float = 3.0) -> Diagnosis:
    """Look at everything; takes about a second, and up to `hub_timeout` more without a network."""
    problems: list[str] = []
    where = _try(device, problems, "MLX cannot be used ({}): install it again with pip")
    speed = None if where is None else _try(products, problems, "MLX cannot multiply ({})")
    if speed is not None and not speed.error < 1e-3:
        problems.append(
            f"MLX's products are wrong (they differ from NumPy's by {speed.error:.1e}): install "
            "mlx again, without LD_PRELOAD"
        )
    from huggingface_hub import constants

    from moe_lens.demo import model_path

    return Diagnosis(
        versions=versions(),
        system=f"{platform.platform()}, {os.cpu_count()} cores",
        demo=(model_path() / "config.json").is_file(),
        device=where,
        memory=memory(),
        products=speed,
        kernel="unknown" if where is None else _kernel(),
        hub=hub(hub_timeout),
        cache_folder=str(constants.HF_HUB_CACHE),
        cached_models=() if where is None else cached_models(),
        problems=tuple(problems),
        advice=() if where is None else advice(where, speed),
    )


def _kernel() -> str:
    from moe_lens.kernels import Kernel

    try:
        return Kernel().reason
    except ValueError as error:
        return str(error)


def _try(ask: Callable[[], Any], problems: list[str], sentence: str) -> Any:
    """What `ask` says; None and a problem if MLX fails, in whatever way."""
    try:
        return ask()
    except Exception as error:
        problems.append(sentence.format(" ".join(str(error).split()) or type(error).__name__))
        return None


def advice(where: Device, speed: Products | None) -> tuple[Advice, ...]:
    """What would make products faster on this device."""
    if speed is None or where.default != "cpu":
        return ()
    ratio = f"NumPy multiplies {speed.numpy / speed.mlx:.0f} times faster than MLX here"
    if not speed.reference:
        found = (Advice(f"{ratio}: use an MLX that is built with a fast BLAS.", ()),)
        return found if speed.slow else ()
    library = f"/usr/lib/{platform.machine()}-linux-gnu/openblas-serial/libopenblas.so.0"
    there = Path(library).exists()
    measured = f" ({ratio})" if speed.slow else ""
    where_from = ", which is installed:" if there else "; on Debian and Ubuntu:"
    install = () if there else ("sudo apt-get install libopenblas0-serial",)
    return (
        Advice(
            "Products can be many times faster: MLX's Linux wheel carries the reference BLAS"
            f"{measured}. Preload OpenBLAS{where_from}",
            (*install, f"export LD_PRELOAD={library}"),
        ),
    )
