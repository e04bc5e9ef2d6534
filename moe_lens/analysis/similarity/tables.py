"""Likeness of experts as tables: means, ranks, nearest pairs, and what agrees."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from moe_lens.analysis.table import Cell, Table

from .agreement import Agreement
from .measures import Kind, Measure, PairMeans, upper
from .origin import SAYS, Origins
from .spectrum import Spectra
from .weights import ALIGNED

__all__ = ["agreement_table", "mean_table", "nearest_table", "origin_table", "rank_table"]

NEAREST = 6
"""Pairs in a table."""


def mean_table(kind: Kind, measures: Sequence[Measure], layers: Sequence[int]) -> Table:
    """The measures of one kind: their means over pairs, a row for each layer."""
    shown = [each for each in measures if each.kind == kind and _told(each)]
    means = [each.means() for each in shown]
    rows: list[tuple[Cell, ...]] = []
    for place, layer in enumerate(layers):
        cells = [_mean(each, found, place) for each, found in zip(shown, means, strict=True)]
        rows.append((layer, *cells))
    title = f"Mean over pairs by {kind}; ± 95 % over experts, not prompts; (pairs, if not all)"
    return Table(("layer", *(each.name for each in shown)), tuple(rows), title)


def _told(measure: Measure) -> bool:
    """Whether the tables have room for it: of single projections only as they lie."""
    return not (measure.part and measure.name.startswith(ALIGNED))


def origin_table(seen: Origins, counted: Sequence[str], layers: Sequence[int]) -> Table:
    """Whether experts look like copies; `counted`: how many pairs of each layer are aligned."""
    rows = tuple(
        (
            layer,
            SAYS[seen.words[place]],
            float(seen.mean[place]),
            float(seen.highest[place]),
            float(100 * seen.partnered[place]),
            float(100 * seen.partnered_aligned[place]),
            counted[place],
        )
        for place, layer in enumerate(layers)
    )
    columns = (
        "layer",
        "experts look",
        "mean",
        "highest",
        "% with partner",
        "aligned",
        "pairs aligned",
    )
    chance = "" if np.isnan(seen.chance_aligned) else f", aligned {seen.chance_aligned:.3f}"
    title = (
        "Cosines of all weights (partner: 0.5 or more); unrelated ones stay below "
        f"{seen.chance:.4f}{chance}"
    )
    return Table(columns, rows, title)


def rank_table(seen: Spectra) -> Table:
    """Ranks of the weights of an expert, and of what two nearest ones differ by."""
    rows: list[tuple[Cell, ...]] = []
    for kind, name in enumerate(seen.projections):
        random = seen.random[kind]
        effective = np.concatenate([each[:, kind] for each in seen.effective])
        difference = np.concatenate([each[:, kind] for each in seen.difference])
        rows.append(
            (
                name,
                " x ".join(map(str, seen.shapes[kind])),
                float(np.median(np.concatenate([each[:, kind] for each in seen.stable]))),
                float(np.median(effective)),
                random.effective,
                float(np.median(difference)),
                float(np.median(np.concatenate([each[:, kind] for each in seen.apart]))),
            )
        )
    columns = (
        "projection", "shape", "stable rank", "effective", "random matrix",
        "difference of nearest", "|A - B|²",
    )  # fmt: skip
    read = sum(map(len, seen.experts))
    return Table(columns, tuple(rows), f"Ranks, median of {read} experts read")


def nearest_table(measure: Measure, heads: Sequence[Measure], layers: Sequence[int]) -> Table:
    """Pairs that are each other's nearest by a measure, with what the other `heads` say of them."""
    heads = [each for each in heads if each is not measure]
    found = []
    for place, layer in enumerate(layers):
        for one, two in measure.mutual(place):
            found.append((float(measure.values[place][one, two]), place, layer, one, two))
    found.sort(key=lambda pair: (-pair[0], pair[1:]))
    rows: list[tuple[Cell, ...]] = []
    for value, place, layer, one, two in found[:NEAREST]:
        others = [float(each.values[place][one, two]) for each in heads]
        rows.append((layer, f"{one} and {two}", value, *others))
    columns = ("layer", "experts", measure.name, *(each.name for each in heads))
    return Table(
        columns, tuple(rows), f"Each other's nearest by {measure.name}, {len(found)} pairs"
    )


def agreement_table(found: Agreement) -> Table:
    """Rank correlations of the measures, the median of the layers."""
    median = found.median()
    shown = [place for place in range(len(median)) if not np.isnan(median[place]).all()]
    rows: list[tuple[Cell, ...]] = []
    for row in shown:
        cells = [None if row == each else f"{median[row, each]:.2f}" for each in shown]
        rows.append((found.names[row], *cells))
    columns = ("", *(found.names[place] for place in shown))
    return Table(columns, tuple(rows), "Rank correlation over pairs, median of layers")


def _mean(measure: Measure, found: PairMeans, place: int) -> Cell:
    """``0.075 ± 0.004``; without an interval of a single projection or of some of the pairs."""
    mean, high = found.mean[place], found.high[place]
    if np.isnan(mean):
        return None
    if not measure.complete(place):
        pairs = int((~np.isnan(upper(measure.values[place]))).sum())
        return f"{mean:.3f} ({pairs})"
    return f"{mean:.3f}" if measure.part or np.isnan(high) else f"{mean:.3f} ± {high - mean:.3f}"
