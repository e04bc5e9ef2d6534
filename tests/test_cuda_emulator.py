"""CUDA texts in the emulator and before NVIDIA's compilers."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from emulator_probe import COUNTING, cuda, launch, metal
from metal_emulator import (
    KernelFaultError,
    KernelTextError,
    NoCompilerError,
    compile_cuda,
    cuda_text,
)


def test_cuda_text() -> None:
    text = cuda_text(
        "probe",
        {"inp": mx.zeros((2, 3), mx.bfloat16), "one": mx.array(1)},
        {"out": mx.float16},
        "out[0] = T(float(inp[0]) + inp_shape[1] + N);",
        "// header\n",
        [("T", mx.float16), ("N", 3), ("B", True)],
    )
    assert text.name == "custom_kernel_probe_float16_3_t"
    assert text.source.startswith('#include "mlx/backend/cuda/device/utils.cuh"')
    for line in (
        "namespace mlx::core::cu {",
        "__global__ void custom_kernel_probe_float16_3_t(",
        "    const __nv_bfloat16* inp,",
        "    const __grid_constant__ Shape inp_shape,",
        "    const int32_t* one,",
        "    __half* out) {",
        "  using T = __half;",
        "  constexpr int N = 3;",
        "  constexpr bool B = true;",
    ):
        assert line in text.source.splitlines()


def test_cuda_runs_the_whole_blocks() -> None:
    body = "out[e] = inp[e] * float(blockDim.x);"
    with pytest.raises(KernelFaultError, match=r"inp\[64\] is out of bounds"):
        launch(cuda(body), group=48)
    np.testing.assert_array_equal(launch(cuda("if (e < 64) " + body), group=48), COUNTING * 48)
    # Metal clips the last group instead: no guard is needed.
    clipped = metal("out[e] = inp[e] * float(dispatch_threads_per_threadgroup.x);")
    np.testing.assert_array_equal(launch(clipped, group=48), COUNTING * 48)


def test_cuda_shuffles_and_shared_memory() -> None:
    header = """__device__ __forceinline__ float total(float v) {
        for (int o = 16; o > 0; o >>= 1) v += __shfl_xor_sync(0xffffffffu, v, o);
        return v; }\n"""
    body = """__shared__ float part[2];
        const float sum = total(inp[e]);
        if (lane == 0) { part[e / 32] = sum; }
        __syncthreads();
        out[e] = part[0] + part[1] + float(inp_shape[0]) + expf(logf(2.0f))
            + __shfl_sync(0xffffffffu, inp[e], 1);"""
    got = launch(cuda(body, header))
    np.testing.assert_allclose(got, COUNTING.sum() + 66 + 1 + 32 * (np.arange(64) >= 32))


@pytest.mark.parametrize(
    ("body", "told"),
    [
        (
            "float v = inp[e]; if (lane < 9) { v = __shfl_sync(0xffffffffu, v, 0); } out[e] = v;",
            "left",
        ),
        ("if (e < 32) { __syncthreads(); } out[e] = inp[e];", "not every thread reaches"),
        ("out[e] = __shfl_sync(0xffffu, inp[e], 0);", "a mask of fewer than 32 lanes"),
        ("out[e] = inp[e + 1];", r"inp\[64\] is out of bounds"),
        ("if (e > 3) { out[e] = inp[e]; }", "4 elements of the output out"),
    ],
)
def test_cuda_faults(body: str, told: str) -> None:
    with pytest.raises(KernelFaultError, match=told):
        launch(cuda(body))


def test_cuda_atomics() -> None:
    body = "atomicAdd(&out[e % 4], inp[e]);"
    want = COUNTING.reshape(16, 4).sum(axis=0)
    np.testing.assert_array_equal(launch(cuda(body), shape=(4,), init_value=0), want)
    with pytest.raises(KernelFaultError, match="read before it is written"):
        launch(cuda(body), shape=(4,))


def test_a_cuda_warp_that_is_not_whole() -> None:
    with pytest.raises(KernelFaultError, match="names a lane that is not there"):
        launch(cuda("out[e] = __shfl_sync(0xffffffffu, inp[e], 0);"), threads=16, group=16)


@pytest.mark.parametrize(
    ("body", "told"),
    [
        ("out[e] = simd_sum(inp[e]);", "simd_sum"),
        ("const device float* p = inp; out[e] = p[e];", "an address space of Metal"),
        ("out[e] = inp[e] * 2.0;", "double"),
        ("out[e] = std::exp(inp[e]);", "std"),
        ('asm(""); out[e] = inp[e];', "runs no inline assembly"),
        # nvcc has this name from the host's headers; NVRTC, which MLX uses, has not.
        ("out[e] = float(uint(e));", "uint"),
    ],
)
def test_texts_that_are_not_cuda(body: str, told: str) -> None:
    with pytest.raises(KernelTextError, match=told):
        launch(cuda(body))


@pytest.mark.parametrize("by", ["nvcc", "nvrtc"])
def test_nvidia_compiles_the_text(by: Any) -> None:
    kernel = cuda("out[e] = T(__shfl_sync(0xffffffffu, float(inp[e]), 0) + inp_strides[0]);")
    launch(kernel, template=[("T", mx.bfloat16)], dtype=mx.bfloat16)
    assert kernel.text is not None
    try:
        assert f"{kernel.text.name}" in compile_cuda(kernel.text, by)
    except NoCompilerError as missing:
        pytest.skip(str(missing))
    broken = cuda("out[e] = simd_sum(inp[e]);")
    with pytest.raises(KernelTextError, match="rejects"):
        launch(broken)
    with pytest.raises(KernelTextError, match=r"rejects the kernel(.|\n)*simd_sum"):
        compile_cuda(broken.text, by)
