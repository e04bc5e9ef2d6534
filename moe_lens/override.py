"""A change asked of the routing of one layer: fewer experts, masked, forced, biased or given."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence, Sized
from dataclasses import dataclass, fields, replace
from typing import Any

import mlx.core as mx
import numpy as np

from .errors import UnsupportedModelError, UsageError
from .families import MoELayer

PerExpert = Mapping[int, float] | Sequence[float]


@dataclass(frozen=True)
class Override:
    """What to change in the routing of a layer. Unset fields change nothing.

    Attributes:
        k: Experts per token. The weights follow the model's own rule, so the result is bit for
            bit that of the model with another k in its config.
        mask: Experts that may not be chosen (ablation). They route as if removed.
        force: Experts that every token uses, among its k.
        bias: Added to the router logits of an expert, so selection and weights change:
            ``{expert: value}``, or one value for each expert.
        scale: Times the final weight of an expert: 0 silences it and leaves its place taken.
        ids: The experts themselves, [k] for all tokens or [tokens, k] for each token of the
            forward; weights follow the rule.
    """

    k: int | None = None
    mask: Sequence[int] = ()
    force: Sequence[int] = ()
    bias: PerExpert | None = None
    scale: PerExpert | None = None
    ids: Any = None

    @property
    def is_empty(self) -> bool:
        return not self._set_fields()

    def _set_fields(self) -> list[str]:
        given = {field.name: getattr(self, field.name) for field in fields(self)}
        return [
            name
            for name, value in given.items()
            if value is not None and not (isinstance(value, Sized) and len(value) == 0)
        ]

    def over(self, outer: Override) -> Override:
        """This override inside `outer`: what is set here wins."""
        return replace(outer, **{name: getattr(self, name) for name in self._set_fields()})

    def check(self, layer: MoELayer) -> None:
        """Raise a UsageError that says what is wrong, before anything runs."""
        where = f"layer {layer.index}"
        for name in self._set_fields():
            reason = layer.reason(name)
            if reason is not None:
                raise UnsupportedModelError(f"{where} does not take the override {name}: {reason}")
        width = layer.router_width
        for name in ("mask", "force"):
            _check_experts(getattr(self, name), width, f"{where}, {name}")
        if self.ids is not None:
            self._check_ids(where, width)
            return
        k = layer.k if self.k is None else self.k
        if isinstance(k, bool) or not isinstance(k, int | np.integer):
            raise UsageError(f"{where}: k must be a whole number, not {k!r}")
        left = width - len(set(self.mask))
        if not 1 <= k <= width:
            raise UsageError(f"{where}: k must be from 1 to {width} (its experts), not {k}")
        if k > left:
            raise UsageError(
                f"{where}: {len(set(self.mask))} of {width} experts are masked, which leaves "
                f"{left}, fewer than k = {k}: mask fewer or lower k"
            )
        both = sorted(set(self.mask) & set(self.force))
        if both:
            raise UsageError(f"{where}: experts {both} are both masked and forced")
        if len(set(self.force)) > k:
            raise UsageError(
                f"{where}: {len(set(self.force))} experts are forced into k = {k} places: "
                "force fewer or raise k"
            )
        for name in ("bias", "scale"):
            _per_expert(getattr(self, name), width, f"{where}, {name}", 0.0)

    def _check_ids(self, where: str, width: int) -> None:
        clash = [name for name in self._set_fields() if name in ("k", "mask", "force", "bias")]
        if clash:
            raise UsageError(
                f"{where}: ids name the experts themselves, so {', '.join(clash)} cannot be given "
                "with them"
            )
        ids = np.asarray(self.ids)
        if ids.ndim not in (1, 2) or ids.size == 0 or not np.issubdtype(ids.dtype, np.integer):
            raise UsageError(f"{where}: ids must be whole numbers of shape [k] or [tokens, k]")
        if ids.min() < 0 or ids.max() >= width:
            raise UsageError(f"{where}: ids must be experts from 0 to {width - 1}")
        ordered = np.sort(ids, axis=-1)
        if (ordered[..., 1:] == ordered[..., :-1]).any():
            raise UsageError(f"{where}: ids name the same expert twice for one token")
        _per_expert(self.scale, width, f"{where}, scale", 1.0)

    def changes(self, layer: MoELayer) -> dict[str, Any]:
        """The checked override as arguments of the routing reference."""
        self.check(layer)
        width = layer.router_width
        found: dict[str, Any] = {}
        if self.k is not None:
            found["k"] = int(self.k)
        for name in ("mask", "force"):
            experts = getattr(self, name)
            if len(experts):
                flags = np.zeros(width, dtype=bool)
                flags[list(experts)] = True
                found[name] = mx.array(flags)
        for name, neutral in (("bias", 0.0), ("scale", 1.0)):
            values = _per_expert(getattr(self, name), width, name, neutral)
            if values is not None:
                found[name] = mx.array(values)
        if self.ids is not None:
            found["ids"] = mx.array(np.asarray(self.ids).astype(np.uint32))
        return found


def _check_experts(experts: Iterable[int], width: int, where: str) -> None:
    if isinstance(experts, str) or not isinstance(experts, Iterable):
        raise UsageError(f"{where}: give a list of experts, such as [3], not {experts!r}")
    for expert in experts:
        if isinstance(expert, bool) or not isinstance(expert, int | np.integer):
            raise UsageError(f"{where}: experts are whole numbers, not {expert!r}")
        if not 0 <= expert < width:
            raise UsageError(f"{where}: there is no expert {expert}, only 0 to {width - 1}")


def _per_expert(
    values: PerExpert | None, width: int, where: str, neutral: float
) -> np.ndarray | None:
    if values is None:
        return None
    if isinstance(values, str) or not isinstance(values, Sized):
        raise UsageError(
            f"{where}: give {{expert: value}} or one value for each expert, not {values!r}"
        )
    if len(values) == 0:
        return None
    experts: list[int] | None = None
    if isinstance(values, Mapping):
        _check_experts(values, width, where)
        experts, values = list(values), list(values.values())
    try:
        numbers = np.asarray(values, dtype=np.float32)
    except (TypeError, ValueError) as error:
        raise UsageError(f"{where}: every value must be a number, not {values!r}") from error
    if experts is not None:
        full = np.full(width, neutral, dtype=np.float32)
        full[experts] = numbers
    else:
        full = numbers
        if full.shape != (width,):
            raise UsageError(f"{where}: {len(values)} values were given for {width} experts")
    if not np.isfinite(full).all():
        raise UsageError(f"{where}: every value must be finite (mask an expert to bar it)")
    return full
