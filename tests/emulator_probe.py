"""Small kernels for the tests of the emulator."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import numpy as np

from metal_emulator import EmulatedKernel, cuda_kernel, metal_kernel

START = "uint e = thread_position_in_grid.x; uint lane = thread_index_in_simdgroup;\n"
CUDA_START = "const int e = blockIdx.x * blockDim.x + threadIdx.x, lane = threadIdx.x % 32;\n"
COUNTING = np.arange(64, dtype=np.float32)


def launch(
    kernel: EmulatedKernel,
    *,
    threads: int = 64,
    group: int = 64,
    inputs: Sequence[mx.array | float] = (mx.array(COUNTING),),
    shape: tuple[int, ...] = (64,),
    dtype: mx.Dtype = mx.float32,
    **call: Any,
) -> np.ndarray:
    out = kernel(
        inputs=inputs,
        grid=(threads, 1, 1),
        threadgroup=(group, 1, 1),
        output_shapes=[shape],
        output_dtypes=[dtype],
        **call,
    )[0]
    return np.array(out.astype(mx.float32) if dtype == mx.bfloat16 else out)


def metal(body: str, header: str = "", names: Sequence[str] = ("inp",), **options: Any) -> Any:
    return metal_kernel("probe", names, ["out"], START + body, header, **options)


def cuda(body: str, header: str = "", names: Sequence[str] = ("inp",), **options: Any) -> Any:
    return cuda_kernel("probe", names, ["out"], CUDA_START + body, header, **options)


REDUCTION = """
    threadgroup float part[32];
    float sum = simd_sum(inp[e]);
    if (lane == 0u) { part[simdgroup_index_in_threadgroup] = sum; }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    float total = 0.0f;
    for (uint i = 0; i < simdgroups_per_threadgroup; ++i) { total += part[i]; }
    out[e] = total;"""
"""A sum over the threadgroup: SIMD sums, threadgroup memory, one barrier."""
