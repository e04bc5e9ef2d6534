"""Experts compared by their weights, one layer in memory at a time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from moe_lens.experts.cosines import cosines, gram_cosines, weight_grams
from moe_lens.experts.matrices import expert_modules, router_weights
from moe_lens.families import MoELayer
from moe_lens.telling import Progress

from .aligning import ALL, NULLS, ChannelRows, Together, candidates
from .measures import Measure, Pairs
from .spectrum import Ranks, Spectra, experts_read, random_ranks, ranks

__all__ = ["ALIGNED", "LYING", "ROUTER_ROWS", "Chance", "WeightReading", "read_weights"]

LYING, ALIGNED, ROUTER_ROWS = "weights", "aligned", "router rows"
"""Names of the measures over all projections, and of that of the router."""


@dataclass(frozen=True, eq=False)
class Chance:
    """What unrelated weights give.

    Attributes:
        lying: [draws] cosines of an expert with another whose hidden dimensions are scrambled.
        aligned: [draws] the same after aligning the channels.
        spread: 1 / sqrt(n): standard deviation of the cosine of two random vectors as long as
            the weights of an expert.
    """

    lying: NDArray[np.float64]
    aligned: NDArray[np.float64]
    spread: float


@dataclass(frozen=True, eq=False)
class WeightReading:
    """What the weights of a model say about its experts.

    Attributes:
        measures: `LYING` and `ALIGNED` over all projections, then by projection.
        aligned_pairs: [layers] int64, pairs that were aligned.
        all_pairs: [layers] int64.
        chance: What unrelated weights give.
        spectra: Ranks of the matrices.
    """

    measures: tuple[Measure, ...]
    aligned_pairs: NDArray[np.int64]
    all_pairs: NDArray[np.int64]
    chance: Chance
    spectra: Spectra


@dataclass
class _Layer:
    """What was read of one layer."""

    lying: dict[str, NDArray[np.float64]]
    aligned: dict[str, NDArray[np.float64]]
    pairs: int = 0
    null: list[Together] = field(default_factory=list)
    router: NDArray[np.float64] | None = None
    read: tuple[int, ...] = ()
    ranks: list[list[Ranks]] = field(default_factory=list)
    differing: Pairs = field(default_factory=list)
    difference: list[list[float]] = field(default_factory=list)
    apart: list[list[float]] = field(default_factory=list)


def read_weights(
    layers: Sequence[MoELayer],
    *,
    align: int | None = None,
    spectra: int | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> WeightReading:
    """Compare the weights of the experts of each layer.

    Memory: some 256 MiB of unpacked weights, and a few experts.

    Args:
        layers: MoE layers of a loaded model, with two experts or more each.
        align: Pairs of each layer whose channels are aligned; None: as many as is quick, in any
            case the nearest ones.
        spectra: Experts of each layer whose singular values are read; None: as many as is quick.
        seed: Of what is scrambled, and of sketches.
        progress: Called with layers done and in all.
    """
    read: list[_Layer] = []
    shapes: dict[str, tuple[int, int]] = {}
    for number, layer in enumerate(layers):
        if progress is not None:
            progress(number, len(layers))
        draw = np.random.default_rng([seed, layer.index])
        with layer.reading():
            shapes = {name: each.shape for name, each in expert_modules(layer, 0).items()}
            read.append(_read_layer(layer, align, spectra, shapes, draw))
        mx.clear_cache()
    if progress is not None:
        progress(len(layers), len(layers))
    size = sum(rows * columns for rows, columns in shapes.values())
    return WeightReading(
        measures=_measures(read, list(shapes)),
        aligned_pairs=np.array([each.pairs for each in read]),
        all_pairs=np.array(
            [len(each.lying[ALL]) * (len(each.lying[ALL]) - 1) // 2 for each in read]
        ),
        chance=Chance(
            np.array([null.lying[ALL] for each in read for null in each.null]),
            np.array([null.aligned[ALL] for each in read for null in each.null]),
            1 / np.sqrt(size),
        ),
        spectra=_spectra(read, shapes),
    )


def _read_layer(
    layer: MoELayer,
    align: int | None,
    spectra: int | None,
    shapes: dict[str, tuple[int, int]],
    draw: np.random.Generator,
) -> _Layer:
    grams = weight_grams(layer)
    grams[ALL] = sum(grams.values(), np.zeros_like(next(iter(grams.values()))))
    lying = {name: gram_cosines(gram) for name, gram in grams.items()}
    experts = layer.num_experts
    found = _Layer(lying, {name: np.full((experts, experts), np.nan) for name in lying})
    if layer.reason("router_logits") is None:
        found.router = cosines(router_weights(layer)[0][:experts])
    rows = ChannelRows(layer)
    pairs = candidates(layer, lying[ALL], lambda: rows.sketches(draw), align)
    found.pairs = len(pairs)
    orders = {}
    for one, two in pairs:
        together = rows.compare(one, two)
        for name, value in together.aligned.items():
            found.aligned[name][one, two] = found.aligned[name][two, one] = value
        orders[one, two] = together
    for _ in range(min(NULLS, experts * (experts - 1) // 2) if pairs else 0):
        one, two = (int(each) for each in draw.choice(experts, 2, replace=False))
        found.null.append(rows.scrambled(one, two, draw))
    found.read = experts_read(list(shapes.values()), experts, spectra)
    for expert in found.read:
        matrices = expert_modules(layer, expert)
        found.ranks.append([ranks(each.rows()) for each in matrices.values()])
    _differences(found, rows, orders)
    return found


def _differences(found: _Layer, rows: ChannelRows, orders: dict[tuple[int, int], Together]) -> None:
    """The ranks of what pairs differ by that are each other's nearest; as many as experts read."""
    best = np.fmax(found.lying[ALL], found.aligned[ALL])
    nearest = Measure.of(LYING, "weights", "", [best]).mutual(0)[: len(found.read)]
    for pair in sorted(nearest):
        a, b = rows.rows(pair[0]), rows.rows(pair[1])
        together = orders.get(pair)
        if together is not None and together.aligned[ALL] > together.lying[ALL]:
            b = b[mx.array(together.order)]
        effective, apart = [], []
        for part in rows.parts.values():
            ours, theirs = a[:, part], b[:, part]
            difference = ours - theirs
            effective.append(ranks(difference).effective)
            squares = [float(mx.square(each).sum()) for each in (difference, ours, theirs)]
            apart.append(squares[0] / max(squares[1] + squares[2], 1e-300))
        found.differing.append(pair)
        found.difference.append(effective)
        found.apart.append(apart)


def _measures(read: list[_Layer], projections: list[str]) -> tuple[Measure, ...]:
    found = []
    for name in [ALL, *projections]:
        what = "all expert weights" if name == ALL else f"{name} weights"
        end = "" if name == ALL else f" {name}"
        found += [
            Measure.of(
                f"{LYING}{end}",
                "weights",
                f"cosine of {what}, as they lie",
                [each.lying[name] for each in read],
                part=name != ALL,
            ),
            Measure.of(
                f"{ALIGNED}{end}",
                "weights",
                f"cosine of {what} after the channels of one are put in the order of the other",
                [each.aligned[name] for each in read],
                part=name != ALL,
            ),
        ]
    routers = [each.router for each in read if each.router is not None]
    if len(routers) == len(read):
        says = "cosine of the rows of the router"
        found.append(Measure.of(ROUTER_ROWS, "routing", says, list(routers)))
    return tuple(found)


def _spectra(read: list[_Layer], shapes: dict[str, tuple[int, int]]) -> Spectra:
    kinds = len(shapes)

    def tables(parts: list[list[list[float]]]) -> tuple[NDArray[np.float64], ...]:
        return tuple(np.array(part, np.float64).reshape(-1, kinds) for part in parts)

    return Spectra(
        projections=tuple(shapes),
        shapes=tuple(shapes.values()),
        experts=tuple(each.read for each in read),
        stable=tables([[[r.stable for r in row] for row in each.ranks] for each in read]),
        effective=tables([[[r.effective for r in row] for row in each.ranks] for each in read]),
        random=tuple(random_ranks(*shape) for shape in shapes.values()),
        pairs=tuple(tuple(each.differing) for each in read),
        difference=tables([each.difference for each in read]),
        apart=tables([each.apart for each in read]),
    )
