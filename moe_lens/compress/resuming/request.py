"""What a run was asked for, as far as it decides a byte of the result.

A run may only go on with what another has done if both were asked for the same: the same weights,
texts and options, and the same versions of what computes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

import mlx.core as mx

from moe_lens import __version__
from moe_lens.fingerprint import canonical_sha256

Fact = str | int | float | bool | None

_LONGEST = 40
"""Characters up to which a value is shown."""


@dataclass(frozen=True)
class Request:
    """Names and plain values; two runs whose values are equal give the same bytes.

    A name is an option (``--ratio``), or a few words where there is no option.
    """

    facts: Mapping[str, Fact]

    @property
    def sha256(self) -> str:
        """Of all facts; the order does not matter."""
        return canonical_sha256(dict(self.facts))

    def difference(self, now: Request) -> str:
        """The first three facts that are other ones now; empty where there are none."""
        names = sorted(
            name
            for name in self.facts.keys() | now.facts.keys()
            if self.facts.get(name) != now.facts.get(name)
        )
        shown = [_difference(name, self.facts.get(name), now.facts.get(name)) for name in names[:3]]
        return ", ".join(shown) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def computed_by() -> dict[str, Fact]:
    """The versions and the device that decide how numbers are rounded."""
    found: dict[str, Fact] = {"the version of moe-lens": __version__}
    for name in ("mlx", "mlx-lm", "numpy", "scipy", "tokenizers"):
        try:
            found[f"the version of {name}"] = version(name)
        except PackageNotFoundError:
            continue
    return {**found, "the device": str(mx.default_device())}


def _difference(name: str, then: Fact, now: Fact) -> str:
    if _is_hash(then) or _is_hash(now):
        return f"{name} changed"
    return f"{name} was {_shown(then)}, now {_shown(now)}"


def _shown(value: Fact) -> str:
    if value is None:
        return "not given"
    text = str(value) if str(value).isprintable() else ascii(value)
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."


def _is_hash(value: Fact) -> bool:
    """Whether it tells a person nothing but that two things differ."""
    return isinstance(value, str) and len(value) == 64 and set(value) <= set("0123456789abcdef")
