"""Fixtures of the whole suite."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

import metal_emulator
from family_cases import Case, all_cases, open_case
from moe_lens.router import ExpertRouter
from moe_lens.trace import Trace, is_trace
from tiny_models import cpu_stand_ins


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--kernel-factory",
        choices=("emulator", "metal"),
        default="emulator",
        help="what runs the GPU kernels of the tests: the emulator, or the GPU of this Mac",
    )


@pytest.fixture(scope="session")
def kernel_factory(request: pytest.FixtureRequest) -> Callable[..., Any]:
    """Builds Metal kernels with the signature of `mx.fast.metal_kernel`."""
    if request.config.getoption("--kernel-factory") == "metal":
        if not mx.metal.is_available():
            pytest.fail("--kernel-factory=metal needs MLX on a Mac with Metal; leave it out here")
        return mx.fast.metal_kernel
    try:
        metal_emulator.find_compiler()
    except metal_emulator.NoCompilerError as missing:
        pytest.fail(str(missing))
    return metal_emulator.metal_kernel


@pytest.fixture(scope="session", autouse=True)
def output_of_no_width() -> None:
    """Captured output is not wrapped; xdist tells its workers the width of the terminal."""
    os.environ.pop("COLUMNS", None)


@pytest.fixture(scope="session", autouse=True)
def muse_spark_on_cpu() -> Iterator[None]:
    """muse_spark's kernels are Metal only; elsewhere its tests run on stand-ins."""
    with cpu_stand_ins.muse_spark_kernels():
        yield


@pytest.fixture
def half_precision_experts() -> Iterator[None]:
    """The CPU has no half-precision expert product; the test computes it in float32."""
    with cpu_stand_ins.half_precision_experts():
        yield


def _marked(name: str, mode: str):
    marks = [pytest.mark.slow] if mode == "bfloat16" else []
    return pytest.param((name, mode), id=f"{name}-{mode}", marks=marks)


@pytest.fixture(scope="module", params=[_marked(*case) for case in all_cases()])
def case(request: pytest.FixtureRequest) -> Iterator[Case]:
    """Every tiny model in float32, in 4 bits, and (slow) in bfloat16."""
    with open_case(*request.param) as opened:
        yield opened


@pytest.fixture(scope="session")
def demo_run(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Trace:
    """The demo corpus through the demo model, recorded once for all workers."""
    base = tmp_path_factory.getbasetemp()
    folder = (base if worker_id == "master" else base.parent) / "demo-run"
    with Path(f"{folder}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not is_trace(folder):
            with ExpertRouter.from_pretrained("demo", cpu_experts="auto") as router:
                router.trace("demo", folder, router_logits=True)
    return Trace.open(folder)
