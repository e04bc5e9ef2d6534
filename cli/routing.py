"""From ``--experts-per-token``, ``--mask-experts`` and ``--force-experts`` to overrides."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from moe_lens.errors import UsageError

if TYPE_CHECKING:
    from moe_lens import ExpertRouter, Override

ALL = -1
"""Stands for ``*``, all MoE layers."""

Experts = Mapping[int, tuple[int, ...]]
"""Experts by layer."""


@dataclass(frozen=True)
class Routing:
    """What a command line asks of the routing."""

    k: int | None
    mask: Experts
    force: Experts

    @classmethod
    def read(
        cls, k: int | None, mask: Sequence[str] | None, force: Sequence[str] | None
    ) -> Routing:
        """Parse the options.

        Raises:
            UsageError: If one is not written as LAYER:EXPERTS.
        """
        return cls(
            k,
            read_experts(mask or (), "--mask-experts"),
            read_experts(force or (), "--force-experts"),
        )

    def __bool__(self) -> bool:
        return self.k is not None or bool(self.mask) or bool(self.force)

    def overrides(self, router: ExpertRouter) -> dict[int, Override]:
        """One override for each MoE layer that is to change; the API checks them."""
        from moe_lens import Override

        named = set(self.mask) | set(self.force)
        layers = set(named) - {ALL}
        if self.k is not None or ALL in named:
            layers |= set(router.info.moe_layers)
        return {
            layer: Override(k=self.k, mask=_of(self.mask, layer), force=_of(self.force, layer))
            for layer in sorted(layers)
        }

    def describe(self) -> str:
        """In words: ``1 expert per token, experts 3:7,12 masked``."""
        parts = []
        if self.k is not None:
            parts.append(f"{self.k} expert{'' if self.k == 1 else 's'} per token")
        given = ((self.mask, "masked"), (self.force, "forced"))
        parts += [f"experts {_write(experts)} {verb}" for experts, verb in given if experts]
        return ", ".join(parts)

    def to_dict(self) -> dict[str, Any]:
        """As JSON: layers as keys, ``*`` for all."""
        return {"experts_per_token": self.k} | {
            name: {_name(layer): list(experts) for layer, experts in given.items()}
            for name, given in (("mask_experts", self.mask), ("force_experts", self.force))
        }


def read_experts(texts: Sequence[str], option: str) -> dict[int, tuple[int, ...]]:
    """``["3:7,12", "*:0"]`` as ``{3: (7, 12), ALL: (0,)}``.

    Raises:
        UsageError: If a text is not LAYER:EXPERT[,EXPERT...].
    """
    found: dict[int, tuple[int, ...]] = {}
    for text in texts:
        layer, colon, experts = (part.strip() for part in text.partition(":"))
        names = [name.strip() for name in experts.split(",")]
        if not colon or not all(map(_is_number, names)) or not (layer == "*" or _is_number(layer)):
            raise UsageError(
                f"{option} takes LAYER:EXPERT,EXPERT..., such as 3:7,12 (or *:7 for all layers), "
                f"not {text!r}"
            )
        key = ALL if layer == "*" else int(layer)
        found[key] = tuple(dict.fromkeys((*found.get(key, ()), *map(int, names))))
    return found


def read_expert(text: str) -> tuple[int, int]:
    """Layer and expert of ``3:7``, as ``--expert`` takes them.

    Raises:
        UsageError: If it is something else.
    """
    layer, colon, expert = text.partition(":")
    if not (colon and _is_number(layer) and _is_number(expert)):
        raise UsageError(f"--expert {text!r} names no expert; write LAYER:EXPERT, such as 3:7")
    return int(layer), int(expert)


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdigit()


def _of(experts: Experts, layer: int) -> tuple[int, ...]:
    return tuple(sorted({*experts.get(ALL, ()), *experts.get(layer, ())}))


def _name(layer: int) -> str:
    return "*" if layer == ALL else str(layer)


def _write(experts: Experts) -> str:
    return " ".join(f"{_name(layer)}:{','.join(map(str, of))}" for layer, of in experts.items())
