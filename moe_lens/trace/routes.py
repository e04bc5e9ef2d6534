"""The route of a run of tokens, held in memory: which experts each token went to, how strongly.

This is the one form in which routing reaches the analyses, whether it was just recorded or read
from a trace on disk. Rows are tokens in prompt order; pads are never in it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from moe_lens.errors import UsageError
from moe_lens.kernels import NO_EXPERT

from .tokens import TokenTexts

__all__ = ["NO_EXPERT", "Routes", "place_of"]


@dataclass(frozen=True, eq=False)
class Routes:
    """Routing of ``tokens`` tokens through ``layers`` MoE layers, ``k`` slots each.

    Attributes:
        layers: Model layer index of each MoE layer (dense layers counted), ascending.
        router_width: Number of experts a router can choose from, including zero experts.
        token_ids: [tokens] int32.
        prompt: [tokens] int32, index of the prompt in its corpus; ascending.
        position: [tokens] int32, place in the prompt, from 0.
        expert_ids: [layers, tokens, k] uint8 or uint16; slot 0 has the highest weight.
            ``NO_EXPERT`` marks an unused slot.
        expert_weights: [layers, tokens, k] floating point, what the block multiplies by.
        router_logits: [layers, tokens, router_width] floating point, or ``None`` if not recorded.
        texts: Texts of the token ids.
    """

    layers: tuple[int, ...]
    router_width: int
    token_ids: NDArray[np.int32]
    prompt: NDArray[np.int32]
    position: NDArray[np.int32]
    expert_ids: NDArray[np.unsignedinteger]
    expert_weights: NDArray[np.floating]
    router_logits: NDArray[np.floating] | None = None
    texts: TokenTexts = field(default_factory=TokenTexts, repr=False)

    def __len__(self) -> int:
        return len(self.token_ids)

    @property
    def slots(self) -> int:
        """Experts recorded per token and layer: k, or the largest k where layers differ."""
        return int(self.expert_ids.shape[-1])

    def place(self, layer: int) -> int:
        """Row of model layer ``layer`` in the arrays.

        Raises:
            UsageError: That layer has no routed experts.
        """
        return place_of(self.layers, layer)

    def rows(self, start: int, stop: int) -> Routes:
        """The tokens ``start`` to ``stop`` (views, nothing is copied)."""
        return self.take(slice(start, stop))

    def take(self, part: slice | NDArray[np.integer]) -> Routes:
        """The tokens of a slice, or those at the given places in that order."""
        logits = None if self.router_logits is None else self.router_logits[:, part]
        return replace(
            self,
            token_ids=self.token_ids[part],
            prompt=self.prompt[part],
            position=self.position[part],
            expert_ids=self.expert_ids[:, part],
            expert_weights=self.expert_weights[:, part],
            router_logits=logits,
        )

    def visible_tokens(self) -> tuple[str, ...]:
        """Every token's text with spaces, newlines and stray bytes visible."""
        return tuple(self.texts.visible(token_id) for token_id in self.token_ids)

    @staticmethod
    def concatenate(parts: Sequence[Routes]) -> Routes:
        """One run of tokens after the other; all must come from the same model."""
        first = parts[0]
        logits = [part.router_logits for part in parts if part.router_logits is not None]
        return replace(
            first,
            token_ids=np.concatenate([part.token_ids for part in parts]),
            prompt=np.concatenate([part.prompt for part in parts]),
            position=np.concatenate([part.position for part in parts]),
            expert_ids=np.concatenate([part.expert_ids for part in parts], axis=1),
            expert_weights=np.concatenate([part.expert_weights for part in parts], axis=1),
            router_logits=np.concatenate(logits, axis=1) if len(logits) == len(parts) else None,
        )


def place_of(layers: Sequence[int], layer: int) -> int:
    """Place of a model layer among the MoE layers.

    Raises:
        UsageError: It has no routed experts.
    """
    if layer not in layers:
        raise UsageError(
            f"layer {layer} has no routed experts; the MoE layers are {_listed(layers)}"
        )
    return layers.index(layer)


def _listed(layers: Sequence[int]) -> str:
    """``1, 2, 3`` or, where it is long and without gaps, ``1 to 47``."""
    if len(layers) > 4 and list(layers) == list(range(layers[0], layers[-1] + 1)):
        return f"{layers[0]} to {layers[-1]}"
    return ", ".join(map(str, layers))
