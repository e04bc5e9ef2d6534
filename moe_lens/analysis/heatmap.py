"""Three views of routing as tables: the numbers behind every heat map.

* `token_expert`: one layer, which experts each token went to and how strongly;
* `layer_expert`: a corpus or a prompt, what share of the tokens went to each expert of each layer;
* `first_choice`: all layers, the expert that each token was sent to first.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from moe_lens.errors import CaptureError, UsageError
from moe_lens.kernels import NO_EXPERT
from moe_lens.profile import Profile
from moe_lens.trace import Routes, Trace

from .counts import routed_counts
from .result import Result, html_table

__all__ = [
    "FirstChoice",
    "Heatmap",
    "LayerExpert",
    "TokenExpert",
    "first_choice",
    "layer_expert",
    "token_expert",
]


@dataclass(frozen=True, eq=False)
class TokenExpert(Result):
    """Tokens x experts of one layer.

    Attributes:
        definition: What a cell is.
        layer: Model layer index.
        tokens: Token texts with spaces and newlines visible.
        token_ids: Their ids.
        first_position: Place of the first of them in its prompt.
        experts: Expert id of each column.
        num_experts: Experts of the layer; more than columns when unused ones are left out.
        weights: [tokens, columns] float64, expert weight, NaN where the token did not go.
    """

    kind: ClassVar[str] = "token-expert heatmap"
    definition: str
    layer: int
    tokens: tuple[str, ...]
    token_ids: tuple[int, ...]
    first_position: int
    experts: tuple[int, ...]
    num_experts: int
    weights: NDArray[np.float64]

    @property
    def title(self) -> str:
        """Heading of the table or picture."""
        return f"Layer {self.layer}: weight of each chosen expert"

    def _repr_html_(self) -> str:
        top = max(float(np.nanmax(self.weights, initial=0.0)), 1e-9)
        return html_table(
            self.title,
            self.definition,
            [str(expert) for expert in self.experts],
            list(zip(self.tokens, self.weights, strict=True)),
            lambda weight: ("", 0.0) if np.isnan(weight) else (f"{weight:.2f}", weight / top),
        )


@dataclass(frozen=True, eq=False)
class LayerExpert(Result):
    """MoE layers x experts over many tokens.

    Attributes:
        definition: What a cell is.
        layers: Model layer index of each row.
        share: [layers, experts] float64, percent of the tokens.
        uniform: [layers] float64, percent every expert of the layer would get if all were chosen
            equally often: 100 k / experts.
        num_tokens: Tokens counted.
        num_prompts: Prompts they come from.
        label: Label of the prompts counted, ``None`` for all.
    """

    kind: ClassVar[str] = "layer-expert heatmap"
    definition: str
    layers: tuple[int, ...]
    share: NDArray[np.float64]
    uniform: NDArray[np.float64]
    num_tokens: int
    num_prompts: int
    label: str | None

    @property
    def title(self) -> str:
        """Heading of the table or picture."""
        of = "" if self.label is None else f" of {self.label}"
        return f"Share of the {self.num_tokens:,} tokens{of} routed to each expert"

    def _repr_html_(self) -> str:
        top = max(float(self.share.max()), 1e-9)
        return html_table(
            self.title,
            self.definition,
            [str(expert) for expert in range(self.share.shape[1])],
            [(f"layer {n}", row) for n, row in zip(self.layers, self.share, strict=True)],
            lambda percent: (f"{percent:.1f}", percent / top),
        )


@dataclass(frozen=True, eq=False)
class FirstChoice(Result):
    """MoE layers x tokens.

    Attributes:
        definition: What a cell is.
        layers: Model layer index of each row.
        tokens: Token texts with spaces and newlines visible.
        token_ids: Their ids.
        first_position: Place of the first of them in its prompt.
        num_experts: Experts of a layer.
        experts: [layers, tokens] int64, id of the expert with the highest weight; -1: none.
        weights: [layers, tokens] float64, its weight.
    """

    kind: ClassVar[str] = "first-choice heatmap"
    definition: str
    layers: tuple[int, ...]
    tokens: tuple[str, ...]
    token_ids: tuple[int, ...]
    first_position: int
    num_experts: int
    experts: NDArray[np.int64]
    weights: NDArray[np.float64]

    @property
    def title(self) -> str:
        """Heading of the table or picture."""
        return "First choice of each token, layer by layer"

    def _repr_html_(self) -> str:
        return html_table(
            self.title,
            self.definition,
            [f"layer {layer}" for layer in self.layers],
            list(zip(self.tokens, self.experts.T, strict=True)),
            lambda expert: ("", 0.0) if expert < 0 else (str(expert), 0.3),
        )


Heatmap = TokenExpert | LayerExpert | FirstChoice


def token_expert(
    routes: Routes,
    layer: int,
    *,
    start: int = 0,
    stop: int | None = None,
    only_used: bool = False,
) -> TokenExpert:
    """Which experts of one layer each token went to, and with what weight.

    Args:
        routes: The tokens of a prompt (from `record_prompt` or `Trace.prompt`).
        layer: Model layer index.
        start: First token to show.
        stop: Token to stop before; by default the end.
        only_used: Leave out the experts that none of these tokens went to.

    Raises:
        UsageError: The layer has no routed experts, or there is no such token.
    """
    shown = _part(routes, start, stop)
    ids = shown.expert_ids[shown.place(layer)]
    weights = shown.expert_weights[shown.place(layer)].astype(np.float64)
    table = np.full((len(shown), routes.router_width + 1), np.nan)
    np.put_along_axis(table, np.minimum(ids, routes.router_width, dtype=np.int64), weights, axis=1)
    table = table[:, : routes.router_width]
    experts = np.arange(routes.router_width)
    if only_used:
        experts = experts[~np.isnan(table).all(axis=0)]
        table = table[:, experts]
    return TokenExpert(
        definition=(
            "Cell: expert weight, what the block multiplies the expert's output by; empty where "
            f"the token was not routed to the expert ({_chosen(ids)} of {routes.router_width} "
            "experts per token)."
        ),
        layer=layer,
        tokens=shown.visible_tokens(),
        token_ids=tuple(int(token) for token in shown.token_ids),
        first_position=int(shown.position[0]),
        experts=tuple(int(expert) for expert in experts),
        num_experts=routes.router_width,
        weights=table,
    )


def layer_expert(source: Trace | Profile | Routes, label: str | None = None) -> LayerExpert:
    """What percentage of the tokens each expert of each layer received.

    Args:
        source: A trace or profile of a corpus, or the routes of a prompt.
        label: Count only prompts with this label.

    Raises:
        UsageError: No prompt has that label.
        CaptureError: There are no tokens.
    """
    counts, tokens, prompts = routed_counts(source, label)
    if tokens == 0:
        raise CaptureError("there are no tokens to show; record a prompt or corpus with text")
    width = source.router_width
    # From the counts, not from k, so that it is right where layers differ in k.
    uniform = 100.0 * counts.sum(axis=1) / tokens / width
    each = ", ".join(sorted({f"{percent:.3g} %" for percent in uniform}))
    return LayerExpert(
        definition=(
            "Cell: percent of the tokens that were routed to the expert, in any slot; were all "
            f"experts chosen equally often, each cell would be k / experts = {each}."
        ),
        layers=source.layers,
        share=100.0 * counts / tokens,
        uniform=uniform,
        num_tokens=tokens,
        num_prompts=prompts,
        label=label,
    )


def first_choice(routes: Routes, *, start: int = 0, stop: int | None = None) -> FirstChoice:
    """The expert with the highest weight for each token in each MoE layer.

    Args:
        routes: The tokens of a prompt.
        start: First token to show.
        stop: Token to stop before; by default the end.

    Raises:
        UsageError: There is no such token.
    """
    shown = _part(routes, start, stop)
    firsts = shown.expert_ids[:, :, 0].astype(np.int64)
    return FirstChoice(
        definition=(
            "Cell: id of the expert with the highest weight for the token; colours tell ids "
            "apart and mean nothing else, and the same id in two layers is not the same expert."
        ),
        layers=routes.layers,
        tokens=shown.visible_tokens(),
        token_ids=tuple(int(token) for token in shown.token_ids),
        first_position=int(shown.position[0]),
        num_experts=routes.router_width,
        experts=np.where(firsts == NO_EXPERT, -1, firsts),
        weights=shown.expert_weights[:, :, 0].astype(np.float64),
    )


def _part(routes: Routes, start: int, stop: int | None) -> Routes:
    end = len(routes) if stop is None else min(stop, len(routes))
    if not 0 <= start < end:
        raise UsageError(
            f"tokens {start} to {end} cannot be shown; the prompt has {len(routes)} tokens, "
            "numbered from 0"
        )
    return routes.rows(start, end)


def _chosen(ids: NDArray[np.unsignedinteger]) -> str:
    """Number of experts per token, ``2`` or ``1 to 2``."""
    used = (ids != NO_EXPERT).sum(axis=1)
    low, high = int(used.min()), int(used.max())
    return str(low) if low == high else f"{low} to {high}"
