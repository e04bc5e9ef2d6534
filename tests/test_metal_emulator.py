"""Right kernels give the right numbers in the emulator, and it survives wrong ones.

These tests and those of the detectors hold for the emulator alone.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from emulator_probe import COUNTING, REDUCTION, START, launch, metal
from metal_emulator import (
    KernelFaultError,
    NoCompilerError,
    compiling,
    metal_kernel,
    record_metal,
)
from metal_emulator.child import Child, Launch

# ---- the text --------------------------------------------------------------------------------


def test_text_is_what_mlx_generates() -> None:
    kernel = mx.fast.metal_kernel("probe", ["inp", "few"], ["out"], START + "out[e] = inp[e];")
    text = record_metal(
        kernel,
        [mx.zeros(64, mx.bfloat16), mx.zeros(7)],
        grid=(64, 1, 1),
        threadgroup=(64, 1, 1),
        output_shapes=[(64,)],
        output_dtypes=[mx.float16],
    )
    assert f"[[kernel]] void {text.name}(" in text.source
    assert "const device bfloat16_t* inp [[buffer(0)]]" in text.source
    assert "const constant float* few [[buffer(1)]]" in text.source
    assert "device float16_t* out [[buffer(2)]]" in text.source
    assert START + "out[e] = inp[e];" in text.source


def test_compiled_once_per_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("METAL_EMULATOR_CACHE", str(tmp_path))
    kernel = metal("out[e] = inp[e];")
    launch(kernel)
    library = list(tmp_path.iterdir())
    launch(kernel)
    launch(metal("out[e] = inp[e];"))
    assert list(tmp_path.iterdir()) == library
    launch(metal("out[e] = inp[e] + 1.0f;"))
    assert len(list(tmp_path.iterdir())) == len(library) + 1
    monkeypatch.setattr(compiling, "_headers", lambda: "other headers")
    launch(kernel)
    assert len(list(tmp_path.iterdir())) == len(library) + 2


def test_no_compiler_is_told_with_its_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    compiling.find_compiler.cache_clear()
    try:
        with pytest.raises(NoCompilerError, match="install g\\+\\+"):
            launch(metal("out[e] = inp[e];"))
    finally:
        compiling.find_compiler.cache_clear()


# ---- right kernels ---------------------------------------------------------------------------


def test_shape_strides_and_template() -> None:
    values = mx.random.normal((3, 4))
    kernel = metal(
        "out[e] = float(inp_ndim) + float(inp_shape[1]) + float(inp_strides[0])"
        " + metal::exp(T(inp[e])) * float(N);"
    )
    template = [("T", mx.float32), ("N", 2)]
    got = launch(kernel, threads=12, group=5, inputs=[values], shape=(3, 4), template=template)
    np.testing.assert_allclose(got, 2 * np.exp(np.array(values)) + 2 + 4 + 4, rtol=1e-6)


def test_scalars_and_small_arrays_are_read_through_constant_memory() -> None:
    kernel = metal("out[e] = inp[e] * factor + few[e % 3];", names=("inp", "factor", "few"))
    got = launch(kernel, inputs=[mx.array(COUNTING), 2.0, mx.array([1.0, 2.0, 3.0])])
    np.testing.assert_array_equal(got, COUNTING * 2 + 1 + np.arange(64) % 3)


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_sixteen_bit_floats_convert_as_mlx_does(dtype: mx.Dtype) -> None:
    patterns = mx.arange(1 << 16).astype(mx.uint16).view(dtype)
    widen = metal("out[e] = float(inp[e]);")
    wide = launch(widen, threads=1 << 16, group=256, inputs=[patterns], shape=(1 << 16,))
    np.testing.assert_array_equal(wide, np.array(patterns.astype(mx.float32)))
    # Floats on, next to and between neighbours of the 16-bit grid: every rounding case.
    raw = np.random.default_rng(0).integers(0, 1 << 32, 1 << 16, dtype=np.uint32)
    raw[::4] &= np.uint32(0xFFFFF000)
    raw[1::4] &= np.uint32(0xFFFF8000)
    floats = raw.view(np.float32)
    floats[:8] = [0.0, -0.0, np.inf, -np.inf, 65519.996, 65520.0, 2.0**-25, 3 * 2.0**-25]
    narrow = metal("out[e] = T(inp[e]);")
    bits = narrow(
        inputs=[mx.array(floats)],
        template=[("T", dtype)],
        grid=(1 << 16, 1, 1),
        threadgroup=(256, 1, 1),
        output_shapes=[(1 << 16,)],
        output_dtypes=[dtype],
    )[0]
    want = mx.array(floats).astype(dtype)
    same = np.array(bits.view(mx.uint16)) == np.array(want.view(mx.uint16))
    assert (same | np.isnan(floats)).all()
    assert np.isnan(np.array(bits.astype(mx.float32))[np.isnan(floats)]).all()


def test_sixteen_bit_arithmetic_rounds_every_step() -> None:
    a = mx.random.normal((64,)).astype(mx.float16)
    kernel = metal("half v = inp[e]; out[e] = float(v * v + v);")
    want = np.array(a) * np.array(a) + np.array(a)
    np.testing.assert_array_equal(launch(kernel, inputs=[a]), want.astype(np.float32))


@pytest.mark.parametrize(
    ("call", "want"),
    [
        ("simd_sum(x)", lambda v: np.full(32, v.sum())),
        ("simd_max(x)", lambda v: np.full(32, v.max())),
        ("simd_min(x)", lambda v: np.full(32, v.min())),
        ("float(simd_max(uint(x)))", lambda v: np.full(32, v.max())),
        ("simd_shuffle(x, ushort(31u - lane))", lambda v: v[::-1]),
        ("simd_shuffle_xor(x, ushort(5))", lambda v: v[np.arange(32) ^ 5]),
        ("simd_shuffle_down(x, ushort(3))", lambda v: v[[*range(3, 32), 29, 30, 31]]),
        ("simd_shuffle_up(x, ushort(3))", lambda v: v[[0, 1, 2, *range(29)]]),
        ("simd_broadcast(x, ushort(7))", lambda v: np.full(32, v[7])),
        ("simd_prefix_exclusive_sum(x)", lambda v: np.cumsum(v) - v),
        ("float(simd_or(1u << (lane % 3u)))", lambda v: np.full(32, 7)),
        ("float(simd_and(lane | 8u))", lambda v: np.full(32, 8)),
        ("float(simd_any(lane == 4u)) + 2.0f * float(simd_all(lane < 31u))", lambda v: v * 0 + 1),
    ],
)
def test_simd_functions(call: str, want: Any) -> None:
    got = launch(metal(f"float x = inp[e]; out[e] = {call};"))
    halves = [want(COUNTING[:32]), want(COUNTING[32:])]
    np.testing.assert_array_equal(got, np.concatenate(halves))


def test_a_partial_simd_group_reduces_over_the_lanes_it_has() -> None:
    got = launch(metal("out[e] = simd_sum(inp[e]);"), threads=40, shape=(40,))
    np.testing.assert_array_equal(got, [496] * 32 + [sum(range(32, 40))] * 8)


def test_edge_groups_are_clipped_to_the_grid() -> None:
    body = """out[e] = float(threads_per_threadgroup.x)
        + 100.0f * float(threadgroup_position_in_grid.x)
        + 10000.0f * float(dispatch_threads_per_threadgroup.x + threadgroups_per_grid.x);"""
    got = launch(metal(body), threads=70, group=32, inputs=[mx.array(COUNTING)], shape=(70,))
    size = np.where(np.arange(70) < 64, 32, 6)
    np.testing.assert_array_equal(got, size + 100 * (np.arange(70) // 32) + 10000 * (32 + 3))


def test_a_threadgroup_is_no_larger_than_the_grid() -> None:
    body = "out[e] = float(dispatch_threads_per_threadgroup.x) + 100.0f * float(grid_size.x);"
    assert (launch(metal(body), threads=10, group=2000, shape=(10,)) == 1010).all()
    assert (launch(metal(body.replace("grid_size", "threads_per_grid"))) == 6464).all()


def test_threads_are_numbered_along_x_first() -> None:
    kernel = metal_kernel(
        "probe",
        ["inp"],
        ["out"],
        """uint3 p = thread_position_in_grid; uint row = p.y + 3u * p.z;
        out[row * 8u + p.x] = float(thread_index_in_threadgroup) + inp[0]
            + 100.0f * float(simdgroup_index_in_threadgroup * 32u + thread_index_in_simdgroup);""",
    )
    got = kernel(
        inputs=[mx.zeros(8)],
        grid=(8, 3, 4),
        threadgroup=(8, 3, 2),
        output_shapes=[(4, 24)],
        output_dtypes=[mx.float32],
    )[0]
    index = np.arange(96).reshape(4, 24) % 48
    np.testing.assert_array_equal(np.array(got), index * 101)


@pytest.mark.parametrize("order", ["forward", "reverse", "random"])
def test_threadgroup_reduction(order: str) -> None:
    got = launch(metal(REDUCTION, order=order, seed=3))
    np.testing.assert_array_equal(got, np.full(64, COUNTING.sum()))


def test_two_dimensional_threadgroup_memory() -> None:
    body = """threadgroup float turned[8][8];
        turned[e % 8u][e / 8u] = inp[e];
        threadgroup_barrier(mem_flags::mem_threadgroup);
        out[e] = turned[e / 8u][e % 8u];"""
    np.testing.assert_array_equal(launch(metal(body)), COUNTING.reshape(8, 8).T.ravel())


def test_atomics_add_to_the_initial_value() -> None:
    kernel = metal_kernel(
        "count",
        ["ids"],
        ["out"],
        "uint e = thread_position_in_grid.x;"
        "atomic_fetch_add_explicit(&out[ids[e]], 1u, memory_order_relaxed);",
        atomic_outputs=True,
    )
    ids = mx.random.randint(0, 16, (1000,)).astype(mx.uint32)
    call = {"shape": (16,), "dtype": mx.uint32, "init_value": 5}
    got = launch(kernel, threads=1000, group=256, inputs=[ids], **call)
    np.testing.assert_array_equal(got, np.bincount(np.array(ids), minlength=16) + 5)


def test_helpers_take_pointers_of_the_right_address_space() -> None:
    header = """inline float pick(const device float* p, uint i) { return p[i]; }
        inline float pick(constant const float* p, uint i) { return p[i] * 10.0f; }
        inline void put(device float* p, thread float& v) { *p = v; }\n"""
    body = "float v = pick(inp, e) + pick(few, 1u); put(out + e, v);"
    got = launch(metal(body, header, ("inp", "few")), inputs=[mx.array(COUNTING), mx.ones(7)])
    np.testing.assert_array_equal(got, COUNTING + 10)


# ---- the child process -----------------------------------------------------------------------


def test_a_crash_is_told_and_the_next_launch_runs() -> None:
    deep = "inline float deep(float v) { float a[512]; a[int(v) & 511] = v; "
    deep += "return v < -1.0f ? v : deep(v + 1.0f) + a[0]; }\n"
    with pytest.raises(KernelFaultError, match=r"the kernel crashed \(signal SIG"):
        launch(metal("out[e] = deep(inp[e]);", deep))
    np.testing.assert_array_equal(launch(metal("out[e] = inp[e];")), COUNTING)


def test_an_endless_loop_is_ended() -> None:
    source = 'extern "C" void kernel_entry(const void*) { for (volatile int i = 0;; i = 1) {} }'
    library = compiling.kernel_library(source, sanitize=False)
    child = Child(patience=0.3)
    start = time.monotonic()
    with pytest.raises(KernelFaultError, match=r"has not ended after 0\.3 s"):
        child.run(Launch(library, (1, 1, 1), (1, 1, 1)), [])
    assert time.monotonic() - start < 5
    child.stop()
