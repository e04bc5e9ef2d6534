"""The two seams: where a block's routing is seen and changed while the model's own code runs.

No module is replaced and no forward is re-implemented. The *class* of a few existing modules is
swapped for a subclass with another ``__call__`` and put back on detach.

- The **router seam**: a router module that returns (ids, weights) is observed, or its pair
  replaced. Where the gate is a plain Linear, its logits are observed.
- The **expert seam**: ``SwitchGLU.__call__(x, ids)`` is observed. For a block that routes inline
  it returns an [`ExpertOutputs`][moe_lens.families.seams.ExpertOutputs], whose product with the
  block's own scores hands over the exact combine weights, or takes ours.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from moe_lens.errors import UnsupportedModelError
from moe_lens.kernels import Kernel, KernelUnavailableError

from .channel_seam import ChannelSeam
from .class_swap import ClassSwaps, call_original
from .layer import REFERENCE, MoELayer

Changes = dict[str, Any]
"""Keyword arguments of [`route`][moe_lens.kernels.route]: `k`, `mask`, `force`, ..."""


class SeamError(UnsupportedModelError):
    """A block works in a way that its declaration does not foresee."""


class Attachment:
    """The seams of one MoE layer while they are attached.

    `values` holds what the current forward has shown so far, by name, as lazy arrays in the
    block's own shapes and slot order.
    """

    def __init__(self, layer: MoELayer, kernel: Kernel = REFERENCE) -> None:
        self.layer = layer
        self.kernel = kernel
        self.wanted: frozenset[str] = frozenset()
        self.changes: Changes | None = None
        self.verifying = False
        self.values: dict[str, mx.array] = {}
        self.block_input: mx.array | None = None
        self.logits: mx.array | None = None
        self.channels = ChannelSeam(layer, self.emit)
        self._swaps = ClassSwaps()

    def wants(self, *names: str) -> bool:
        return any(name in self.wanted for name in names)

    def emit(self, name: str, value: mx.array) -> None:
        """Hand over `value`; a block that gives a value twice in one forward is an error."""
        if name not in self.wanted:
            return
        if name in self.values:
            raise SeamError(f"{self.layer.path} gave {name} twice in one forward")
        self.values[name] = value

    def begin(self) -> None:
        """Forget the previous forward."""
        self.values = {}
        self.block_input = self.logits = None
        self.channels.begin()

    def route(self, logits: mx.array, input_dtype: mx.Dtype) -> tuple[mx.array, mx.array]:
        """The overridden ids and weights for `logits`."""
        assert self.changes is not None
        try:
            return self.layer.route(logits, input_dtype, kernel=self.kernel, **self.changes)
        except KernelUnavailableError as error:
            raise UnsupportedModelError(f"layer {self.layer.index}: {error}") from error

    def call_experts(
        self, module: nn.Module, x: mx.array, ids: mx.array, *args: Any, **kwargs: Any
    ) -> mx.array:
        """Call the Switch module as mlx-lm wrote it, for the experts `ids` [..., k] of each token.

        Which expert stands in which slot is remembered for the channels, which the module
        computes in an order of its own.
        """
        self.channels.enter(ids)
        outputs: mx.array = call_original(module, x, ids, *args, **kwargs)
        return outputs

    def swap(self, module: nn.Module, call: Callable[..., Any]) -> None:
        """Give this one instance another ``__call__``, leaving the module tree as it is."""
        self._swaps.swap(module, call)

    def attach(self) -> None:
        """Swap the classes that this layer's declaration names."""
        declaration = self.layer.family
        try:
            if declaration.attach is not None:
                declaration.attach(self)
            elif declaration.seam == "router":
                observe_router(self)
                observe_experts(self)
            else:
                observe_gate(self)
                observe_experts(self)
            observe_shared(self)
            observe_routed(self)
            self.channels.set_up()
        except BaseException:
            self.detach()
            raise

    def detach(self) -> None:
        """Put every class back."""
        self.channels.take_down()
        self._swaps.undo()
        self.begin()


class ExpertOutputs:
    """Stands for the experts' outputs until the block multiplies them by its combine weights.

    Args:
        attachment: Where the values go.
        outputs: [..., k, hidden] what the experts returned.
        weights: Ours to use in place of the block's, or None to observe the block's.
    """

    __slots__ = ("_attachment", "_outputs", "_weights")

    def __init__(
        self, attachment: Attachment, outputs: mx.array, weights: mx.array | None = None
    ) -> None:
        self._attachment = attachment
        self._outputs = outputs
        self._weights = weights

    @property
    def dtype(self) -> mx.Dtype:
        return self._outputs.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return self._outputs.shape

    @property
    def ndim(self) -> int:
        return self._outputs.ndim

    def astype(self, dtype: mx.Dtype) -> ExpertOutputs:
        return ExpertOutputs(self._attachment, self._outputs.astype(dtype), self._weights)

    def __mul__(self, scores: mx.array) -> Any:
        if self._weights is not None:
            scores = self._weights.astype(scores.dtype)[..., None]
        elif self._attachment.layer.family.seam == "inline":
            self._attachment.emit("expert_weights", scores[..., 0])
        product = self._outputs * scores
        if self._attachment.wants("routed_output"):
            return WeightedOutputs(self._attachment, product)
        return product

    def __getattr__(self, name: str) -> Any:
        raise _foreign_use(self._attachment, f".{name}")


class WeightedOutputs:
    """Stands for weights times outputs until the block sums them into its routed output."""

    __slots__ = ("_attachment", "_product")

    def __init__(self, attachment: Attachment, product: mx.array) -> None:
        self._attachment = attachment
        self._product = product

    def sum(self, axis: int, **kwargs: Any) -> mx.array:
        routed = self._product.sum(axis=axis, **kwargs)
        self._attachment.emit("routed_output", routed)
        return routed

    def __getattr__(self, name: str) -> Any:
        raise _foreign_use(self._attachment, f".{name}")


def _foreign_use(attachment: Attachment, use: str) -> SeamError:
    return SeamError(
        f"{attachment.layer.path} ({type(attachment.layer.block).__name__}) uses its experts' "
        f"outputs in a way moe-lens does not know ({use}); its family needs a declaration"
    )


def observe_gate(attachment: Attachment) -> None:
    """Observe the logits of a gate that is a plain Linear."""

    def call(module: nn.Module, x: mx.array, *args: Any, **kwargs: Any) -> mx.array:
        logits: mx.array = call_original(module, x, *args, **kwargs)
        attachment.block_input, attachment.logits = x, logits
        attachment.emit("router_inputs", x)
        attachment.emit("router_logits", logits)
        return logits

    attachment.swap(attachment.layer.router, call)


def observe_router(attachment: Attachment) -> None:
    """Observe, or replace, the (ids, weights) that a router module returns."""
    layer = attachment.layer

    def call(module: nn.Module, x: mx.array, *args: Any, **kwargs: Any) -> Any:
        if attachment.wants("router_logits"):
            attachment.emit("router_logits", layer.logits(x))
        if attachment.wants("router_inputs"):
            attachment.emit("router_inputs", layer.router_input(x))
        if attachment.changes is None:
            ids, weights = pair = call_original(module, x, *args, **kwargs)
        else:
            ids, weights = pair = attachment.route(layer.logits(x), x.dtype)
        attachment.emit("expert_ids", ids)
        attachment.emit("expert_weights", weights)
        return pair

    attachment.swap(layer.router_module, call)


def observe_experts(attachment: Attachment) -> None:
    """Observe what goes into the experts and what comes out; override an inline router here."""
    layer = attachment.layer
    inline = layer.family.seam == "inline"
    sums_itself = layer.family.routed is None

    def call(module: nn.Module, x: mx.array, ids: mx.array, *args: Any, **kwargs: Any) -> Any:
        weights = None
        if inline and attachment.changes is not None:
            assert attachment.logits is not None
            ids, weights = attachment.route(attachment.logits, x.dtype)
            attachment.emit("expert_weights", weights)
        outputs = attachment.call_experts(module, x, ids, *args, **kwargs)
        attachment.emit("expert_inputs", x)
        if inline:
            attachment.emit("expert_ids", ids)
        attachment.emit("expert_outputs", outputs)
        sees_weights = inline and attachment.wants("expert_weights")
        sees_sum = sums_itself and attachment.wants("routed_output")
        if weights is not None or sees_weights or sees_sum:
            return ExpertOutputs(attachment, outputs, weights)
        return outputs

    attachment.swap(layer.experts_module, call)


def observe_shared(attachment: Attachment) -> None:
    """Observe the shared expert, where this model has one."""
    module = attachment.layer.shared_module
    if module is not None:
        _observe_output(attachment, module, "shared_output")


def observe_routed(attachment: Attachment) -> None:
    """Observe the module whose output is the routed output, where the family names one."""
    path = attachment.layer.family.routed
    if path is not None:
        _observe_output(attachment, attachment.layer.module(path), "routed_output")


def _observe_output(attachment: Attachment, module: nn.Module, name: str) -> None:
    def call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        output = base.__call__(module, *args, **kwargs)
        attachment.emit(name, output)
        return output

    # The module may be swapped already (a block that is its own routed output), so the class
    # it has now is called, not the original.
    base = type(module)
    attachment.swap(module, call)
