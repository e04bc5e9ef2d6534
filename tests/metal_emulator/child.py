"""The child process in which kernels run, so that a wild write cannot end the tests.

One child serves many launches. A fault is reported by the child, which then ends; the next launch
starts a new one. What is not reported, a signal or an endless loop, is told by how it ended.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import select
import signal
import struct
import subprocess
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Literal

from .compiling import runner
from .errors import KernelFaultError

Order = Literal["forward", "reverse", "random"]
"""In which order the threads of a group run and in which a reduction adds its lanes."""

ORDERS: dict[Order, int] = {"forward": 0, "reverse": 1, "random": 2}


@dataclass(frozen=True)
class Launch:
    """One launch: `grid` and `threadgroup` in threads, as MLX takes them.

    `whole_groups` rounds the grid up to whole threadgroups, as CUDA does; Metal clips the last.
    """

    library: Path
    grid: tuple[int, int, int]
    threadgroup: tuple[int, int, int]
    whole_groups: bool = False
    order: Order = "forward"
    seed: int = 0


@dataclass(frozen=True)
class Buffer:
    """One argument: bytes that go in, or an output of `size` bytes (with `data`: filled)."""

    name: str
    element_size: int
    data: bytes | None = None
    size: int = 0
    is_output: bool = False


@dataclass(frozen=True)
class Output:
    """One output that came back, and how many of its elements no thread wrote."""

    data: bytes
    unwritten: int
    first_unwritten: int


@dataclass(frozen=True)
class Outcome:
    """The outputs in order, and how many SIMD calls the launch made over all groups."""

    outputs: list[Output]
    simd_calls: int


class Child:
    """Starts the runner when it is first needed and again after every fault."""

    def __init__(self, *, sanitize: bool = False, patience: float = 300.0) -> None:
        self.sanitize = sanitize
        self.patience = patience
        """Seconds a launch may take before it counts as endless."""
        self._process: subprocess.Popen[bytes] | None = None
        self._errors: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as we
        atexit.register(self.stop)

    def run(self, launch: Launch, buffers: Sequence[Buffer]) -> Outcome:
        """Runs one launch.

        Raises:
            KernelFaultError: For what the runner reports, and for a crash or an endless loop.
        """
        process = self._running()
        deadline = time.monotonic() + self.patience
        try:
            with contextlib.suppress(BrokenPipeError):
                assert process.stdin is not None
                process.stdin.write(_request(launch, buffers))
                process.stdin.flush()
            (status,) = struct.unpack("<I", self._read(4, deadline))
            if status:
                (length,) = struct.unpack("<I", self._read(4, deadline))
                message = self._read(length, deadline).decode()
                raise KernelFaultError(message)
            (simd_calls,) = struct.unpack("<Q", self._read(8, deadline))
            outputs = []
            for buffer in buffers:
                if buffer.is_output:
                    data = self._read(buffer.size, deadline)
                    outputs.append(Output(data, *struct.unpack("<QQ", self._read(16, deadline))))
        except BaseException:
            self.stop()
            raise
        return Outcome(outputs, simd_calls)

    def stop(self) -> None:
        """Ends the runner; the next launch starts another."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            for stream in (process.stdin, process.stdout):
                if stream is not None:
                    with contextlib.suppress(BrokenPipeError):
                        stream.close()
            process.wait()

    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is None:
            self._errors.seek(0)
            self._errors.truncate()
            self._process = subprocess.Popen(
                [str(runner(sanitize=self.sanitize))],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._errors,
                env={**os.environ, "LD_PRELOAD": "", "ASAN_OPTIONS": "detect_leaks=0"},
            )
        return self._process

    def _read(self, size: int, deadline: float) -> bytes:
        assert self._process is not None and self._process.stdout is not None
        descriptor = self._process.stdout.fileno()
        parts = bytearray()
        while len(parts) < size:
            ready, _, _ = select.select([descriptor], [], [], max(0.0, deadline - time.monotonic()))
            if not ready:
                raise KernelFaultError(f"the kernel has not ended after {self.patience:g} s")
            part = os.read(descriptor, min(size - len(parts), 1 << 20))
            if not part:
                raise KernelFaultError(self._how_it_ended())
            parts += part
        return bytes(parts)

    def _how_it_ended(self) -> str:
        assert self._process is not None
        code = self._process.wait()
        self._errors.seek(0)
        told = self._errors.read().decode(errors="replace").strip()
        ended = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit status {code}"
        return f"the kernel crashed ({ended})" + (f":\n{told[:4000]}" if told else "")


def _request(launch: Launch, buffers: Sequence[Buffer]) -> bytes:
    path = os.fsencode(launch.library)
    head = (
        *launch.grid,
        *launch.threadgroup,
        int(launch.whole_groups),
        ORDERS[launch.order],
        launch.seed,
        len(buffers),
    )
    parts = [struct.pack("<I", len(path)), path, struct.pack("<10I", *head)]
    for buffer in buffers:
        kind = 0 if not buffer.is_output else 1 if buffer.data is None else 2
        size = buffer.size if buffer.data is None else len(buffer.data)
        parts.append(struct.pack("<IIQ", kind, buffer.element_size, size))
        if buffer.data is not None:
            parts.append(buffer.data)
    return b"".join(parts)
