"""The very text that MLX hands to Metal's compiler, on a machine without Metal.

While `mx.export_function` traces a function, a custom kernel is recorded on a placeholder stream
and not run; a callback in place of a file name gets every recorded primitive with its state. The
state of a `CustomKernel` begins with its name and its generated source.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx


@dataclass(frozen=True)
class KernelText:
    """One generated kernel: the function's `name` and the whole `source` it stands in."""

    name: str
    source: str


def record_metal(
    kernel: Callable[..., list[mx.array]], inputs: Sequence[mx.array], **call: Any
) -> KernelText:
    """The text MLX generates when `kernel` is called with `inputs` and the keywords `call`.

    Args:
        kernel: What ``mx.fast.metal_kernel`` returned.
        inputs: Its inputs. Only dtypes and shapes matter.
        call: `grid`, `threadgroup`, `output_shapes`, `output_dtypes` and the optional ones.
    """
    seen: list[dict[str, Any]] = []
    mx.export_function(seen.append, lambda *given: kernel(inputs=list(given), **call), *inputs)
    kernels = [entry for entry in seen if entry.get("name") == "CustomKernel"]
    if len(kernels) != 1:
        raise RuntimeError(
            f"MLX recorded {len(kernels)} custom kernels for one call: the format of its export "
            "callback has changed, and recording.py must follow it"
        )
    name, source = kernels[0]["arguments"][:2]
    return KernelText(name, source)
