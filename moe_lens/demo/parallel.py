"""Data-parallel training on a few CPU processes.

MLX runs one stream of CPU work on little more than one core, so each core gets a process of its
own. Every step, each process puts its gradient into shared memory, waits for the others, and
applies the same averaged gradient with the same optimiser, so all copies of the weights stay
identical without ever being exchanged.
"""

from __future__ import annotations

import math
import multiprocessing
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.queues import SimpleQueue
from multiprocessing.shared_memory import SharedMemory
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.optimizers as optim
import numpy as np
from mlx.nn.utils import value_and_grad
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.models.qwen3_moe import Model
from numpy.typing import NDArray

from moe_lens.demo import network
from moe_lens.demo.batches import Sampler, load_streams

_EXTRA = 3
"""Numbers each process adds to its gradient: cross entropy, load balance, progress."""

_WARM_UP = 80
_LONG_EVERY = 4
_REPORT_EVERY = 20
_CHECKPOINT_EVERY = 250

_MALLOC = {
    # Without these, glibc hands every freed buffer back to the system, and the next step pays for
    # the page faults again.
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": "33554432",
    "MALLOC_TRIM_THRESHOLD_": "8589934592",
    "MALLOC_TOP_PAD_": "67108864",
    # One process per core already; threads of the BLAS library would only get in the way.
    "OPENBLAS_NUM_THREADS": "1",
}


@dataclass(frozen=True)
class Stage:
    """One run of the optimiser, from start weights to end weights (float32 safetensors files).

    It ends after ``steps``, or after ``seconds`` where these are given. Each process takes ``rows``
    windows of ``length`` tokens per step. ``router_rate`` scales the routers' learning rate. Until
    it has ended, ``end`` holds the latest checkpoint.
    """

    config: dict[str, Any]
    data: Path
    start: Path | None
    end: Path
    learning_rate: float
    router_rate: float = 1.0
    steps: int = 0
    seconds: float = 0.0
    rows: int = 16
    length: int = 128
    processes: int = 2
    seed: int = 0


@dataclass(frozen=True)
class Report:
    """What the first process tells while training; losses are in nats per token."""

    step: int
    tokens: int
    progress: float
    cross_entropy: float
    balance: float
    seconds: float


def run_stage(stage: Stage, show: Callable[[Report], None]) -> Report:
    """Train a stage in ``stage.processes`` processes; returns the last report."""
    model = network.build(stage.config)
    size = sum(array.size for array in network.flat_weights(model).values())
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(stage.processes)
    reports: SimpleQueue[Report] = context.SimpleQueue()
    memory = SharedMemory(create=True, size=_shape_bytes(stage.processes, size))
    before = dict(os.environ)
    os.environ.update(_MALLOC)  # read by the allocator when the workers start
    workers = [
        context.Process(target=_work, args=(rank, stage, memory.name, size, barrier, reports))
        for rank in range(stage.processes)
    ]
    last: Report | None = None
    try:
        for worker in workers:
            worker.start()
        while any(worker.is_alive() for worker in workers) or not reports.empty():
            if any(worker.exitcode for worker in workers):
                raise RuntimeError("a training process has failed; its error stands above")
            if reports.empty():
                time.sleep(0.1)
                continue
            last = reports.get()
            show(last)
    finally:
        for worker in workers:
            if worker.is_alive():
                worker.terminate()
            worker.join()
        memory.close()
        memory.unlink()
        os.environ.clear()
        os.environ.update(before)
    if last is None or any(worker.exitcode for worker in workers):
        raise RuntimeError("the training processes ended without a result")
    return last


def _shape_bytes(processes: int, size: int) -> int:
    return 2 * processes * (size + _EXTRA) * 4


def _work(
    rank: int,
    stage: Stage,
    memory_name: str,
    size: int,
    barrier: Barrier,
    reports: SimpleQueue[Report],
) -> None:
    """One worker: the training loop on its own windows."""
    mx.random.seed(stage.seed)
    model = network.build(stage.config)
    if stage.start is None:
        network.initialise(model)
    else:
        model.load_weights(str(stage.start))
    sampler = Sampler(load_streams(stage.data), seed=1000 * stage.seed + rank)
    optimiser = _optimiser(stage)
    gradient_of = value_and_grad(model, network.training_loss)
    shapes = [(name, a.shape, a.size) for name, a in network.flat_weights(model).items()]
    memory = SharedMemory(name=memory_name)
    # Two halves, used in turn: a fast process may write the next step while a slow one still
    # reads this step, but it cannot be two steps ahead because of the barrier.
    board: NDArray[np.float32] = np.ndarray(
        (2, stage.processes, size + _EXTRA), dtype=np.float32, buffer=memory.buf
    )
    started = time.monotonic()
    step = tokens = 0
    progress, smooth = 0.0, math.nan
    while progress < 1.0:
        # Every fourth step has windows of twice the length: prompts may be longer than a window,
        # and positions that were never trained give nonsense.
        long = step % _LONG_EVERY == _LONG_EVERY - 1
        rows, length = (stage.rows // 2, 2 * stage.length) if long else (stage.rows, stage.length)
        windows = mx.array(sampler.batch(rows, length))
        (_, entropy, balance), gradient = gradient_of(model, windows)
        gradients: Any = tree_flatten(gradient)
        flat = mx.concatenate([array.reshape(-1) for _, array in gradients])
        mx.eval(flat, entropy, balance)
        half = board[step % 2]
        half[rank, :size] = np.array(flat, copy=False)
        done = (step + 1) / stage.steps if stage.steps else 0.0
        if stage.seconds:
            done = (time.monotonic() - started) / stage.seconds
        half[rank, size:] = (entropy.item(), balance.item(), done)
        barrier.wait()
        average = half[:, :size].mean(axis=0)
        average *= min(1.0, 1.0 / (float(np.linalg.norm(average)) + 1e-6))  # clip the norm to 1
        _set_rate(optimiser, stage, step, progress)
        optimiser.update(model, _unflatten(mx.array(average), shapes))
        mx.eval(model.parameters(), optimiser.state)
        # The first process's clock counts for all, so that all stop at the same step.
        progress = float(half[0, size + 2])
        mean_entropy = float(half[:, size].mean())
        smooth = mean_entropy if math.isnan(smooth) else 0.97 * smooth + 0.03 * mean_entropy
        step += 1
        tokens += rows * length * stage.processes
        if rank == 0 and (step % _REPORT_EVERY == 0 or step == 1 or progress >= 1.0):
            balance_now = float(half[:, size + 1].mean())
            seconds = time.monotonic() - started
            reports.put(Report(step, tokens, min(progress, 1.0), smooth, balance_now, seconds))
        if rank == 0 and (step % _CHECKPOINT_EVERY == 0 or progress >= 1.0):
            _save(model, stage.end)
    memory.close()


def _optimiser(stage: Stage) -> optim.MultiOptimizer:
    """AdamW twice, the first for the routers, so that these can have a rate of their own."""
    routers, others = (
        optim.AdamW(learning_rate=stage.learning_rate, betas=[0.9, 0.95], weight_decay=0.05)
        for _ in range(2)
    )
    return optim.MultiOptimizer(
        [routers, others], [lambda name, _: name.endswith("mlp.gate.weight")]
    )


def _set_rate(optimiser: optim.MultiOptimizer, stage: Stage, step: int, progress: float) -> None:
    """Linear warm-up, then a cosine down to 2 %; ``stage.router_rate`` scales the routers'."""
    cosine = 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    rate = stage.learning_rate * min(1.0, (step + 1) / _WARM_UP) * cosine
    routers, others = optimiser.optimizers
    routers.learning_rate = rate * stage.router_rate
    others.learning_rate = rate


def _unflatten(flat: mx.array, shapes: list[tuple[str, tuple[int, ...], int]]) -> Any:
    """The averaged gradient as the tree of arrays the optimiser wants."""
    arrays, offset = [], 0
    for name, shape, size in shapes:
        arrays.append((name, flat[offset : offset + size].reshape(shape)))
        offset += size
    return tree_unflatten(arrays)


def _save(model: Model, path: Path) -> None:
    """Write the weights, replacing an older checkpoint only when the new one is complete."""
    partial = path.with_suffix(".partial.safetensors")
    mx.save_safetensors(str(partial), network.flat_weights(model))
    partial.replace(path)
