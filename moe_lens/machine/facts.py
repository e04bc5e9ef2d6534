"""Facts about this machine: versions, device, memory, and how fast it multiplies matrices.

MLX is imported inside functions, because a machine on which it does not import is the first thing
to tell.
"""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

__all__ = ["Device", "Memory", "Products", "device", "memory", "products", "versions"]

PACKAGES = ("moe-lens", "mlx", "mlx-lm", "numpy", "transformers", "huggingface-hub")

SLOW = 4.0
"""From this ratio of NumPy's speed to MLX's on, MLX's BLAS is called slow. NumPy uses all cores and
the reference BLAS one, so a smaller ratio says nothing."""

_SECONDS = 0.3
_GPU_SIZE, _CPU_SIZE = 4096, 512


@dataclass(frozen=True)
class Device:
    """Where MLX computes: the default device, and which accelerators it can use."""

    default: str
    name: str
    metal: bool
    cuda: bool


@dataclass(frozen=True)
class Memory:
    """Bytes of main memory; None where the system does not say.

    In a container with a limit, the limit is the total.
    """

    total: int | None
    available: int | None


@dataclass(frozen=True)
class Products:
    """Speed of a float32 product of two square matrices, in GFLOP/s (2 size^3 operations).

    Attributes:
        size: Rows and columns.
        mlx: On MLX's default device.
        numpy: With NumPy, on the CPU.
        error: Largest difference of the two, relative to the largest entry.
        blas: The BLAS library that MLX uses; None where that is not known (or a GPU computes).
        reference: Whether that is the reference BLAS that MLX's Linux wheel carries.
    """

    size: int
    mlx: float
    numpy: float
    error: float
    blas: str | None
    reference: bool

    @property
    def slow(self) -> bool:
        """Whether NumPy's BLAS is many times faster than MLX's."""
        return self.numpy > SLOW * self.mlx


def versions() -> dict[str, str | None]:
    """Version of Python and of each package; None for one that is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found


def device() -> Device:
    """MLX's default device."""
    import mlx.core as mx

    default = mx.default_device()
    about = mx.device_info(default)
    return Device(
        default="gpu" if default == mx.gpu else "cpu",
        name=str(about.get("device_name", platform.machine())),
        metal=bool(mx.metal.is_available()),
        cuda=bool(mx.cuda.is_available()),
    )


def memory() -> Memory:
    """Main memory, total and available."""
    total = available = None
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    meminfo = _read(Path("/proc/meminfo"))
    for line in meminfo.splitlines():
        name, _, value = line.partition(":")
        if name == "MemAvailable":
            available = int(value.split()[0]) * 1024
    limit, used = (_read(Path("/sys/fs/cgroup", f"memory.{name}")) for name in ("max", "current"))
    if total is not None and limit.isdigit() and used.isdigit() and int(limit) < total:
        total = int(limit)
        left = max(0, total - int(used))
        available = left if available is None else min(available, left)
    return Memory(total, available)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError):
        return ""


def products() -> Products:
    """Measure float32 products, about half a second."""
    import mlx.core as mx
    import numpy as np

    size = _GPU_SIZE if mx.default_device() == mx.gpu else _CPU_SIZE
    random = np.random.default_rng(0)
    one, two = (random.standard_normal((size, size), dtype=np.float32) for _ in range(2))
    left, right = mx.array(one), mx.array(two)
    expected, found = one @ two, np.array(left @ right)
    blas = None if mx.default_device() == mx.gpu else _blas()
    operations = 2.0 * size**3
    return Products(
        size=size,
        mlx=operations / _fastest(lambda: mx.eval(left @ right)) / 1e9,
        numpy=operations / _fastest(lambda: one @ two) / 1e9,
        error=float(np.abs(found - expected).max() / np.abs(expected).max()),
        blas=blas,
        reference=blas is not None and "mlx_cpu.libs" in blas,
    )


def _blas() -> str | None:
    """The BLAS that MLX's calls reach on Linux: a preloaded one comes before the wheel's own."""
    loaded = {Path(line.split()[-1]) for line in _read(Path("/proc/self/maps")).splitlines()}
    preloaded = os.environ.get("LD_PRELOAD", "").replace(":", " ").split()
    for library in preloaded:
        if Path(library).resolve() in loaded and "blas" in Path(library).name.lower():
            return library
    carried = (each for each in loaded if each.parent.name == "mlx_cpu.libs")
    return next((str(each) for each in carried if each.name.startswith("libblas")), None)


def _fastest(run: Callable[[], Any]) -> float:
    """Seconds of the fastest of the runs that fit the time, at least three."""
    times: list[float] = []
    while len(times) < 3 or sum(times) < _SECONDS:
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return min(times)
