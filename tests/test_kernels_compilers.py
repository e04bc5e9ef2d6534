"""Other compilers read the kernel's text: NVIDIA's for CUDA, clang with Metal's address spaces."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import pytest

import metal_emulator
from moe_lens.kernels import Rule, fused_route
from moe_lens.kernels.body import Language
from routing_cases import DTYPES, tied_logits

RULE = Rule("softmax_precise", normalise="sum", cast="input")


def text_of(language: Language, tokens: int, experts: int, dtype: mx.Dtype) -> Any:
    """The whole text that is compiled for logits [tokens, experts] of `dtype`."""
    kernels = []

    def factory(*args: Any, **kwargs: Any) -> Any:
        made = {"metal": metal_emulator.metal_kernel, "cuda": metal_emulator.cuda_kernel}
        kernels.append(made[language](*args, **kwargs))
        return kernels[-1]

    fused_route(
        RULE,
        tied_logits((tokens, experts), 0, dtype),
        2,
        input_dtype=mx.bfloat16,
        factory=factory,
        language=language,
    )
    return kernels[0].text


@pytest.mark.slow
@pytest.mark.parametrize("by", ["nvcc", "nvrtc"])
def test_nvidia_compiles_the_cuda_text(by: str) -> None:
    for dtype, experts in zip(DTYPES.values(), (8, 128, 1024), strict=True):
        try:
            code = metal_emulator.compile_cuda(text_of("cuda", 2, experts, dtype), by)
        except metal_emulator.NoCompilerError as absent:
            pytest.skip(str(absent))
        assert "shfl.sync" in code


@pytest.mark.parametrize("shape", [(1, 3), (1, 8), (4, 300)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_clang_finds_nothing_wrong_with_the_metal_text(dtype: str, shape: tuple[int, int]) -> None:
    # (1, 3): the logits lie in the address space that MLX gives inputs of fewer than 8 elements.
    try:
        found = metal_emulator.lint(text_of("metal", *shape, DTYPES[dtype]))
    except metal_emulator.NoCompilerError as absent:
        pytest.skip(str(absent))
    assert found == []
