"""What a plan remembers about the model and the text it was made from.

Both are plain values that travel through JSON, so that a plan can be checked against the folder
it is applied to, and a verification against the text that calibrated.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from moe_lens.fingerprint import canonical_sha256, weights_sha256


@dataclass(frozen=True)
class ModelIdentity:
    """The model a statistic or a plan belongs to, as far as planning needs to know it.

    `num_experts` counts the real routed experts of one layer, `router_width` also the identity
    experts that some routers append. `group_count`, `group_keep` and `group_score` describe
    group-limited routing (count 1: none): experts ``0 .. num_experts-1`` form `group_count`
    groups of neighbours of which a token may use `group_keep`.
    """

    name: str
    model_type: str
    family: str
    fingerprint: str
    num_experts: int
    router_width: int
    experts_per_token: int
    smallest_k: int = 1
    group_count: int = 1
    group_keep: int = 1
    group_score: Literal["top2", "max", "none"] = "none"
    expert_width: int = 0
    """Channels inside each expert; 0 where it is not known (they differ, or an older plan)."""

    @property
    def group_size(self) -> int:
        """Experts of one router group; all experts where the routing knows no groups."""
        return self.num_experts // self.group_count

    def router_groups(self) -> tuple[tuple[int, ...], ...]:
        """The expert ids of every router group, in order."""
        size = self.group_size
        return tuple(tuple(range(g * size, (g + 1) * size)) for g in range(self.group_count))

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class CorpusIdentity:
    """The text that was read: its name, the SHA-256 of its content, and how much was used."""

    name: str
    fingerprint: str
    prompts: int
    tokens: int
    sequence_length: int | None = None
    seed: int = 0

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)

    def __add__(self, other: CorpusIdentity) -> CorpusIdentity:
        """Two texts read one after the other; the fingerprint is the hash of both."""
        joined = f"{self.fingerprint}+{other.fingerprint}".encode()
        return CorpusIdentity(
            name=self.name if self.name == other.name else f"{self.name} + {other.name}",
            fingerprint=hashlib.sha256(joined).hexdigest(),
            prompts=self.prompts + other.prompts,
            tokens=self.tokens + other.tokens,
            sequence_length=self.sequence_length,
            seed=self.seed,
        )


def public_name(name: str | Path) -> str:
    """A hub id or ``demo`` as it is; of a path the last part only.

    Plans and cards are published with a checkpoint, and where a folder lay on someone's disk is
    nobody's business.
    """
    path = Path(name).expanduser()
    if path.is_absolute() or path.exists() or str(name).startswith("."):
        return path.resolve().name
    return str(name)


def fingerprint_folder(path: Path) -> str:
    """SHA-256 of the config and the weights of a checkpoint folder, in milliseconds.

    The weights enter by file names, sizes, headers and evenly spaced samples of every file; see
    `moe_lens.fingerprint`.
    """
    config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    return canonical_sha256([config, weights_sha256(path)])
