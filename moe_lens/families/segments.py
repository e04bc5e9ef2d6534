"""Products by segment: the slots of a call sorted by expert, all rows of an expert at once.

MLX's CPU backend multiplies gathered weights row by row, which is many times slower than a product
of matrices. Here NumPy multiplies. Packed weights are unpacked one expert at a time, unless too few
rows wait for it. What comes out is what MLX gives, up to the order of sums.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models.switch_layers import SwiGLU
from numpy.typing import NDArray
from threadpoolctl import ThreadpoolController

Rows = NDArray[np.float32]

FEWEST_ROWS = 8
"""Rows of an expert, on average, from which on it pays to unpack its weights: that takes as long as
2 (affine, 4 or 8 bits) to 20 (mxfp4) rows of MLX's own product of packed weights."""

ONE_THREAD = 1 << 28
"""Multiplications of one product below which it stays on one core. The threads of a BLAS wait for
each other spinning, which on a busy machine takes many times as long as a small product."""


@dataclass(frozen=True)
class Segments:
    """The slots of one call, sorted by expert."""

    order: NDArray[np.int64]
    """[slots] the place of each sorted slot among the given ones."""
    ends: NDArray[np.int64]
    """[E + 1] where the segment of each expert begins, and where the last one ends."""

    @classmethod
    def of(cls, ids: mx.array, experts: int) -> Segments:
        # Sixteen bits are sorted by radix, in a tenth of the time.
        flat = np.array(ids.reshape(-1), copy=False).astype(np.uint16)
        order = np.argsort(flat, kind="stable")
        return cls(order, np.searchsorted(flat[order], np.arange(experts + 1)))

    @property
    def rows(self) -> float:
        """Of an expert that has any, on average."""
        return len(self.order) / max(1, int(np.count_nonzero(np.diff(self.ends))))

    def __iter__(self) -> Iterator[tuple[int, NDArray[np.int64]]]:
        """Every expert that has slots, with them."""
        for expert in np.flatnonzero(np.diff(self.ends)).tolist():
            yield expert, self.order[self.ends[expert] : self.ends[expert + 1]]


class _Matrices:
    """The weights and biases of one Switch Linear, an expert at a time."""

    def __init__(self, module: Any) -> None:
        self._module = module
        self._packed = "scales" in module
        self._bias = _view(module.bias) if "bias" in module else None
        self._weight = None if self._packed else _view(module.weight)

    def product(self, rows: Rows, expert: int) -> Rows:
        """[rows, outputs] what one expert makes of its rows."""
        weight = self._unpacked(expert) if self._weight is None else self._weight[expert]
        found: Rows = rows @ weight.T
        if self._bias is not None:
            found += self._bias[expert]
        return found

    def _unpacked(self, expert: int) -> Rows:
        module = self._module
        biases, scale = module.get("biases"), module.get("global_scale")
        return _view(
            mx.dequantize(
                module.weight[expert],
                module.scales[expert],
                None if biases is None else biases[expert],
                module.group_size,
                module.bits,
                module.mode,
                global_scale=None if scale is None else scale[expert],
                dtype=mx.float32,
            )
        )


def _view(values: mx.array) -> Rows:
    """The array as NumPy sees it in float32: without a copy where it is that already."""
    values = values.astype(mx.float32)
    mx.eval(values)
    return np.array(values, copy=False)


def _filled(
    segments: Segments, width: int, rows_of: Callable[[int, NDArray[np.int64]], Rows]
) -> mx.array:
    """[slots, width] the rows that each expert answers for its slots, put where they belong."""
    outputs = mx.zeros((len(segments.order), width))
    # NumPy writes into MLX's memory, so that the outputs stand in memory once.
    view = _view(outputs)
    for expert, slots in segments:
        view[slots] = rows_of(expert, slots)
    return outputs


@contextmanager
def _cores(segments: Segments, module: Any) -> Iterator[None]:
    """Use all cores for products that are worth it."""
    if segments.rows * module.input_dims * module.output_dims >= ONE_THREAD:
        yield
    else:
        with _pools().limit(limits=1, user_api="blas"):
            yield


@cache
def _pools() -> ThreadpoolController:
    return ThreadpoolController()


def _too_few(segments: Segments, modules: Iterable[nn.Module]) -> bool:
    return segments.rows < FEWEST_ROWS and any("scales" in module for module in modules)


def multiplied(module: Any, x: mx.array, ids: mx.array) -> mx.array | None:
    """[*ids, 1, outputs] of `x` [*ids, 1, inputs]: what a Switch Linear computes.

    None where stock MLX is faster.
    """
    segments = Segments.of(ids, module.num_experts)
    if _too_few(segments, [module]):
        return None
    rows = _view(mx.broadcast_to(x, (*ids.shape, 1, x.shape[-1])).reshape(-1, x.shape[-1]))
    matrices = _Matrices(module)
    with _cores(segments, module):
        found = _filled(
            segments,
            module.output_dims,
            lambda expert, slots: matrices.product(rows[slots], expert),
        )
    return found.reshape(*ids.shape, 1, -1).astype(x.dtype)


def answered(
    before: Sequence[nn.Module],
    activation: Any,
    after: Any,
    x: mx.array,
    ids: mx.array,
    *,
    call_after: bool,
) -> mx.array | None:
    """[*ids, hidden] of `x` [*tokens, hidden]: what all projections of a Switch module compute.

    A segment goes through all of them while it is in the cache, and the channels between them are
    held for one expert at a time. None where stock MLX is faster.

    Args:
        before: The projections of `x` to the channels.
        activation: What makes one value of theirs.
        after: The projection of the channels back.
        x: One row for each token.
        ids: [*tokens, k].
        call_after: Whether `after` must be called, since somebody watches or changes it; it then
            gets all channels at once, and what it computes by segment is the same to the last bit.
    """
    segments = Segments.of(ids, after.num_experts)
    if _too_few(segments, (*before, after)):
        return None
    matrices = [_Matrices(each) for each in before]
    last = None if call_after else _Matrices(after)
    tokens, k = _view(x.reshape(-1, x.shape[-1])), ids.shape[-1]

    def answers(expert: int, slots: NDArray[np.int64]) -> Rows:
        rows = tokens[slots // k]
        channels = _activated(activation, [each.product(rows, expert) for each in matrices])
        return channels if last is None else last.product(channels, expert)

    with _cores(segments, after):
        width = after.input_dims if call_after else after.output_dims
        found = _filled(segments, width, answers).astype(x.dtype)
    if not call_after:
        return found.reshape(*ids.shape, -1)
    called: mx.array = after(found.reshape(*ids.shape, 1, -1), ids)
    return called.squeeze(-2)


def _activated(activation: Any, channels: list[Rows]) -> Rows:
    """The activation of the module; the common one in NumPy, which is ten times faster at it."""
    if type(activation) is not SwiGLU:
        return _view(activation(*map(mx.array, channels)))
    x, gate = channels
    with np.errstate(over="ignore"):  # a gate far below zero closes: x / inf is 0
        closed = np.exp(-gate)
    closed += 1
    np.divide(gate, closed, out=closed)
    closed *= x
    return closed
