"""When the fused kernel is used, when it is not, and what the user reads about it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any
from unittest import mock

import mlx.core as mx
import numpy as np
import pytest

import metal_emulator
from moe_lens.kernels import Groups, Kernel, Rule, kernel_mode, reference_routed, route
from routing_cases import (
    DTYPES,
    as_float,
    assert_sorted,
    by_id,
    family_rules,
    flags,
    tied_logits,
    widened,
)

Factory = Callable[..., Any]

RULE = Rule("softmax_precise", side="high", normalise="sum")
LOGITS = tied_logits((4, 24), 0)
NO_METAL = mock.patch.object(mx.metal, "is_available", return_value=False)
METAL = mock.patch.object(mx.metal, "is_available", return_value=True)
NO_CUDA = mock.patch.object(mx.cuda, "is_available", return_value=False)
CUDA = mock.patch.object(mx.cuda, "is_available", return_value=True)
ON_GPU = mock.patch.object(mx, "default_device", return_value=mx.Device(mx.gpu, 0))
ON_CPU = mock.patch.object(mx, "default_device", return_value=mx.Device(mx.cpu, 0))


class Counting:
    """A factory that counts the kernels made and the launches."""

    def __init__(self, factory: Factory, change: Callable[[list], list] | None = None) -> None:
        self.factory = factory
        self.change = change
        self.made = self.launches = 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.made += 1
        kernel = self.factory(*args, **kwargs)

        def call(**arguments: Any) -> list[mx.array]:
            self.launches += 1
            outputs = kernel(**arguments)
            return outputs if self.change is None else self.change(outputs)

        return call


def is_the_reference_s(got: tuple[mx.array, mx.array], logits: mx.array, k: int) -> bool:
    wanted = route(RULE, logits, k)
    return all(bool(mx.array_equal(*pair)) for pair in zip(got, wanted, strict=True))


# The mode -----------------------------------------------------------------------------------


def test_the_mode_is_given_or_of_the_environment_or_auto(monkeypatch: Any) -> None:
    monkeypatch.delenv("MOE_LENS_KERNEL", raising=False)
    assert kernel_mode() == "auto"
    monkeypatch.setenv("MOE_LENS_KERNEL", "never")
    assert kernel_mode() == Kernel().mode == "never"
    assert kernel_mode("auto") == "auto"
    monkeypatch.setenv("MOE_LENS_KERNEL", "")
    assert kernel_mode() == "auto"


def test_an_unknown_mode_is_refused_and_says_where_it_stood(monkeypatch: Any) -> None:
    with pytest.raises(ValueError, match=r"^kernel must be auto, never or always, not 'maybe'"):
        Kernel("maybe")
    monkeypatch.setenv("MOE_LENS_KERNEL", "on")
    with pytest.raises(ValueError, match=r"^MOE_LENS_KERNEL must be auto, never or always"):
        Kernel()


# Where no kernel runs ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mode", "machine", "reason"),
    [
        ("auto", (NO_METAL, NO_CUDA), "MLX has no GPU on this machine"),
        ("auto", (METAL, NO_CUDA, ON_CPU), "MLX's default device is the CPU"),
        ("auto", (NO_METAL, CUDA, ON_GPU), "the CUDA kernel is proved by emulation only"),
        ("never", (METAL, NO_CUDA, ON_GPU), "kernel 'never' was asked for"),
    ],
)
def test_where_no_kernel_runs_the_reference_does_and_the_reason_is_readable(
    mode: str, machine: tuple[Any, ...], reason: str
) -> None:
    for each in machine:
        each.start()
    try:
        kernel = Kernel(mode)
        assert is_the_reference_s(kernel.route(RULE, LOGITS, 3), LOGITS, 3)
        assert kernel.refusal(RULE, 24, 3, mx.float32).startswith(reason)
        assert kernel.reason.startswith(f"routing by the reference: {reason}")
    finally:
        for each in machine:
            each.stop()


def test_always_without_a_gpu_is_an_error() -> None:
    with NO_METAL, NO_CUDA, pytest.raises(ValueError, match="no GPU on this machine; use 'auto'"):
        Kernel("always")


def test_never_makes_no_kernel(kernel_factory: Factory) -> None:
    factory = Counting(kernel_factory)
    kernel = Kernel("never", factory)
    assert is_the_reference_s(kernel.route(RULE, LOGITS, 3), LOGITS, 3)
    assert factory.made == 0


# Where it does ----------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["auto", "always"])
def test_a_program_is_made_and_probed_once_when_first_needed(
    mode: str, kernel_factory: Factory
) -> None:
    factory = Counting(kernel_factory)
    kernel = Kernel(mode, factory)
    assert factory.made == 0
    assert "once its probe agrees" in kernel.reason
    ids, weights = kernel.route(RULE, LOGITS, 3)
    assert (factory.made, factory.launches) == (1, 3)
    assert "its probe agreed with the reference" in kernel.reason
    assert kernel.reason.startswith("routing by the kernel")
    wanted = by_id(*route(RULE, LOGITS, 3))
    np.testing.assert_array_equal(by_id(ids, weights)[0], wanted[0])
    kernel.route(RULE, LOGITS, 5, mask=flags(24, 3))
    assert (factory.made, factory.launches) == (1, 4)
    kernel.route(RULE, LOGITS.astype(mx.bfloat16), 3)
    assert (factory.made, factory.launches) == (1, 7)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_rule_of_the_families_passes_its_probe(dtype: str, kernel_factory: Factory) -> None:
    for name, (rule, experts, k) in family_rules(dtype).items():
        for wide in (False, True):
            if wide:
                rule, experts, k = widened(rule, 64), 64, 8
            kernel = Kernel("auto", kernel_factory)
            found = kernel.refusal(rule, experts, k, DTYPES[dtype], DTYPES[dtype])
            assert found is None, (name, found)


@pytest.mark.parametrize("mode", ["auto", "always"])
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda outputs: [(outputs[0] + 1) % 24, *outputs[1:]], "chose other experts"),
        (lambda outputs: [outputs[0], outputs[1] * 1.01, *outputs[2:]], "weighed the experts"),
        (lambda outputs: [outputs[0], outputs[1] * float("nan"), *outputs[2:]], "weighed"),
    ],
)
def test_a_kernel_that_disagrees_is_not_used(
    mode: str, change: Callable[[list], list], reason: str, kernel_factory: Factory
) -> None:
    kernel = Kernel(mode, Counting(kernel_factory, change))
    if mode == "always":
        with pytest.raises(ValueError, match=f"'always' cannot be kept: its probe {reason}"):
            kernel.route(RULE, LOGITS, 3)
        return
    assert is_the_reference_s(kernel.route(RULE, LOGITS, 3), LOGITS, 3)
    assert kernel.reason.startswith(f"routing by the reference: its probe {reason}")


def test_a_kernel_with_the_wrong_side_at_ties_is_not_used(kernel_factory: Factory) -> None:
    def wrong_side(name: str, inputs: Any, outputs: Any, source: str, header: str) -> Any:
        source = source.replace("tie_high != 0 ? simd_max(high) : simd_min(low)", "simd_min(low)")
        return kernel_factory(name, inputs, outputs, source, header=header)

    assert Kernel("auto", wrong_side).refusal(RULE, 24, 3, mx.float32) == (
        "its probe chose other experts than the reference"
    )
    low = Rule("softmax_precise", normalise="sum")
    assert Kernel("auto", wrong_side).refusal(low, 24, 3, mx.float32) is None


def test_a_kernel_that_does_not_compile_is_not_used() -> None:
    def broken(name: str, inputs: Any, outputs: Any, source: str, header: str) -> Any:
        return metal_emulator.metal_kernel(
            name, inputs, outputs, source + "this is no Metal;", header=header
        )

    kernel = Kernel("auto", broken)
    assert is_the_reference_s(kernel.route(RULE, LOGITS, 3), LOGITS, 3)
    assert kernel.reason.startswith("routing by the reference: its probe failed (Kernel")
    assert "\n" not in kernel.reason


def test_what_the_kernel_does_not_take_goes_to_the_reference(kernel_factory: Factory) -> None:
    wide = tied_logits((2, 1030), 1)
    kernel = Kernel("auto", Counting(kernel_factory))
    assert is_the_reference_s(kernel.route(RULE, wide, 3), wide, 3)
    assert "does not take 1030 experts" in kernel.reason
    with pytest.raises(ValueError, match="cannot be kept: the routing kernel does not take 1030"):
        Kernel("always", kernel_factory).route(RULE, wide, 3)


def test_cuda_is_used_when_it_is_asked_for() -> None:
    with NO_METAL, CUDA, ON_GPU:
        kernel = Kernel("always")
        assert kernel.language == "cuda"
        assert kernel.reason.startswith("routing by the kernel on CUDA")
    kernel = Kernel("always", metal_emulator.cuda_kernel, language="cuda")
    ids, _ = kernel.route(RULE, LOGITS, 3)
    wanted = by_id(*route(RULE, LOGITS, 3))[0]
    np.testing.assert_array_equal(np.sort(np.array(ids), -1), wanted)


# Both give the same ---------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["never", "always"])
def test_routed_gives_ids_weights_and_statistics_either_way(
    mode: str, kernel_factory: Factory
) -> None:
    kernel = Kernel(mode, kernel_factory)
    rule = Rule("sigmoid_float32", groups=Groups(4, 2), normalise="sum", cast="input")
    changes = {"mask": flags(24, 3), "force": flags(24, 5), "scale": mx.arange(24.0)}
    routed = kernel.routed(rule, LOGITS, 4, input_dtype=mx.bfloat16, **changes)
    wanted = reference_routed(rule, LOGITS, 4, input_dtype=mx.bfloat16, **changes)
    assert_sorted(routed)
    assert_sorted(wanted)
    assert routed.ids.tolist() == wanted.ids.tolist()
    assert routed.weights.dtype == mx.bfloat16
    np.testing.assert_allclose(as_float(routed.weights), as_float(wanted.weights), rtol=2**-7)
    for name in ("entropy", "margin", "mass"):
        mine, theirs = (np.array(getattr(each, name)) for each in (routed, wanted))
        np.testing.assert_allclose(mine, theirs, rtol=1e-5)


def test_importing_and_choosing_compile_nothing() -> None:
    program = """
import mlx.core as mx
def fail(*_, **__): raise SystemExit("a kernel was made")
mx.fast.metal_kernel = mx.fast.cuda_kernel = fail
import moe_lens.kernels
moe_lens.kernels.Kernel("auto").reason
moe_lens.kernels.Kernel("auto", fail).reason
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)
