"""Texts that Metal would refuse are refused here."""

from __future__ import annotations

import re

import mlx.core as mx
import numpy as np
import pytest

from emulator_probe import COUNTING, START, launch, metal
from metal_emulator import (
    KernelFaultError,
    KernelTextError,
    NoCompilerError,
    lint,
    record_metal,
)

# ---- texts that are not Metal ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "told"),
    [
        ("double v = inp[e]; out[e] = 0.0f;", "line 13: `double`: Metal has no double"),
        ("std::swap(e, lane); out[e] = 0.0f;", "`std`: Metal has no std"),
        ("try { out[e] = 0.0f; } catch (int) {}", "`try`: Metal has no exceptions"),
        ("float* p = new float[4]; out[e] = p[0];", "`new`: Metal allocates nothing"),
        ("out[e] = inp[e]", "rejects the kernel"),
        ("out[e] = erff(inp[e]);", "erff"),
        ("out[e] = unknown;", "unknown"),
        ("inp[e] = 1.0f;", "rejects the kernel"),
        ("float f = 1.0f; out[e] = half(f) + 1;", "deleted"),
        ("out[e] = simd_sum(lane > 3u) ? 1.0f : 0.0f;", "no bool"),
        ("out[e] = float(simd_sum(long(e)));", "64-bit"),
    ],
)
def test_words_metal_has_not(body: str, told: str) -> None:
    header = "".join(f"// line {line}\n" for line in range(1, 7))
    with pytest.raises(KernelTextError, match=told):
        launch(metal(body, header))


def test_a_forbidden_word_in_a_comment_is_none() -> None:
    launch(metal("// a double is not needed\n/* std::swap */ out[e] = inp[e];"))


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_sixteen_bit_floats_need_a_cast(dtype: mx.Dtype) -> None:
    inputs = [mx.ones(64, dtype)]
    call = {"inputs": inputs, "dtype": dtype, "template": [("T", dtype)]}
    with pytest.raises(KernelTextError, match="rejects the kernel"):
        launch(metal("out[e] = float(inp[e]) * 2.0f;"), **call)
    assert (launch(metal("out[e] = T(float(inp[e]) * 2.0f);"), **call) == 2).all()


def test_a_bfloat_has_no_max_of_its_own() -> None:
    with pytest.raises(KernelTextError, match="deleted"):
        launch(metal("out[e] = float(max(inp[e], inp[e]));"), inputs=[mx.ones(64, mx.bfloat16)])


PICK = "inline float pick(const device float* p, uint i) { return p[i]; }\n"


@pytest.mark.parametrize(
    ("body", "header"),
    [
        ("out[e] = inp[e] + pick(few, 0u);", PICK),
        ("const device float* p = few; out[e] = p[0] + inp[e];", ""),
    ],
)
def test_fewer_than_eight_elements_lie_in_constant_memory(body: str, header: str) -> None:
    kernel = metal(body, header, ("inp", "few"))
    with pytest.raises(KernelTextError, match="Space::constant"):
        launch(kernel, inputs=[mx.array(COUNTING), mx.ones(7)])
    got = launch(kernel, inputs=[mx.array(COUNTING), mx.ones(8)])
    np.testing.assert_array_equal(got, COUNTING + 1)


@pytest.mark.parametrize(
    "body",
    [
        "const float* p = inp; out[e] = p[e];",
        "float v = inp[e]; float& w = v; out[e] = w;",
        "float v = inp[e]; float *w = &v; out[e] = *w;",
    ],
)
def test_a_pointer_needs_an_address_space(body: str) -> None:
    with pytest.raises(KernelTextError, match="names no address space"):
        launch(metal(body))


def test_a_product_is_no_pointer() -> None:
    body = "thread float& v = *(&e == &e ? &x : &x); out[e] = T(v) * T(2) + float(e & 0u);"
    kernel = metal("float x = inp[e]; " + body)
    np.testing.assert_array_equal(launch(kernel, template=[("T", mx.float32)]), COUNTING * 2)


def test_an_address_space_the_emulator_cannot_follow() -> None:
    with pytest.raises(KernelTextError, match="does not understand this use of `device`"):
        launch(metal("out[e] = SPACE;", "#define SPACE device\n"))


def test_inputs_lie_in_rows() -> None:
    with pytest.raises(ValueError, match="leave ensure_row_contiguous True"):
        metal("out[e] = inp[e];", ensure_row_contiguous=False)
    turned = mx.array(COUNTING).reshape(8, 8).T
    got = launch(metal("out[e] = inp[e];"), inputs=[turned])
    np.testing.assert_array_equal(got, np.array(turned).ravel())
    strides = metal(
        "out[e] = float(inp_strides[0]) + 100.0f * float(inp_strides[1]) + 0.0f * inp[e];"
    )
    assert (launch(strides, inputs=[turned]) == 108).all()


@pytest.mark.parametrize(
    ("threads", "group", "told"),
    [(2048, 2048, "more than 1024 threads"), (0, 32, "a side of the grid")],
)
def test_launches_a_gpu_refuses(threads: int, group: int, told: str) -> None:
    with pytest.raises(KernelFaultError, match=told):
        launch(metal("if (e < 64u) { out[e] = inp[e]; }"), threads=threads, group=group)


# ---- a second opinion ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "told"),
    [
        ("out[e] = simd_sum(inp[e]) + metal::exp(few[0]);", None),
        ("const device float* p = few; out[e] = p[0];", "'constant float|address space"),
        ("const float* p = inp; out[e] = p[0];", "address space|cannot initialize"),
        ("inp[e] = 1.0f;", r"^line 9: .*(read-only|const)"),
        ("out[e] = simd_shuffle(inp[e]);", "no matching function"),
        ("out[e] = unknown;", "undeclared identifier 'unknown'"),
    ],
)
def test_lint_by_clang(body: str, told: str | None) -> None:
    real = mx.fast.metal_kernel("probe", ["inp", "few"], ["out"], START + body)
    text = record_metal(
        real,  # type: ignore[arg-type]
        [mx.array(COUNTING), mx.zeros(7)],
        grid=(64, 1, 1),
        threadgroup=(64, 1, 1),
        output_shapes=[(64,)],
        output_dtypes=[mx.float32],
        template=[("T", mx.float32)],
    )
    try:
        found = lint(text)
    except NoCompilerError as missing:
        pytest.skip(str(missing))
    if told is None:
        assert found == []
    else:
        assert found
        assert any(re.search(told, line) for line in found), found
