"""Stand-ins that let a CPU run what MLX runs on a GPU only. For tests: moe-lens never uses them.

- ``muse_spark`` calls six fused Metal kernels that have no CPU version. The stand-ins are the same
  formulas in plain MLX operations; the real kernels are only tried where Metal is there.
- The CPU's ``gather_mm`` takes float32 only, so unquantised half-precision experts cannot run.
  :func:`half_precision_experts` computes them in float32 and rounds the result.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from unittest import mock

import mlx.core as mx
from mlx_lm.models import muse_spark
from mlx_lm.models.switch_layers import SwitchLinear


def expert_routing(
    logits: mx.array,
    bias: mx.array,
    *,
    top_k: int,
    multiplier: float,
    score_eps: float,
    route_scale: float,
) -> tuple[mx.array, mx.array]:
    scores = mx.sigmoid(logits * multiplier)
    ids = mx.argsort(-(scores + bias), axis=-1)[..., :top_k]
    weights = mx.take_along_axis(scores, ids, axis=-1)
    total = weights.sum(-1, keepdims=True) + score_eps
    return ids.astype(mx.uint32), weights / total * route_scale


def post_expert_norm_combine(
    experts: mx.array, weights: mx.array, *, norm_weight: mx.array, eps: float
) -> mx.array:
    normed = mx.fast.rms_norm(experts * norm_weight, None, eps)
    return (normed * weights[..., None]).sum(-2).astype(experts.dtype)


def pre_norm(stream: mx.array, norm, *, dtype: mx.Dtype) -> mx.array:
    return mx.fast.rms_norm(stream, norm.weight, norm.eps).astype(dtype)


def norm_add_norm(
    branch: mx.array,
    stream: mx.array,
    *,
    alpha: mx.array,
    beta: mx.array,
    post_weight: mx.array | None,
    post_eps: float,
    next_norm,
) -> tuple[mx.array, mx.array | None]:
    scaled = branch if post_weight is None else post_weight.astype(branch.dtype) * branch
    normed = mx.fast.rms_norm(scaled, None, post_eps).astype(mx.float32)
    total = alpha * stream + beta * normed
    return total, None if next_norm is None else pre_norm(total, next_norm, dtype=branch.dtype)


def qk_norm(
    qkvg: mx.array,
    *,
    n_heads: int,
    n_kv_heads: int,
    head_dim: int,
    eps: float,
    query_scale: float,
) -> tuple[mx.array, mx.array]:
    split = n_heads * head_dim
    end = split + n_kv_heads * head_dim
    queries = qkvg[..., :split].reshape(*qkvg.shape[:-1], n_heads, head_dim)
    keys = qkvg[..., split:end].reshape(*qkvg.shape[:-1], n_kv_heads, head_dim)
    return mx.fast.rms_norm(queries, None, eps) * query_scale, mx.fast.rms_norm(keys, None, eps)


def qk_norm_rope(
    qkvg: mx.array, *, head_dim: int, rope_base: float, offset: int, **options
) -> tuple[mx.array, mx.array]:
    def rotated(x: mx.array) -> mx.array:
        turned = mx.fast.rope(
            x.swapaxes(1, 2), head_dim, traditional=True, base=rope_base, scale=1.0, offset=offset
        )
        return turned.swapaxes(1, 2)

    queries, keys = qk_norm(qkvg, head_dim=head_dim, **options)
    return rotated(queries), rotated(keys)


def rms_norm_sigmoid_gate(x: mx.array, gate: mx.array, *, eps: float) -> mx.array:
    batch, heads, length, width = x.shape
    normed = mx.fast.rms_norm(x, None, eps).swapaxes(1, 2).reshape(batch, length, heads * width)
    return (normed * mx.sigmoid(gate)).astype(x.dtype)


MUSE_SPARK_KERNELS: tuple[Callable, ...] = (
    expert_routing,
    post_expert_norm_combine,
    pre_norm,
    norm_add_norm,
    qk_norm,
    qk_norm_rope,
    rms_norm_sigmoid_gate,
)


@contextlib.contextmanager
def muse_spark_kernels() -> Iterator[None]:
    """While active, muse_spark runs on a CPU; without effect where Metal is there."""
    if mx.metal.is_available():
        yield
        return
    replaced = {kernel.__name__: kernel for kernel in MUSE_SPARK_KERNELS}
    with mock.patch.multiple(muse_spark, **replaced):
        yield


def _switch_in_float32(
    self: SwitchLinear, x: mx.array, indices: mx.array, sorted_indices: bool = False
) -> mx.array:
    y = mx.gather_mm(
        x.astype(mx.float32),
        self["weight"].astype(mx.float32).swapaxes(-1, -2),
        rhs_indices=indices,
        sorted_indices=sorted_indices,
    ).astype(x.dtype)
    if "bias" in self:
        y = y + mx.expand_dims(self["bias"][indices], -2)
    return y


@contextlib.contextmanager
def half_precision_experts() -> Iterator[None]:
    """While active, unquantised experts in bfloat16 or float16 run on a CPU."""
    if mx.default_device() != mx.cpu:
        yield
        return
    with mock.patch.object(SwitchLinear, "__call__", _switch_in_float32):
        yield
