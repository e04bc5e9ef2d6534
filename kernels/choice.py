"""Whether a router is run by the fused kernel or by the reference, and why."""

from __future__ import annotations

import os
from typing import Any, Literal, cast, get_args

import mlx.core as mx
import numpy as np

from .body import Language
from .fused import KernelFactory, Routed, fused_route, slots, unsupported
from .identity_cache import IdentityCache
from .parameters import dtypes
from .reference import route, route_statistics
from .rule import Rule

Mode = Literal["auto", "never", "always"]

VARIABLE = "MOE_LENS_KERNEL"
"""The environment variable that holds the mode where none is given."""

_TOLERANCE = {mx.float32: 1e-4, mx.float16: 2**-8, mx.bfloat16: 2**-5}
"""Of a probe's weights, relative: a wrong rule is far off, another order of a sum is not."""

_PROBED_TOKENS = 6
_NAMES: dict[Language, str] = {"metal": "Metal", "cuda": "CUDA"}


def kernel_mode(mode: str | None = None) -> Mode:
    """`mode`, or what ``MOE_LENS_KERNEL`` says, or ``"auto"``.

    Raises:
        ValueError: If it is none of auto, never and always.
    """
    found = mode or os.environ.get(VARIABLE) or "auto"
    if found not in get_args(Mode):
        where = "kernel" if mode else VARIABLE
        raise ValueError(f"{where} must be auto, never or always, not {found!r}")
    return cast("Mode", found)


class KernelUnavailableError(ValueError):
    """``always`` was asked for where the kernel cannot run; the message says why."""


class Kernel:
    """Routes by the fused kernel where that is right, and by the reference everywhere else.

    With ``"auto"`` the kernel is used on Metal, when MLX's default device is the GPU, the rule
    and the shape are supported and a probe has agreed with the reference. Before a program is
    first used it is probed: a few tokens full of ties, masked and forced experts among them, are
    evaluated by both. ``"never"`` is the reference. ``"always"`` raises where ``"auto"`` falls
    back; it also turns on the CUDA kernel, which ``"auto"`` leaves off.

    Nothing is compiled before the first call of `route` or `routed`.

    Args:
        mode: ``"auto"``, ``"never"`` or ``"always"``; None: as ``MOE_LENS_KERNEL`` says, or auto.
        factory: Makes the kernel in place of MLX's own; it is then taken to run everywhere.
        language: What `factory` compiles; None: that of this machine's GPU.
        one_launch: As in [`fused_route`][moe_lens.kernels.fused_route].

    Raises:
        ValueError: If `mode` is unknown.
        KernelUnavailableError: With ``"always"`` where there is no GPU.
    """

    def __init__(
        self,
        mode: str | None = None,
        factory: KernelFactory | None = None,
        *,
        language: Language | None = None,
        one_launch: bool = False,
    ) -> None:
        self.mode: Mode = kernel_mode(mode)
        self.factory = factory
        self.language: Language = language or _language_here()
        self.one_launch = one_launch
        self._verdicts: dict[tuple[Any, ...], str | None] = {}
        self._known: IdentityCache[str | None] = IdentityCache()
        self._refused: str | None = None
        absent = self._absent()
        if self.mode == "always" and absent is not None:
            raise KernelUnavailableError(
                f"kernel 'always' cannot be kept: {absent}; use 'auto' or 'never', which route by "
                "the reference"
            )

    @property
    def reason(self) -> str:
        """One sentence: why the kernel is used, or why the reference is."""
        refused = self._absent() or self._refused
        if refused is not None:
            return f"routing by the reference: {refused}"
        where = "the given factory" if self.factory else _NAMES[self.language]
        if not self._verdicts:
            return f"routing by the kernel on {where}, once its probe agrees with the reference"
        return f"routing by the kernel on {where}: its probe agreed with the reference"

    def refusal(
        self,
        rule: Rule,
        num_experts: int,
        k: int,
        dtype: mx.Dtype,
        input_dtype: mx.Dtype | None = None,
    ) -> str | None:
        """Why the kernel is not used for `rule` with logits [..., num_experts] of `dtype`.

        None where it is used. The first question about a program compiles and probes it.
        """
        refused = self._absent() or self._known.get(
            (rule,),
            (num_experts, k, dtype, input_dtype),
            lambda: self._verdict(rule, num_experts, k, dtype, input_dtype),
        )
        if refused is not None:
            self._refused = refused
        return refused

    def _verdict(
        self,
        rule: Rule,
        num_experts: int,
        k: int,
        dtype: mx.Dtype,
        input_dtype: mx.Dtype | None,
    ) -> str | None:
        reason = unsupported(rule, num_experts, k, dtype)
        if reason is not None:
            return reason
        program = (dtypes(rule, dtype, input_dtype), slots(num_experts))
        if program not in self._verdicts:
            self._verdicts[program] = self._probe(rule, num_experts, k, dtype, input_dtype)
        return self._verdicts[program]

    def route(
        self,
        rule: Rule,
        logits: mx.array,
        k: int,
        *,
        input_dtype: mx.Dtype | None = None,
        **changes: mx.array | None,
    ) -> tuple[mx.array, mx.array]:
        """Ids and weights [..., k], with the arguments of [`route`][moe_lens.kernels.route].

        By the kernel, slots stand by falling weight; by the reference, as the block has them.

        Raises:
            KernelUnavailableError: With ``"always"``, where the kernel cannot be used.
        """
        if self._uses_kernel(rule, logits, k, input_dtype):
            routed = self._fused(rule, logits, k, input_dtype, changes)
            return routed.ids, routed.weights
        return route(rule, logits, k, input_dtype=input_dtype, **changes)

    def routed(
        self,
        rule: Rule,
        logits: mx.array,
        k: int,
        *,
        input_dtype: mx.Dtype | None = None,
        **changes: mx.array | None,
    ) -> Routed:
        """What `route` gives with its statistics, slots by falling weight either way."""
        if self._uses_kernel(rule, logits, k, input_dtype):
            return self._fused(rule, logits, k, input_dtype, changes)
        return reference_routed(rule, logits, k, input_dtype=input_dtype, **changes)

    def _uses_kernel(
        self, rule: Rule, logits: mx.array, k: int, input_dtype: mx.Dtype | None
    ) -> bool:
        refused = self.refusal(rule, logits.shape[-1], k, logits.dtype, input_dtype)
        if refused is not None and self.mode == "always":
            raise KernelUnavailableError(f"kernel 'always' cannot be kept: {refused}; use 'auto'")
        return refused is None

    def _fused(
        self,
        rule: Rule,
        logits: mx.array,
        k: int,
        input_dtype: mx.Dtype | None,
        changes: dict[str, mx.array | None],
    ) -> Routed:
        return fused_route(
            rule,
            logits,
            k,
            input_dtype=input_dtype,
            factory=self.factory,
            language=self.language,
            one_launch=self.one_launch,
            **changes,
        )

    def _absent(self) -> str | None:
        """Why no kernel runs here at all, or None."""
        if self.mode == "never":
            return "kernel 'never' was asked for"
        if self.factory is not None:
            return None
        if mx.metal.is_available():
            if self.mode == "auto" and mx.default_device() != mx.gpu:
                return "MLX's default device is the CPU"
            return None
        if mx.cuda.is_available():
            if self.mode == "auto":
                return "the CUDA kernel is proved by emulation only, and 'always' turns it on"
            return None
        return "MLX has no GPU on this machine"

    def _probe(
        self,
        rule: Rule,
        num_experts: int,
        k: int,
        dtype: mx.Dtype,
        input_dtype: mx.Dtype | None,
    ) -> str | None:
        """What is wrong with the program that routes by `rule`, or None.

        Metal compiles and runs when an array is evaluated, so only evaluating shows an error.
        """
        logits = _tied_logits(num_experts, dtype)
        try:
            for changes in ({}, _probe_changes(num_experts, k)):
                got = self._fused(rule, logits, k, input_dtype, changes)
                wanted = reference_routed(rule, logits, k, input_dtype=input_dtype, **changes)
                mx.eval(got.ids, got.weights, wanted.ids, wanted.weights)
                if not _same_experts(got.ids, wanted.ids):
                    return "its probe chose other experts than the reference"
                if not _close(got.weights, wanted.weights):
                    return "its probe weighed the experts other than the reference"
        except Exception as error:
            said = next(iter(str(error).strip().splitlines()), "")
            return f"its probe failed ({type(error).__name__}: {said})"
        return None


def reference_routed(
    rule: Rule,
    logits: mx.array,
    k: int,
    *,
    input_dtype: mx.Dtype | None = None,
    **changes: mx.array | None,
) -> Routed:
    """What the kernel gives, by the reference: sorted by falling weight, with statistics."""
    ids, weights = route(rule, logits, k, input_dtype=input_dtype, **changes)
    of_selection = {name: changes.get(name) for name in ("mask", "force", "bias")}
    entropy, margin, mass = route_statistics(rule, logits, ids, **of_selection)
    # Two stable sorts, so that equal weights stand by rising id.
    for order in (mx.argsort(ids, axis=-1), None):
        by = mx.argsort(-weights, axis=-1) if order is None else order
        ids = mx.take_along_axis(ids, by, axis=-1)
        weights = mx.take_along_axis(weights, by, axis=-1)
    return Routed(ids, weights, entropy, margin, mass)


def _language_here() -> Language:
    return "cuda" if mx.cuda.is_available() and not mx.metal.is_available() else "metal"


def _tied_logits(num_experts: int, dtype: mx.Dtype) -> mx.array:
    """[6, E] logits of five values only, so that most tokens tie at the k-th place."""
    token = np.arange(_PROBED_TOKENS)[:, None]
    expert = np.arange(num_experts)
    return mx.array((((expert + token) * (7 + token)) % 5 - 2).astype(np.float32)).astype(dtype)


def _probe_changes(num_experts: int, k: int) -> dict[str, mx.array | None]:
    """An expert masked and another forced, as far as there are enough."""
    expert = np.arange(num_experts)
    changes: dict[str, mx.array | None] = {"force": mx.array(expert == num_experts - 1)}
    if k < num_experts:
        changes["mask"] = mx.array(expert == 0)
    return changes


def _same_experts(got: mx.array, wanted: mx.array) -> bool:
    return bool(mx.array_equal(mx.sort(got, axis=-1), mx.sort(wanted, axis=-1)))


def _close(got: mx.array, wanted: mx.array) -> bool:
    tolerance = _TOLERANCE[wanted.dtype]
    if got.dtype != wanted.dtype:
        return False
    mine, theirs = (np.array(array.astype(mx.float32)) for array in (got, wanted))
    return np.allclose(mine, theirs, rtol=tolerance, atol=0, equal_nan=True)
