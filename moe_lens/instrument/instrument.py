"""Instrumentation of a loaded model: attach the seams, run sinks and overrides, detach.

Between `attach` and `detach` the classes of a few modules are swapped (see
`moe_lens.families.seams`); outside, the model is exactly what ``mlx_lm.load`` returned.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from numpy.typing import NDArray

from moe_lens.errors import CaptureError, UnsupportedModelError, UsageError
from moe_lens.families import REFERENCE, Attachment, MoELayer, find_moe_layers
from moe_lens.kernels import Kernel
from moe_lens.override import Override

from .forward import Forward, Sink, takes_layers
from .padding import valid_tokens

_VERIFY = frozenset({"router_logits", "expert_ids", "expert_weights", "expert_inputs"})
_VERIFY_TOKENS = 24
_NOTHING: frozenset[str] = frozenset()


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
        self.next = NextForward()
        """What is known of the next forwards."""
        self._attachments = {layer.index: Attachment(layer, kernel) for layer in self.layers}
        self._all = list(self._attachments.values())
        self._modules = {layer.index: layer for layer in self.layers}
        if len(self._attachments) != len(self.layers):
            raise UnsupportedModelError(
                "two routed blocks share a layer index in this model, so its layers cannot be told "
                "apart"
            )
        self._base: type | None = None
        self._verified = False
        self._cache: Any = None
        self._sinks_want: dict[int, frozenset[str]] = {}
        self._running: _Run | None = None
        self._inside: dict[str, list[Attachment]] = {}

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
        self._sinks_want = self._wanted(self.sinks)
        for index, attachment in self._attachments.items():
            attachment.channels.watched = "expert_channels" in self._sinks_want[index]
            if self.attached:
                attachment.channels.set_up()

    def _wanted(self, sinks: Iterable[Sink]) -> dict[int, frozenset[str]]:
        """What each layer is to show: what the sinks ask for and it has."""
        names: frozenset[str] = frozenset().union(*(sink.values for sink in sinks))
        return {
            index: frozenset(name for name in names if attachment.layer.reason(name) is None)
            for index, attachment in self._attachments.items()
        }

    def _run(self, base: type, *args: Any, **kwargs: Any) -> Any:
        sinks, wanted = self.sinks, self._sinks_want
        if self.next.sinks is not None:
            sinks = self.next.sinks
            wanted = self._wanted(sinks)
        run = _Run(sinks, wanted, self.next.about)
        if sinks:
            self._begin(run)
            tokens, cache = _token_ids(args, kwargs), _cache(args, kwargs)
            run.continues = cache is not None and cache is self._cache
            batch, length = tokens.shape
            lengths, continues = self.next.lengths, run.continues
            valid = valid_tokens((batch, length), lengths, cache, continues=continues)
            run.tokens, run.valid = tokens, valid.reshape(-1)
        self._running = run
        try:
            output = base.__call__(self.model, *args, **kwargs)  # type: ignore[operator]
            if sinks:
                self._cache = cache
                self._finish(run)
            return output
        finally:
            self._begin(None)
            self._running = None

    def _begin(self, run: _Run | None, path: str | None = None) -> None:
        """Forget what the seams have shown, and show what `run` wants: all, or inside `path`."""
        wanted = {} if run is None else run.wanted
        for attachment in self._attachments_inside(path):
            attachment.begin()
            attachment.wanted = wanted.get(attachment.layer.index, _NOTHING)

    def _attachments_inside(self, path: str | None) -> list[Attachment]:
        if path is None:
            return self._all
        if path not in self._inside:
            self._inside[path] = [
                each
                for each in self._attachments.values()
                if each.layer.path == path or each.layer.path.startswith(f"{path}.")
            ]
        return self._inside[path]

    def _finish(self, run: _Run) -> None:
        """Hand over a forward that is over."""
        shown = run.values
        values = {index: each.values for index, each in self._attachments.items()} | shown
        forward = self._forward(run, values)
        for sink in run.sinks:
            if not (shown and takes_layers(sink)):
                sink.record(forward)

    def _forward(self, run: _Run, values: Mapping[int, Mapping[str, mx.array]]) -> Forward:
        assert run.tokens is not None and run.valid is not None
        return Forward(
            token_ids=run.tokens,
            valid=run.valid,
            continues=run.continues,
            layers=tuple(values),
            about=run.about,
            _modules=self._modules,
            _values=values,
        )

    # Layer by layer ----------------------------------------------------------------------

    def pause(self) -> _Run | None:
        """The forward that runs now waits at a layer, and others may run; see `LayerStream`."""
        return self._running

    def resume(self, paused: _Run | None, layer_path: str) -> None:
        """The forward goes on with the decoder layer at this path."""
        self._running = paused
        if paused is not None:
            self._begin(paused, layer_path)

    def finish_layer(self, layer_path: str) -> None:
        """The layer has run: evaluate what it has shown, and hand it to who takes single layers.

        What stays for the end of the forward no longer depends on the weights of the layer.
        """
        inside = self._attachments_inside(layer_path)
        mx.eval([list(each.values.values()) for each in inside])
        run = self._running
        if run is None:  # the rules are being verified, which reads the values itself
            return
        values = {each.layer.index: each.values for each in inside}
        if values and run.sinks:
            for sink in run.sinks:
                if takes_layers(sink):
                    sink.record(self._forward(run, values))
            rest = {name for each in run.sinks if not takes_layers(each) for name in each.values}
            for index, shown in values.items():
                run.values[index] = {name: shown[name] for name in rest & shown.keys()}
        self._begin(None, layer_path)


@dataclass
class NextForward:
    """What whoever drives the model says of the next forwards."""

    lengths: NDArray[Any] | None = None
    """[B] the real lengths of their rows, when pads stand on the right."""
    about: Any = None
    """Handed on to the sinks."""
    sinks: tuple[Sink, ...] | None = None
    """Who sees them; None: all sinks."""


@dataclass
class _Run:
    """A forward that is under way."""

    sinks: tuple[Sink, ...]
    wanted: dict[int, frozenset[str]]
    about: Any
    tokens: mx.array | None = None
    valid: NDArray[np.bool_] | None = None
    continues: bool = False
    values: dict[int, dict[str, mx.array]] = field(default_factory=dict)
    """What layers have shown that ran, and were finished, one by one."""


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
