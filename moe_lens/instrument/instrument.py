"""Instrumentation of a loaded model: attach the seams, run sinks and overrides, detach.

Between `attach` and `detach` the classes of a few modules are swapped (see
`moe_lens.families.seams`); outside, the model is exactly what ``mlx_lm.load`` returned.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from moe_lens.errors import CaptureError, UnsupportedModelError, UsageError
from moe_lens.families import REFERENCE, Attachment, MoELayer, find_moe_layers
from moe_lens.kernels import Kernel
from moe_lens.override import Override

from .forward import Forward, Sink
from .padding import valid_tokens

_VERIFY = frozenset({"router_logits", "expert_ids", "expert_weights", "expert_inputs"})
_VERIFY_TOKENS = 24


class Instrument:
    """The seams of one model.

    Args:
        model: What ``mlx_lm.load`` returned.
        kernel: Runs the rules of overridden layers.

    Raises:
        UnsupportedModelError: If the model is dense.
    """

    def __init__(self, model: nn.Module, kernel: Kernel = REFERENCE) -> None:
        self.model = model
        self.layers: list[MoELayer] = find_moe_layers(model)
        self.sinks: tuple[Sink, ...] = ()
        self.lengths: np.ndarray | None = None
        """[B] the real lengths of the rows of the next forwards, when pads stand on the right."""
        self._attachments = {layer.index: Attachment(layer, kernel) for layer in self.layers}
        if len(self._attachments) != len(self.layers):
            raise UnsupportedModelError(
                "two routed blocks share a layer index in this model, so its layers cannot be told "
                "apart"
            )
        self._base: type | None = None
        self._verified = False
        self._cache: Any = None
        self._wanted: dict[int, frozenset[str]] = {}

    # Attaching ---------------------------------------------------------------------------

    @property
    def attached(self) -> bool:
        return self._base is not None

    def attach(self) -> None:
        """Swap the classes. The model computes what it computed before, bit for bit."""
        if self.attached:
            return
        if hasattr(type(self.model), "_moe_lens_instrument"):
            raise UsageError(
                "this model is already watched by another ExpertRouter: close it first"
            )
        try:
            for attachment in self._attachments.values():
                attachment.attach()
        except BaseException:
            self._detach_blocks()
            raise
        base = type(self.model)
        self._base = base
        instrument = self

        def call(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
            return instrument._run(base, *args, **kwargs)

        self.model.__class__ = type(
            base.__name__,
            (base,),
            {"__call__": call, "_moe_lens_instrument": self, "__module__": base.__module__},
        )

    def detach(self) -> None:
        """Put every class back and forget all overrides."""
        if self._base is not None:
            self.model.__class__ = self._base  # type: ignore[assignment]
            self._base = None
        self._detach_blocks()
        self._cache = None

    def _detach_blocks(self) -> None:
        for attachment in self._attachments.values():
            attachment.detach()
            attachment.changes = None
            attachment.wanted = frozenset()

    # Overrides ---------------------------------------------------------------------------

    def check(self, overrides: Mapping[int, Override]) -> None:
        """Refuse overrides that cannot be, before anything runs."""
        known = tuple(self._attachments)
        for index, override in overrides.items():
            if index not in self._attachments:
                raise UsageError(
                    f"layer {index} has no routed experts; the MoE layers of this model are "
                    f"{_ranges(known)}"
                )
            attachment = self._attachments[index]
            override.check(attachment.layer)
            if attachment.kernel.mode == "always" and attachment.layer.family.route is not None:
                raise UnsupportedModelError(
                    f"layer {index}: kernel 'always' cannot be kept: the kernel runs rules, and "
                    f"this block has no rule ({attachment.layer.family.note}); use 'auto'"
                )

    def set_overrides(self, overrides: Mapping[int, Override]) -> None:
        """Route by `overrides` from now on; layers that are not named route by themselves."""
        self.check(overrides)
        active = {index: each for index, each in overrides.items() if not each.is_empty}
        if active and not self._verified:
            self.verify()
        for index, attachment in self._attachments.items():
            override = active.get(index)
            attachment.changes = None if override is None else override.changes(attachment.layer)

    def set_channel_masks(self, masks: Mapping[int, mx.array]) -> None:
        """Multiply the channels of every expert by `masks` ([E, width] by layer) from now on."""
        for index, attachment in self._attachments.items():
            attachment.channels.mask = masks.get(index)
            attachment.channels.set_up()

    def verify(self) -> None:
        """Compare every layer's rule, bit for bit, with what its block does on a few tokens.

        Raises:
            UnsupportedModelError: If a rule gives other ids or weights than the block.
        """
        held = {index: each.changes for index, each in self._attachments.items()}
        for attachment in self._attachments.values():
            attachment.begin()
            attachment.changes, attachment.wanted = None, _VERIFY
            attachment.verifying = True
        try:
            assert self._base is not None
            tokens = mx.arange(1, 1 + _VERIFY_TOKENS)[None]
            mx.eval(self._base.__call__(self.model, tokens))
            for attachment in self._attachments.values():
                _verify_rule(attachment)
        finally:
            for index, attachment in self._attachments.items():
                attachment.begin()
                attachment.changes, attachment.wanted = held[index], frozenset()
                attachment.verifying = False
        self._verified = True

    # Forwards ----------------------------------------------------------------------------

    def set_sinks(self, sinks: Iterable[Sink]) -> None:
        """Hand every forward from now on to `sinks`."""
        self.sinks = tuple(sinks)
        names: frozenset[str] = frozenset().union(*(sink.values for sink in self.sinks))
        self._wanted = {
            index: frozenset(name for name in names if attachment.layer.reason(name) is None)
            for index, attachment in self._attachments.items()
        }
        for index, attachment in self._attachments.items():
            attachment.channels.watched = "expert_channels" in self._wanted[index]
            if self.attached:
                attachment.channels.set_up()

    def _run(self, base: type, *args: Any, **kwargs: Any) -> Any:
        if not self.sinks:
            try:
                return base.__call__(self.model, *args, **kwargs)  # type: ignore[operator]
            finally:
                for attachment in self._attachments.values():
                    attachment.begin()
        for index, attachment in self._attachments.items():
            attachment.begin()
            attachment.wanted = self._wanted[index]
        try:
            tokens, cache = _token_ids(args, kwargs), _cache(args, kwargs)
            continues = cache is not None and cache is self._cache
            batch, length = tokens.shape
            valid = valid_tokens((batch, length), self.lengths, cache, continues=continues)
            output = base.__call__(self.model, *args, **kwargs)  # type: ignore[operator]
            self._cache = cache
            self._deliver(tokens, valid.reshape(-1), continues)
            return output
        finally:
            for attachment in self._attachments.values():
                attachment.begin()
                attachment.wanted = frozenset()

    def _deliver(self, tokens: mx.array, valid: np.ndarray, continues: bool) -> None:
        forward = Forward(
            token_ids=tokens,
            valid=valid,
            continues=continues,
            layers=tuple(self._attachments),
            _modules={index: each.layer for index, each in self._attachments.items()},
            _values={index: each.values for index, each in self._attachments.items()},
        )
        for sink in self.sinks:
            sink.record(forward)


def _token_ids(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> mx.array:
    tokens = args[0] if args else kwargs.get("inputs")
    if not isinstance(tokens, mx.array) or tokens.ndim != 2:
        raise CaptureError(
            "the model was called without token ids of shape [batch, length], so what it routes "
            "cannot be named: pass token ids, not embeddings"
        )
    return tokens


def _cache(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    return kwargs["cache"] if "cache" in kwargs else (args[1] if len(args) > 1 else None)


def _verify_rule(attachment: Attachment) -> None:
    layer, values = attachment.layer, attachment.values
    if layer.reason("k") is not None:
        return
    missing = sorted(_VERIFY - set(values))
    if missing:
        raise UnsupportedModelError(
            f"layer {layer.index} ({layer.path}) did not show {', '.join(missing)} when its rule "
            "was verified, so overrides are refused; capture may still work"
        )
    ids, weights = layer.route(values["router_logits"], values["expert_inputs"].dtype)
    seen_ids, seen_weights = values["expert_ids"], values["expert_weights"]
    same = bool(mx.array_equal(ids.reshape(-1), seen_ids.reshape(-1))) and bool(
        mx.array_equal(weights.reshape(-1), seen_weights.reshape(-1))
    )
    if not same:
        raise UnsupportedModelError(
            f"layer {layer.index} ({type(layer.block).__name__}) does not route by the rule that "
            f"moe-lens has for {layer.family.model_type} ({layer.describe_rule()}), so overrides "
            "are refused; capture works. Another version of mlx-lm may have changed the block"
        )


def _ranges(numbers: tuple[int, ...]) -> str:
    """``0-3, 5`` for (0, 1, 2, 3, 5)."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][-1] + 1:
            parts[-1].append(number)
        else:
            parts.append([number])
    return ", ".join(f"{p[0]}-{p[-1]}" if len(p) > 1 else f"{p[0]}" for p in parts)
