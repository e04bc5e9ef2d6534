"""How alike the experts of each layer are, by their weights, their outputs and their routing.

    reading = read_weights(router.layers)                      # one layer in memory at a time
    outputs = compare_samples(sample_layers(router, tokens))   # all experts on the same tokens
    routing = compare_routing(trace, router.info.num_experts)
    found = similarity(trace.layers, reading, outputs, routing)
    found.measure("weights").nearest(0)                        # the first MoE layer

Each kind can be left out. What two experts compute may differ where their weights look alike, and
the other way round, so the kinds are compared, too.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save

from moe_lens.analysis.result import Result
from moe_lens.analysis.table import Table
from moe_lens.atomic import write_bytes
from moe_lens.errors import UsageError
from moe_lens.telling import Progress

from .agreement import Agreement, agree
from .measures import Kind, Measure
from .origin import SAYS, Origins, origins
from .outputs import CKA, PER_TOKEN
from .routing import TOGETHER
from .spectrum import Spectra
from .tables import agreement_table, mean_table, nearest_table, origin_table, rank_table
from .weights import LYING, Chance, WeightReading

__all__ = ["ExpertSimilarity", "similarity"]

DIGITS = 5
"""Of the values of pairs in JSON."""

MOST_VALUES = 1_000_000
"""Values of pairs in JSON, some 20 MB."""

_HEADS: dict[Kind, str] = {"weights": LYING, "outputs": PER_TOKEN, "routing": TOGETHER}
"""The measure that stands for each kind."""


@dataclass(frozen=True, eq=False)
class ExpertSimilarity(Result):
    """Measures of likeness, for every pair of experts of every MoE layer.

    Attributes:
        definition: What the numbers are.
        layers: Model layer index of each MoE layer.
        measures: One for each thing that was compared.
        agreement: Rank correlations of the measures, single projections left out; None with a
            single one.
        aligned_pairs: [layers] int64, pairs whose channels were aligned; None without weights, as
            are the next four.
        all_pairs: [layers] int64.
        chance: Cosines of unrelated weights.
        spectra: Ranks of weight matrices and of differences.
        origins: Whether experts look like copies, by layer.
        notes: What could not be compared, and why.
        seed: Of everything drawn.
    """

    kind: ClassVar[str] = "similarity"
    definition: str
    layers: tuple[int, ...]
    measures: tuple[Measure, ...]
    agreement: Agreement | None
    aligned_pairs: NDArray[np.int64] | None
    all_pairs: NDArray[np.int64] | None
    chance: Chance | None
    spectra: Spectra | None
    origins: Origins | None
    notes: tuple[str, ...]
    seed: int

    @property
    def title(self) -> str:
        experts = sorted({len(each) for each in self.measures[0].values})
        return (
            f"Similarity of experts, {len(self.layers)} MoE layers of "
            f"{' or '.join(map(str, experts))}"
        )

    def measure(self, name: str) -> Measure:
        """The measure of that name.

        Raises:
            UsageError: There is none.
        """
        for each in self.measures:
            if each.name == name:
                return each
        raise UsageError(
            f"there is no measure {name!r} here; choose one of "
            f"{', '.join(repr(each.name) for each in self.measures)}"
        )

    @property
    def heads(self) -> tuple[Measure, ...]:
        """The measure that stands for each kind that was compared."""
        names = {each.name for each in self.measures}
        found = []
        for kind, name in _HEADS.items():
            of_kind = [each.name for each in self.measures if each.kind == kind]
            if of_kind:
                found.append(self.measure(name if name in names else of_kind[0]))
        return tuple(found)

    def findings(self) -> list[str]:
        """What the weights look like, how alike the outputs are, and what agrees."""
        found = [*self._on_weights(), *self._on_outputs(), *self._on_agreement()]
        return [*found, *self.notes]

    def _on_weights(self) -> list[str]:
        if self.origins is None or self.chance is None:
            return []
        seen, heads = self.origins, self.measure(LYING)
        words = [SAYS[word] for word in dict.fromkeys(seen.words)]
        counted = ", ".join(
            f"{word} in {sum(SAYS[each] == word for each in seen.words)} of {len(self.layers)} "
            "layers"
            for word in words
        )
        said = [
            f"By their weights experts look like {counted}: two have a mean cosine of "
            f"{np.mean(seen.mean):.3f} ({_span(seen.mean)} by layer), "
            f"{100 * np.mean(seen.partnered):.0f} % of experts have a partner at 0.5 or more, the "
            f"highest pair is at {np.nanmax([np.nanmax(t) for t in heads.values]):.3f}; unrelated "
            f"weights of this size stay below {seen.chance:.4f}."
        ]
        if self.spectra is None or not {"copies", "groups", "reordered"} & set(seen.words):
            return said
        random = np.array([each.effective for each in self.spectra.random])
        spread = np.concatenate([each / random for each in self.spectra.difference])
        apart = np.concatenate(self.spectra.apart)
        if not len(spread):
            return said
        return [
            *said,
            f"Pairs that are each other's nearest differ by {100 * np.median(apart):.2g} % of "
            f"their squared norm, along {100 * np.median(spread):.0f} % of the directions that "
            "noise would take (effective rank; few after a short training from one origin).",
        ]

    def _on_outputs(self) -> list[str]:
        said = {PER_TOKEN: "a mean cosine of", CKA: "a CKA of"}
        parts = [
            f"{words} {np.nanmean(means):.3f} ({_span(means)} by layer)"
            for name, words in said.items()
            for means in [each.means().mean for each in self.measures if each.name == name]
        ]
        if not parts:
            return []
        return [f"On the same tokens the outputs of two experts have {' and '.join(parts)}."]

    def _on_agreement(self) -> list[str]:
        found = []
        heads = self.heads
        for place, one in enumerate(heads):
            for two in heads[place + 1 :]:
                same = [
                    float((one.nearest(row)[0] == two.nearest(row)[0]).mean())
                    for row in range(len(self.layers))
                ]
                sentence = (
                    f"The nearest expert by {one.name} is also nearest by {two.name} for "
                    f"{100 * np.mean(same):.0f} % of the experts"
                )
                found.append(sentence + self._rho(one.name, two.name) + ".")
        return found

    def _rho(self, one: str, two: str) -> str:
        if self.agreement is None:
            return ""
        cell = self.agreement.names.index(one), self.agreement.names.index(two)
        rho, (sure, tested) = self.agreement.median()[cell], self.agreement.sure()
        if np.isnan(rho):
            return ""
        return (
            f"; over all pairs the rank correlation is {rho:.2f} (median of layers), not chance in "
            f"{sure[cell]} of {tested[cell]} layers"
        )

    def tables(self) -> list[Table]:
        """Means by layer, what weights look like, the nearest pairs, and what agrees."""
        kinds = [kind for kind in _HEADS if any(each.kind == kind for each in self.measures)]
        found = [mean_table(kind, self.measures, self.layers) for kind in kinds]
        if self.origins is not None:
            assert self.aligned_pairs is not None and self.all_pairs is not None
            pairs = zip(self.aligned_pairs, self.all_pairs, strict=True)
            counted = [f"{some} of {every}" for some, every in pairs]
            found.append(origin_table(self.origins, counted, self.layers))
        if self.spectra is not None:
            found.append(rank_table(self.spectra))
        found += [nearest_table(each, self.heads, self.layers) for each in self.heads]
        if self.agreement is not None:
            found.append(agreement_table(self.agreement))
        return found

    def to_dict(self) -> dict[str, Any]:
        """All fields; of each measure also means, and nearest experts by layer.

        More than `MOST_VALUES` values of pairs are left out: `save` writes them.
        """
        size = sum(table.size for each in self.measures for table in each.values)
        bare = replace(self, measures=tuple(replace(each, values=()) for each in self.measures))
        found = super(ExpertSimilarity, bare).to_dict()
        places = range(len(self.layers))
        for shown, each in zip(found["measures"], self.measures, strict=True):
            kept = each.values if size <= MOST_VALUES else None
            shown["values"] = None if kept is None else [_rounded(table) for table in kept]
            means = each.means()
            shown["mean"], shown["low"], shown["high"] = (
                _rounded(part) for part in (means.mean, means.low, means.high)
            )
            shown["nearest"] = [each.nearest(place)[0].tolist() for place in places]
            shown["mutual"] = [[list(pair) for pair in each.mutual(place)] for place in places]
        return found

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the values of all pairs to a safetensors file, whole or not at all.

        Tensors are called ``measure/layer`` and are [E, E] float32.

        Raises:
            MoeLensError: The file cannot be written.
        """
        target = Path(path).expanduser()
        tensors = {
            f"{each.name}/{layer}": table
            for each in self.measures
            for layer, table in zip(self.layers, each.values, strict=True)
        }
        write_bytes(target, save(tensors, metadata={"definition": self.definition}))
        return target


def similarity(
    layers: Sequence[int],
    reading: WeightReading | None = None,
    outputs: Sequence[Measure] = (),
    routing: Sequence[Measure] = (),
    *,
    notes: Sequence[str] = (),
    seed: int = 0,
    progress: Progress | None = None,
) -> ExpertSimilarity:
    """Put together what was compared, and see what agrees.

    Args:
        layers: Model layer index of each MoE layer.
        reading: Of weights.
        outputs: Measures of outputs.
        routing: Measures of routing.
        notes: What could not be compared.
        seed: Of the permutations.
        progress: Called with layers done and in all.

    Raises:
        UsageError: Nothing was compared.
    """
    measures = (*(() if reading is None else reading.measures), *outputs, *routing)
    if not measures:
        raise UsageError("nothing was compared; give weights, outputs or routing")
    whole = [each for each in measures if not each.part]
    return ExpertSimilarity(
        definition=_definition(measures),
        layers=tuple(layers),
        measures=measures,
        agreement=agree(whole, seed=seed, progress=progress) if len(whole) > 1 else None,
        aligned_pairs=None if reading is None else reading.aligned_pairs,
        all_pairs=None if reading is None else reading.all_pairs,
        chance=None if reading is None else reading.chance,
        spectra=None if reading is None else reading.spectra,
        origins=None if reading is None else origins(reading),
        notes=tuple(notes),
        seed=seed,
    )


def _definition(measures: Sequence[Measure]) -> str:
    """The measure that stands for each kind; `Measure.says` has all."""
    said = [f"{each.name}: {each.says}" for each in measures if each.name in _HEADS.values()]
    said = said or [f"{each.name}: {each.says}" for each in measures[:2]]
    return (
        f"For two experts of a layer, {'; '.join(said)}. 1: the same, 0: unrelated. Means are over "
        "pairs; their intervals are a jackknife over experts."
    )


def _span(values: NDArray[np.float64]) -> str:
    return f"{np.nanmin(values):.3f} to {np.nanmax(values):.3f}"


def _rounded(values: NDArray[np.floating]) -> Any:
    found = np.round(values.astype(np.float64), DIGITS).astype(object)
    found[np.isnan(values)] = None
    return found.tolist()
