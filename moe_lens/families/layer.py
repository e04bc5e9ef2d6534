"""One MoE layer of a loaded model: its block, its experts, its router and its rule."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from moe_lens.errors import UnsupportedModelError, UsageError
from moe_lens.kernels import Groups, Kernel, Rule

from .class_swap import call_original
from .declaration import Block, attribute

REFERENCE = Kernel("never")


@dataclass(frozen=True, eq=False)
class MoELayer:
    """A layer with routed experts.

    Attributes:
        index: The layer's index in the model, dense layers counted.
        path: The block's path in the model, e.g. ``model.layers.3.mlp``.
        block: The module that holds router and experts.
        parent: The module that holds the block.
        family: What its family declares about it.
        after_reading: Called when somebody has read the layer's weights; see `reading`.
    """

    index: int
    path: str
    block: nn.Module
    parent: nn.Module
    family: Block
    after_reading: list[Callable[[], None]] = field(default_factory=list, repr=False)

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Whoever looks at the layer's weights outside of a forward does it inside the block.

        A model that is streamed lets go of them at its end.
        """
        try:
            yield
        finally:
            for release in self.after_reading:
                release()

    def module(self, path: str) -> Any:
        """The module at `path` below the block; ``../name`` stands beside the block."""
        if path.startswith("../"):
            return attribute(self.parent, path.removeprefix("../"))
        return attribute(self.block, path)

    @property
    def router(self) -> nn.Module:
        """The Linear (or holder of a raw weight) that makes the router logits."""
        module: nn.Module = self.module(self.family.logits)
        return module

    @property
    def router_module(self) -> nn.Module:
        """The module that returns (ids, weights), for families whose router is a module."""
        module: nn.Module = self.module(self.family.router)
        return module

    @property
    def experts(self) -> Any:
        """SwitchGLU or SwitchMLP, or a Python list of experts (DBRX)."""
        return self.module(self.family.experts)

    @property
    def experts_module(self) -> nn.Module:
        module: nn.Module = self.experts
        return module

    @property
    def shared_module(self) -> nn.Module | None:
        """The shared expert, or None where the model has none."""
        if self.family.shared is None:
            return None
        try:
            module = self.module(self.family.shared)
        except AttributeError:
            return None
        return module if isinstance(module, nn.Module) else None

    @property
    def k(self) -> int:
        """Experts per token, as the block reads it when it runs."""
        return int(attribute(self.block, self.family.k))

    @property
    def num_experts(self) -> int:
        """Routed experts with weights, without zero experts."""
        experts = self.experts
        if isinstance(experts, list):
            return len(experts)
        projection = experts.fc1 if "fc1" in experts else experts.gate_proj
        return int(projection.num_experts)

    @property
    def down_projections(self) -> list[nn.Module]:
        """What leads from the channels of the experts back to the hidden size.

        One module for all experts, or one for each where the experts are a list.
        """
        experts = self.experts if self.list_experts else [self.experts]
        return [expert[down_name(expert)] for expert in experts]

    @property
    def expert_width(self) -> int:
        """The number of channels inside each expert: what its down projection reads."""
        down: Any = self.down_projections[0]
        if "scales" in down:
            return int(down.scales.shape[-1] * down.group_size)
        return int(down.weight.shape[-1])

    @property
    def zero_experts(self) -> int:
        """Identity experts at the end of the router."""
        return 0 if self.family.zero_experts is None else self.family.zero_experts(self.block)

    @property
    def router_width(self) -> int:
        """The number of router logits: experts and zero experts."""
        return self.num_experts + self.zero_experts

    def rule(self) -> Rule:
        """The rule this block routes by, read from the live module."""
        return self.family.rule(self.block)

    @property
    def groups(self) -> Groups | None:
        """Group-limited routing, or None."""
        return self.rule().groups

    def reason(self, name: str) -> str | None:
        """Why this layer cannot give the value, or take the override, `name`; None: it can."""
        if name == "shared_output" and self.shared_module is None:
            return self.family.without.get(name, "this layer has no shared expert")
        return self.family.without.get(name)

    def written(self, vectors: mx.array) -> mx.array:
        """What the layer adds to the residual stream if `vectors` are all that its experts give.

        Up to a factor. Mostly that is `vectors` itself; norms and projections that stand behind
        the block are the model's own.

        Args:
            vectors: [n, width of an expert's output].

        Returns:
            [n, hidden].

        Raises:
            UnsupportedModelError: It cannot be told, with the reason.
        """
        self.check_written()
        for path in self.family.written:
            try:
                module = self.module(path)
            except AttributeError:
                continue
            if module is not None:
                vectors = call_original(module, vectors[None])[0]
        return vectors

    def check_written(self) -> None:
        """Refuse where `written` cannot be told.

        Raises:
            UnsupportedModelError: With the reason.
        """
        if self.family.not_written:
            raise UnsupportedModelError(
                f"what experts of layer {self.index} write into the residual stream cannot be "
                f"told: {self.family.not_written}; look at their routing instead"
            )

    def describe_rule(self) -> str:
        """The rule in one line, for people."""
        if self.family.route is not None:
            return self.family.note
        if "k" in self.family.without:
            return self.family.without["k"]
        return self.rule().describe()

    def router_input(self, x: mx.array) -> mx.array:
        """What the projection of the router reads, of the block's input `x` [..., hidden]."""
        transform = self.family.router_input
        return x if transform is None else transform(self.block, x)

    def logits(self, x: mx.array) -> mx.array:
        """The router logits [..., router width] of the block's input `x` [..., hidden]."""
        declaration = self.family
        x = self.router_input(x)
        router: Any = self.router
        if declaration.raw:
            if declaration.float32_logits:
                return x.astype(mx.float32) @ router.weight.astype(mx.float32).T
            return x @ router.weight.T
        if declaration.float32_logits:
            x = x.astype(mx.float32)
        original = getattr(type(router), "_moe_lens_original", type(router))
        logits: mx.array = original.__call__(router, x)
        return logits

    def route(
        self,
        logits: mx.array,
        input_dtype: mx.Dtype,
        *,
        kernel: Kernel = REFERENCE,
        k: int | None = None,
        ids: mx.array | None = None,
        **changes: Any,
    ) -> tuple[mx.array, mx.array]:
        """Ids and weights [..., k] by this block's rule, with the changes of an override.

        `ids` is [k] for all tokens, or [tokens, k]. `kernel` runs the rule; a family whose
        routing is no rule (`family.route`) runs it in MLX operations, always.
        """
        if ids is not None:
            ids = _fit(ids, logits.shape[:-1])
            k = ids.shape[-1]
        k = self.k if k is None else k
        changes["ids"] = ids
        if self.family.route is not None:
            return self.family.route(self.block, logits, k, **changes)
        return kernel.route(self.rule(), logits, k, input_dtype=input_dtype, **changes)

    @property
    def list_experts(self) -> bool:
        """Whether each expert is a module of its own, in a Python list."""
        return isinstance(self.experts, list)

    def expert_parameters(self) -> list[str]:
        """Full names of the parameters whose axis 0 is the expert axis.

        For a list of experts: the names of all parameters of all experts, which hold
        ``.experts.{e}.`` and have no expert axis.
        """
        prefix = f"{self.path}.{self.family.experts}"
        if self.list_experts:
            return [
                f"{prefix}.{expert}.{name}"
                for expert, module in enumerate(self.experts)
                for name, _ in _arrays(module)
            ]
        return [
            f"{prefix}.{projection}.{name}" if projection else f"{prefix}.{name}"
            for projection, module in self.experts.named_modules()
            if hasattr(module, "num_experts")
            for name, value in module.items()
            if isinstance(value, mx.array) and value.shape[:1] == (self.num_experts,)
        ]

    def router_parameters(self) -> list[str]:
        """Full names of the parameters whose axis 0 is the width of the router."""
        names = [
            f"{self.path}.{self.family.logits}.{name}"
            for name, value in self.router.items()
            if isinstance(value, mx.array) and value.shape[:1] == (self.router_width,)
        ]
        for extra in (self.selection_bias_name, self.per_expert_scale_name):
            if extra is not None and extra not in names:
                names.append(extra)
        return names

    @property
    def selection_bias_name(self) -> str | None:
        """The full name of the selection bias, or None where this model has none."""
        return self._parameter_name(self.family.selection_bias)

    @property
    def per_expert_scale_name(self) -> str | None:
        return self._parameter_name(self.family.per_expert_scale)

    def _parameter_name(self, path: str | None) -> str | None:
        if path is None:
            return None
        owner, _, leaf = path.rpartition(".")
        module = self.module(owner) if owner else self.block
        return f"{self.path}.{path}" if isinstance(module.get(leaf), mx.array) else None


def down_name(expert: nn.Module) -> str:
    """What a SwitchGLU, SwitchMLP or an expert of DBRX's list calls its down projection."""
    return next(name for name in ("down_proj", "fc2", "w2") if name in expert)


def _fit(ids: mx.array, tokens: tuple[int, ...]) -> mx.array:
    """`ids` [k] or [tokens, k] in the shape [*tokens, k] of this forward."""
    k = ids.shape[-1]
    if ids.size == k:
        return mx.broadcast_to(ids.reshape(k), (*tokens, k))
    if ids.size != k * math.prod(tokens):
        raise UsageError(
            f"ids of {ids.size // k} tokens were given to a forward of {math.prod(tokens)}: "
            "give one row for each token of the batch, or one row for all"
        )
    return ids.reshape(*tokens, k)


def enclosing(modules: Mapping[str, nn.Module], path: str) -> nn.Module:
    """The nearest module of `modules` (by path) that holds the one at `path`."""
    while "." in path:
        path = path.rpartition(".")[0]
        if path in modules:
            return modules[path]
    return modules[""]


def _arrays(module: nn.Module) -> list[tuple[str, mx.array]]:
    from mlx.utils import tree_flatten

    return [(name, value) for name, value in tree_flatten(module.parameters())]
