"""MLX arrays as bytes, and bytes as MLX arrays."""

from __future__ import annotations

import mlx.core as mx
import numpy as np

from .child import Buffer, Output

NUMPY = {
    mx.bool_: np.bool_,
    mx.uint8: np.uint8,
    mx.uint16: np.uint16,
    mx.uint32: np.uint32,
    mx.uint64: np.uint64,
    mx.int8: np.int8,
    mx.int16: np.int16,
    mx.int32: np.int32,
    mx.int64: np.int64,
    mx.float16: np.float16,
    mx.float32: np.float32,
    mx.bfloat16: np.uint16,  # numpy has no bfloat16: its bits
}


def to_numpy(array: mx.array) -> np.ndarray:
    """A row-contiguous copy; bfloat16 as the uint16 of its bits."""
    if array.dtype == mx.bfloat16:
        array = array.view(mx.uint16)
    return np.ascontiguousarray(np.array(array, copy=True))


def input_buffers(name: str, array: mx.array) -> dict[str, Buffer]:
    """The input itself and the shape, strides and dimension count a kernel may ask for.

    Strides count elements; MLX passes the shape as int32 and the strides as int64.
    """
    values = to_numpy(array)
    strides = [stride // values.itemsize for stride in values.strides]
    extras: dict[str, np.ndarray] = {
        "_shape": np.array(array.shape, np.int32),
        "_strides": np.array(strides, np.int64),
        "_ndim": np.array([array.ndim], np.int32),
    }
    buffers = {name: Buffer(name, values.itemsize, values.tobytes())}
    for suffix, extra in extras.items():
        buffers[name + suffix] = Buffer(name + suffix, extra.itemsize, extra.tobytes())
    return buffers


def output_buffer(
    name: str, shape: tuple[int, ...], dtype: mx.Dtype, init_value: float | None
) -> Buffer:
    """An output, filled with `init_value` or left for the runner to poison."""
    size = int(np.prod(shape)) * dtype.size
    data = None
    if init_value is not None:
        data = to_numpy(mx.full(shape, init_value, dtype)).tobytes()
    return Buffer(name, dtype.size, data, size, is_output=True)


def to_mlx(output: Output, shape: tuple[int, ...], dtype: mx.Dtype) -> mx.array:
    """The array of one output."""
    array = mx.array(np.frombuffer(output.data, NUMPY[dtype]).reshape(shape))
    return array.view(mx.bfloat16) if dtype == mx.bfloat16 else array
