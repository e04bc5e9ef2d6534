"""Every detector of the emulator fires: lanes that part, and memory."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from emulator_probe import COUNTING, REDUCTION, launch, metal
from metal_emulator import (
    KernelFaultError,
    KernelTextError,
    find_compiler,
)
from metal_emulator.compiling import PATTERN

# ---- lanes that part -------------------------------------------------------------------------

HELPER = "inline float total(float v) { return simd_sum(v); }\n"


@pytest.mark.parametrize(
    ("body", "told"),
    [
        ("float v = inp[e]; if (lane < 16u) { v = simd_sum(v); } out[e] = v;", "has left"),
        (
            "float v = inp[e];\nif (lane < 16u) { v = simd_sum(v); }\nelse { v = simd_sum(v); }\n"
            "out[e] = v;",
            r"different SIMD calls(.|\n)*\d: if \(lane < 16u\)(.|\n)*\d: else",
        ),
        # One line, and one line of a helper: told apart by the calls that led there.
        (
            "float v = inp[e]; if (lane < 16u) { v = simd_sum(v); } else { v = simd_sum(v); } "
            "out[e] = v;",
            "different SIMD calls",
        ),
        (
            "float v = inp[e]; if (lane < 16u) { v = total(v); } else { v = total(v); } "
            "out[e] = v;",
            "different SIMD calls",
        ),
        (
            "float v = inp[e]; if (lane < 16u) { v = simd_sum(v); } else { v = simd_max(v); } "
            "out[e] = v;",
            "different SIMD calls.*simd_sum.*simd_max",
        ),
        ("if (e > 50u) { return; } out[e] = simd_sum(inp[e]);", "has left"),
        ("for (uint i = 0; i <= lane; ++i) { out[e] = simd_sum(inp[e]); }", "has left"),
        (
            "if (lane < 4u) { threadgroup_barrier(mem_flags::mem_none); } "
            "out[e] = simd_sum(inp[e]);",
            "at a barrier and at a SIMD call",
        ),
    ],
)
def test_divergence_at_a_simd_call(body: str, told: str) -> None:
    with pytest.raises(KernelFaultError, match=f"divergence(.|\n)*{told}"):
        launch(metal(body, HELPER))


def test_no_false_alarm_where_all_lanes_agree() -> None:
    body = """float v = inp[e];
        for (uint i = 0; i < 3u; ++i) { v = i == 1u ? total(v) : v; }
        if (simd_any(v < 0.0f)) { v = total(v); } else { v = total(v) / 32.0f; }
        if (simdgroup_index_in_threadgroup == 1u) { v = total(v); }
        out[e] = v;"""
    got = launch(metal(body, HELPER))
    np.testing.assert_array_equal(got, [496] * 32 + [1520 * 32] * 32)


@pytest.mark.parametrize(
    "body",
    [
        "if (e < 32u) { threadgroup_barrier(mem_flags::mem_threadgroup); } out[e] = inp[e];",
        "if (e >= 32u) { return; } threadgroup_barrier(mem_flags::mem_none); out[e] = inp[e];",
    ],
)
def test_a_barrier_that_not_all_reach(body: str) -> None:
    with pytest.raises(KernelFaultError, match="a barrier that not every thread reaches"):
        launch(metal(body))


def test_different_barriers() -> None:
    body = """if (e < 32u) { threadgroup_barrier(mem_flags::mem_none); }
        else { threadgroup_barrier(mem_flags::mem_none); }
        out[e] = inp[e];"""
    with pytest.raises(KernelFaultError, match="threads wait at different barriers"):
        launch(metal(body))


@pytest.mark.parametrize("call", ["simd_shuffle(inp[e], 20)", "simd_shuffle_xor(inp[e], 16)"])
def test_a_lane_that_is_not_there(call: str) -> None:
    with pytest.raises(KernelFaultError, match=r"reads lane \d+, which is not there"):
        launch(metal(f"out[e] = {call};"), threads=16, group=16, shape=(16,))


def test_broadcast_from_different_lanes() -> None:
    with pytest.raises(KernelFaultError, match="lanes name different sources"):
        launch(metal("out[e] = simd_broadcast(inp[e], ushort(lane));"))


def test_the_largest_of_a_nan() -> None:
    with pytest.raises(KernelFaultError, match="simd_max of a NaN"):
        launch(metal("out[e] = simd_max(inp[e] / 0.0f);"))


# ---- memory ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "told"),
    [
        ("out[e + 1u] = inp[e];", r"out\[64\] is out of bounds: out has 64 elements"),
        ("out[e] = inp[e + 1u];", r"inp\[64\] is out of bounds"),
        ("out[e] = inp[int(e) - 1];", r"inp\[-1\] is out of bounds"),
        ("out[e] = *(inp + 64);", r"inp\[64\] is out of bounds"),
        ("threadgroup float t[4]; t[lane] = 1.0f; out[e] = 0.0f;", r"t\[4\] is out of bounds"),
        ("threadgroup float t[2][4]; t[2][0] = 1.0f; out[e] = 0.0f;", r"t\[2\] is out of bounds"),
        ("threadgroup float t[2][4]; t[0][4] = 1.0f; out[e] = 0.0f;", r"t\[4\] is out of bounds"),
    ],
)
def test_out_of_bounds(body: str, told: str) -> None:
    with pytest.raises(KernelFaultError, match=told):
        launch(metal(body))


@pytest.mark.parametrize(
    ("body", "told"),
    [
        (
            "float a[4]; a[0] = 0.0f; a[int(inp[e])] = 1.0f; out[e] = a[0];",
            "out of bounds|Sanitizer",
        ),
        ("int big = 2147483647; out[e] = float(big + int(inp[e]));", "signed integer overflow"),
        ("out[e] = float(1 << int(inp[e]));", "shift"),
    ],
)
def test_sanitizers_watch_what_stays_in_a_thread(body: str, told: str) -> None:
    with pytest.raises(KernelFaultError, match=told):
        launch(metal(body, sanitize=True))


def test_sanitizers_let_a_right_kernel_pass() -> None:
    got = launch(metal(REDUCTION, sanitize=True))
    np.testing.assert_array_equal(got, np.full(64, COUNTING.sum()))


def test_unwritten_outputs() -> None:
    body = "if (e < 10u || e > 12u) { out[e] = inp[e]; }"
    with pytest.raises(KernelFaultError, match=r"3 elements of the output out .* first out\[10\]"):
        launch(metal(body))
    got = launch(metal(body, allow_unwritten=True))
    np.testing.assert_array_equal(got[10:13].view(np.uint32), [0xA5A5A5A5] * 3)
    np.testing.assert_array_equal(np.delete(got, [10, 11, 12]), np.delete(COUNTING, [10, 11, 12]))
    assert (launch(metal(body), init_value=7)[10:13] == 7).all()


@pytest.mark.parametrize("body", ["out[e] = out[e] + inp[e];", "out[e] += inp[e];"])
def test_an_output_read_before_it_is_written(body: str) -> None:
    with pytest.raises(KernelFaultError, match=r"out\[0\] is read before it is written"):
        launch(metal(body))
    np.testing.assert_array_equal(launch(metal(body), init_value=1), COUNTING + 1)


def test_atomics_on_memory_that_nothing_was_written_to() -> None:
    add = "atomic_fetch_add_explicit(&out[e], uint(inp[e]), memory_order_relaxed);"
    store = "atomic_store_explicit(&out[e], 1u, memory_order_relaxed); "
    with pytest.raises(KernelFaultError, match=r"out\[0\] is read before it is written"):
        launch(metal(add, atomic_outputs=True), dtype=mx.uint32)
    got = launch(metal(store + add, atomic_outputs=True), dtype=mx.uint32)
    np.testing.assert_array_equal(got, COUNTING + 1)


def test_threadgroup_memory_starts_as_poison_in_every_group() -> None:
    body = """threadgroup uint t[32];
        out[e] = as_type<float>(t[lane] + uint(inp[0]));
        t[lane] = 1u;"""
    got = launch(metal(body), group=32)
    np.testing.assert_array_equal(got.view(np.uint32), [0xA5A5A5A5] * 64)


def test_an_uninitialised_variable() -> None:
    # The compiler sees the plain case; elsewhere a pattern stands in the variable, never a zero.
    with pytest.raises(KernelTextError, match="uninitialized"):
        launch(metal("float v; out[e] = v + inp[e];"))
    got = launch(metal("float v[4]; if (e < 9u) { v[e % 4u] = inp[e]; } out[e] = v[e % 4u];"))
    np.testing.assert_array_equal(got[:9], COUNTING[:9])
    if find_compiler().takes(PATTERN):
        assert got[9] != 0
        assert (got[9:].view(np.uint32) == got[9].view(np.uint32)).all()


def test_the_order_of_threads() -> None:
    body = """uint turn = atomic_fetch_add_explicit(&out[64], 1u, memory_order_relaxed);
        atomic_store_explicit(&out[e], turn + uint(inp[0]), memory_order_relaxed);"""

    def turns(**order: Any) -> list[int]:
        kernel = metal(body, atomic_outputs=True, **order)
        return launch(kernel, shape=(65,), dtype=mx.uint32, init_value=0)[:64].tolist()

    assert turns(order="forward") == list(range(64))
    assert turns(order="reverse") == list(range(63, -1, -1))
    first, second = turns(order="random", seed=1), turns(order="random", seed=2)
    assert sorted(first) == sorted(second) == list(range(64))
    assert len({tuple(first), tuple(second), tuple(range(64))}) == 3
    assert turns(order="random", seed=1) == first


def test_the_order_of_threads_shows_a_missing_barrier() -> None:
    body = REDUCTION.replace("threadgroup_barrier(mem_flags::mem_threadgroup);", "")
    orders = [{"order": "forward"}, {"order": "reverse"}]
    orders += [{"order": "random", "seed": seed} for seed in range(3)]
    seen = {tuple(launch(metal(body, **order)).view(np.uint32)) for order in orders}
    assert len(seen) > 1


def test_the_order_of_lanes_shows_a_sum_that_hangs_on_it() -> None:
    values = mx.array(np.random.default_rng(3).standard_normal(32).astype(np.float32))
    seen = set()
    for order in ("forward", "reverse"):
        kernel = metal("out[e] = simd_sum(inp[e]);", order=order)
        got = launch(kernel, threads=32, group=32, inputs=[values], shape=(32,))
        assert (got == got[0]).all()
        seen.add(float(got[0]))
    assert len(seen) == 2
    for seed in range(6):
        kernel = metal("out[e] = simd_sum(inp[e]);", order="random", seed=seed)
        seen.add(float(launch(kernel, threads=32, group=32, inputs=[values], shape=(32,))[0]))
    assert len(seen) > 2
