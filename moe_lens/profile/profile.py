"""A profile: what a model's routing adds up to over a corpus. Sums only, so profiles add.

    whole = Profile.from_trace(Trace.open("run/"))
    both = record_profile(router, "a.jsonl") + record_profile(router, "b.jsonl")
    both.counts / both.num_tokens                # share of tokens routed to each expert

The profile of two halves of a corpus, added, is the profile of the whole: integers exactly, floats
to rounding. So a profile can be collected in batches, processes or machines.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from moe_lens.errors import CaptureError, UsageError
from moe_lens.profile import tally
from moe_lens.trace import Routes

if TYPE_CHECKING:
    from moe_lens.trace import Trace

__all__ = ["BLOCKS", "OutputSums", "Profile"]

# Prompts are dealt into this many blocks by their index, for resampling. A prime, so that a corpus
# whose domains alternate does not put each domain into blocks of its own.
BLOCKS = 61


@dataclass(frozen=True, eq=False)
class OutputSums:
    """Sums over the tokens routed to each expert; f is the expert's output before the weight g.

    Attributes:
        norms: [layers, R] float64, sum of the L2 norm of f.
        weighted_norms: [layers, R] float64, sum of g x the L2 norm of f. Divided by the counts it
            is the saliency of REAP (arXiv 2510.13999).
        outputs: [layers, R, hidden] float64, sum of f.
    """

    norms: NDArray[np.float64]
    weighted_norms: NDArray[np.float64]
    outputs: NDArray[np.float64]

    def __add__(self, other: OutputSums) -> OutputSums:
        return OutputSums(
            self.norms + other.norms,
            self.weighted_norms + other.weighted_norms,
            self.outputs + other.outputs,
        )


@dataclass(frozen=True, eq=False)
class Profile:
    """Additive sums of routing. R is the router width; layers are MoE layers in model order.

    Attributes:
        model: Identity of the model (hashes of config, weights and tokenizer); may be empty.
        layers: Model layer index of each MoE layer.
        router_width: R, the experts a router can choose from, zero experts included.
        num_tokens: Tokens counted.
        num_prompts: Prompts counted: tokens at position 0.
        counts: [layers, R] int64, tokens routed to each expert, in any slot.
        first_counts: [layers, R] int64, tokens whose first choice it was.
        weight_sums: [layers, R] float64, sum of the expert weights.
        coactivation: [layers, R, R] int64, tokens that chose both; symmetric, diagonal = counts.
        transitions: [layers - 1, R, R] int64, tokens that chose i in a layer and j in the next MoE
            layer; each of the k x k pairs of a token counts once.
        labels: The labels, sorted.
        label_tokens: [labels] int64, tokens of each label; unlabelled ones are in none.
        label_prompts: [labels] int64.
        label_counts: [labels, layers, R] int64.
        block_tokens: [BLOCKS] int64, tokens of the prompts whose index modulo ``BLOCKS`` is it.
        block_prompts: [BLOCKS] int64.
        block_counts: [BLOCKS, layers, R] int64, for the bootstrap over prompts.
        vocabulary: [token ids, layers x R] int64 sparse: how often each token id was routed to
            each expert (column place x R + expert), or ``None`` if left out.
        outputs: Sums over expert outputs; ``None`` unless recorded live.
    """

    model: dict[str, str]
    layers: tuple[int, ...]
    router_width: int
    num_tokens: int
    num_prompts: int
    counts: NDArray[np.int64]
    first_counts: NDArray[np.int64]
    weight_sums: NDArray[np.float64]
    coactivation: NDArray[np.int64]
    transitions: NDArray[np.int64]
    labels: tuple[str, ...]
    label_tokens: NDArray[np.int64]
    label_prompts: NDArray[np.int64]
    label_counts: NDArray[np.int64]
    block_tokens: NDArray[np.int64]
    block_prompts: NDArray[np.int64]
    block_counts: NDArray[np.int64]
    vocabulary: sparse.csr_array | None = None
    outputs: OutputSums | None = None

    @classmethod
    def from_routes(
        cls,
        routes: Routes,
        labels: Sequence[str | None] = (),
        *,
        model: dict[str, str] | None = None,
        vocabulary: bool = True,
    ) -> Profile:
        """Add up routes that are in memory.

        Args:
            routes: Tokens with their routing.
            labels: Label of each prompt of the corpus, indexed by ``routes.prompt``; empty for a
                corpus without labels.
            model: Identity of the model.
            vocabulary: Also count per token id.
        """
        names = tuple(sorted({name for name in labels if name is not None}))
        number: dict[str | None, int] = {name: place for place, name in enumerate(names)}
        of_prompt = np.array([number.get(label, -1) for label in labels] or [-1], dtype=np.int64)
        label = of_prompt[routes.prompt] if len(labels) else np.full(len(routes), -1)
        block = routes.prompt % BLOCKS
        begins = routes.position == 0
        return cls(
            model=dict(model or {}),
            layers=routes.layers,
            router_width=routes.router_width,
            num_tokens=len(routes),
            num_prompts=int(begins.sum()),
            counts=tally.expert_counts(routes),
            first_counts=tally.first_counts(routes),
            weight_sums=tally.weight_sums(routes),
            coactivation=tally.coactivation(routes),
            transitions=tally.transitions(routes),
            labels=names,
            label_tokens=_tokens_of(label, len(names)),
            label_prompts=_tokens_of(label[begins], len(names)),
            label_counts=tally.group_counts(routes, label, len(names)),
            block_tokens=_tokens_of(block, BLOCKS),
            block_prompts=_tokens_of(block[begins], BLOCKS),
            block_counts=tally.group_counts(routes, block, BLOCKS),
            vocabulary=tally.vocabulary_counts(routes) if vocabulary else None,
        )

    @classmethod
    def from_trace(cls, trace: Trace, *, vocabulary: bool = True) -> Profile:
        """Add up a trace, one shard in memory at a time.

        Raises:
            MoeLensError: A shard is damaged.
            CaptureError: The trace has no tokens.
        """
        identity = {key: value for key, value in trace.model.items() if key.endswith("_sha256")}
        total: Profile | None = None
        for routes in trace.shards():
            part = cls.from_routes(routes, trace.labels, model=identity, vocabulary=vocabulary)
            total = part if total is None else total + part
        if total is None:
            raise CaptureError(f"the trace {trace.path} has no tokens; record it again")
        return total

    def __add__(self, other: Profile) -> Profile:
        """The profile of both together.

        Raises:
            UsageError: They are of different models, or only one has vocabulary or output sums.
        """
        if not isinstance(other, Profile):
            return NotImplemented
        self._check_addable(other)
        labels = tuple(sorted({*self.labels, *other.labels}))
        one, two = self._with_labels(labels), other._with_labels(labels)
        summed = {name: getattr(one, name) + getattr(two, name) for name in _summed_fields()}
        return replace(
            one,
            model=self.model or other.model,
            vocabulary=_add_sparse(self.vocabulary, other.vocabulary),
            outputs=(
                None
                if self.outputs is None or other.outputs is None
                else self.outputs + other.outputs
            ),
            **summed,
        )

    def __radd__(self, other: object) -> Profile:
        """``sum(profiles)`` begins with 0."""
        return self if other == 0 else NotImplemented

    def __repr__(self) -> str:
        return (
            f"Profile({self.num_tokens} tokens of {self.num_prompts} prompts, "
            f"{len(self.layers)} MoE layers, {self.router_width} experts)"
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write one safetensors file, whole or not at all. Nothing in it can run code."""
        from .file import save_profile

        save_profile(self, Path(path).expanduser())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Profile:
        """Read what `save` wrote.

        Raises:
            UsageError: There is no such file.
            MoeLensError: The file is damaged, or no profile.
        """
        from .file import load_profile

        return load_profile(Path(path).expanduser())

    def _with_labels(self, labels: tuple[str, ...]) -> Profile:
        """The same sums with room for more labels."""
        if labels == self.labels:
            return self
        places = [labels.index(label) for label in self.labels]
        wider: dict[str, Any] = {}
        for name in ("label_tokens", "label_prompts", "label_counts"):
            table = getattr(self, name)
            wider[name] = np.zeros((len(labels), *table.shape[1:]), dtype=np.int64)
            wider[name][places] = table
        return replace(self, labels=labels, **wider)

    def _check_addable(self, other: Profile) -> None:
        if (self.layers, self.router_width) != (other.layers, other.router_width):
            raise UsageError(
                f"profiles of different models cannot be added: {len(self.layers)} MoE layers of "
                f"{self.router_width} experts and {len(other.layers)} of {other.router_width}"
            )
        differing = [
            key
            for key in sorted(self.model.keys() & other.model.keys())
            if self.model[key] != other.model[key]
        ]
        if differing:
            raise UsageError(
                f"profiles of different models cannot be added: they differ in {differing[0]}; "
                "profile both corpora with the same model"
            )
        for name in ("vocabulary", "outputs"):
            if (getattr(self, name) is None) != (getattr(other, name) is None):
                raise UsageError(
                    f"only one of the two profiles has {name} sums; record both with the same "
                    "settings"
                )


def _tokens_of(group: NDArray[np.integer], groups: int) -> NDArray[np.int64]:
    """How many entries each group has; negative ones are in none."""
    return np.bincount(group[group >= 0], minlength=groups).astype(np.int64)


def _summed_fields() -> list[str]:
    """Fields of a profile that plain ``+`` adds."""
    others = {"model", "layers", "router_width", "labels", "vocabulary", "outputs"}
    return [field.name for field in fields(Profile) if field.name not in others]


def _add_sparse(one: Any, two: Any) -> Any:
    """Sum of two count matrices whose number of token ids may differ."""
    if one is None or two is None:
        return None
    rows = max(one.shape[0], two.shape[0])
    padded = [matrix.copy() for matrix in (one, two)]
    for matrix in padded:
        matrix.resize(rows, matrix.shape[1])
    return sparse.csr_array(padded[0] + padded[1])
