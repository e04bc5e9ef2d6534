"""One reading of a trace for the taxonomy: counts by unit and class, by token id, and a sample."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from moe_lens.analysis.units import MOST_UNITS, Units
from moe_lens.kernels import NO_EXPERT
from moe_lens.trace import Routes, Trace
from moe_lens.trace.json_files import damaged
from moe_lens.trace.tokens import TokenTexts

from .kinds import COLUMNS, columns
from .token_classes import TokenTable

__all__ = ["ClassCounts", "TokenCounts", "TokenSample", "frequent_ids", "units_for"]

COUNTED_CELLS = 32_000_000
"""Counts by unit and class that are kept: 128 MB. With more experts, units hold more prompts."""

COUNTED_IDS = 16_000_000
"""Counts by token id that are kept: 64 MB. The rarest ids are left out where there are more."""

MOST_IDS = 16_384
FEWEST_UNITS_KEPT = 64

SAMPLED = 8192
"""Tokens kept with all their routes, to take examples from."""

AROUND = 8
"""Tokens of context on each side of an example."""


def units_for(trace: Trace) -> Units:
    """Units of a number for which the counts by class fit into memory."""
    cells = len(COLUMNS) * len(trace.layers) * trace.router_width
    most = int(np.clip(COUNTED_CELLS // cells, FEWEST_UNITS_KEPT, MOST_UNITS))
    return Units.of(trace, most)


def frequent_ids(trace: Trace) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The token ids that occur most, and how often each does; reads only the token ids.

    Raises:
        MoeLensError: A shard is damaged.
    """
    total = np.zeros(0, dtype=np.int64)
    for entry in trace.entries:
        path = trace.path / entry.file
        try:
            with safe_open(path, framework="numpy") as file:
                ids = file.get_tensor("token_ids")
            counted = np.bincount(ids)
        except (SafetensorError, OSError, ValueError, TypeError) as error:
            raise damaged(path, str(error)) from error
        longer = np.zeros(max(len(total), len(counted)), dtype=np.int64)
        longer[: len(total)] = total
        longer[: len(counted)] += counted
        total = longer
    found = np.flatnonzero(total)
    most = min(MOST_IDS, max(1, COUNTED_IDS // (len(trace.layers) * trace.router_width)))
    found = np.sort(found[np.argsort(-total[found], kind="stable")][:most])
    return found, total[found]


class ClassCounts:
    """A `Fold`: tokens of each class, by unit and by unit and expert.

    Attributes:
        tokens: [units, columns] int64.
        counts: [units, columns, layers, R] int32, those that went to each expert.
        slots: [layers] int64, slots that were used.
    """

    def __init__(self, units: Units, texts: TokenTexts, layers: int, router_width: int) -> None:
        self.units = units
        self.tokens = np.zeros((len(units), len(COLUMNS)), dtype=np.int64)
        self.counts = np.zeros((len(units), len(COLUMNS), layers, router_width), dtype=np.int32)
        self.slots = np.zeros(layers, dtype=np.int64)
        self._table = TokenTable.of(texts)

    def add(self, routes: Routes) -> None:
        width, (units, wide) = routes.router_width, self.tokens.shape
        unit = self.units.of_rows(routes)
        for group in columns(routes, self._table):
            cell = unit * wide + group
            self.tokens += np.bincount(cell, minlength=units * wide).reshape(units, wide)
            # Only classes and units that occur here, so that the tables stay in the cache.
            occurring, compact = np.unique(cell, return_inverse=True)
            rows = np.divmod(occurring, wide)
            for place, layer in enumerate(routes.expert_ids):
                table = _scattered(compact, layer, len(occurring), width)
                self.counts[*rows, place] += table.astype(np.int32)
        self.slots += (routes.expert_ids != NO_EXPERT).sum(axis=(1, 2))


class TokenCounts:
    """A `Fold`: how often each of some token ids went to each expert.

    Attributes:
        ids: [ids] int64, ascending.
        counts: [ids, layers, R] int32.
    """

    def __init__(self, ids: NDArray[np.int64], layers: int, router_width: int) -> None:
        self.ids = ids
        self.counts = np.zeros((len(ids), layers, router_width), dtype=np.int32)

    def add(self, routes: Routes) -> None:
        place_of = np.searchsorted(self.ids, routes.token_ids)
        place_of[place_of == len(self.ids)] = 0
        kept = np.flatnonzero(self.ids[place_of] == routes.token_ids)
        occurring, compact = np.unique(place_of[kept], return_inverse=True)
        for place, layer in enumerate(routes.expert_ids):
            table = _scattered(compact, layer[kept], len(occurring), routes.router_width)
            self.counts[occurring, place] += table.astype(np.int32)


def _scattered(
    group: NDArray[np.integer], ids: NDArray[np.integer], groups: int, width: int
) -> NDArray[np.int64]:
    """[groups, R] slots that chose each expert, in each group of tokens; empty ones in none."""
    index = np.minimum(ids, width).astype(np.int64)
    index += (group * (width + 1))[:, None]
    table = np.bincount(index.ravel(), minlength=groups * (width + 1))
    return table.reshape(groups, width + 1)[:, :width]


class TokenSample:
    """A `Fold`: some tokens drawn evenly from all, with their routes and what stands around them.

    Each token has a random rank made of the seed and its place; those of lowest rank are kept, so
    the sample does not depend on how the trace is cut into shards.

    Attributes:
        prompt, position: [sampled] int64.
        context: [sampled, 2 x AROUND + 1] int64 token ids; -1 beyond the prompt.
        expert_ids: [sampled, layers, k].
    """

    def __init__(self, layers: int, *, seed: int = 0, most: int = SAMPLED) -> None:
        self._seed, self._most = seed, most
        self._rank = np.zeros(0, dtype=np.uint64)
        self.prompt = np.zeros(0, dtype=np.int64)
        self.position = np.zeros(0, dtype=np.int64)
        self.context = np.zeros((0, 2 * AROUND + 1), dtype=np.int64)
        self.expert_ids = np.zeros((0, layers, 0), dtype=np.uint16)

    def add(self, routes: Routes) -> None:
        rank = _ranks(routes, self._seed)
        most = min(self._most, len(rank))
        chosen = np.argpartition(rank, most - 1)[:most]
        around = chosen[:, None] + np.arange(-AROUND, AROUND + 1)
        inside = (around >= 0) & (around < len(routes))
        around = np.clip(around, 0, len(routes) - 1)
        inside &= routes.prompt[around] == routes.prompt[chosen][:, None]
        parts: dict[str, NDArray[Any]] = {
            "_rank": rank[chosen],
            "prompt": routes.prompt[chosen].astype(np.int64),
            "position": routes.position[chosen].astype(np.int64),
            "context": np.where(inside, routes.token_ids[around], -1).astype(np.int64),
            "expert_ids": routes.expert_ids[:, chosen].swapaxes(0, 1).astype(np.uint16),
        }
        if len(self._rank):
            parts = {
                name: np.concatenate([getattr(self, name), part]) for name, part in parts.items()
            }
        order = np.argsort(parts["_rank"], kind="stable")[: self._most]
        for name, part in parts.items():
            setattr(self, name, part[order])


def _ranks(routes: Routes, seed: int) -> NDArray[np.uint64]:
    """A random 64-bit number for each token, of its place alone (splitmix64; Steele, 2014)."""
    place = routes.prompt.astype(np.uint64) << np.uint64(32) | routes.position.astype(np.uint64)
    mixed = place + np.uint64((seed * 0x9E3779B97F4A7C15 + 0x9E3779B97F4A7C15) % 2**64)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))
