"""What the result of `coactivation` says in words and in tables."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from moe_lens.analysis.table import Cell, Table

from .certainty import FEWEST_RUNS

if TYPE_CHECKING:
    from .result import Coactivation, Pair

__all__ = ["group_table", "layer_table", "pair_table", "said"]

_ROWS = 16


def said(found: Coactivation) -> list[str]:
    """The findings."""
    top = found.strongest(1)
    sentences = [_of_pair(top[0])] if top else []
    if not found.tested:
        reason = (
            f"{found.runs} runs of prompts are too few, {FEWEST_RUNS} are needed"
            if found.runs
            else "a profile does not keep pairs by prompt"
        )
        return [*sentences, f"Nothing is claimed of any pair: {reason}."]
    tested = int(np.isfinite(np.triu(found.q, 1)[np.triu(np.ones_like(found.q), 1) > 0]).sum())
    more, less = (int(np.triu(each, 1).sum()) for each in (found.attracted, found.repelled))
    sentences.append(
        f"Of {tested:,} pairs, {more:,} are chosen together more often than by chance, {less:,} "
        "less often (q at most 0.05)."
    )
    close = [each for layer in found.inseparable for each in layer]
    if close:
        pairs = sum(len(each) == 2 for each in close)
        larger = len(close) - pairs
        also = f", and {larger} larger sets" if larger else ""
        sentences.append(
            f"{pairs} pairs{also} are nearly inseparable: each is chosen with the other by at "
            "least half of its tokens."
        )
    where = [
        str(layer) for layer, each in zip(found.layers, found.groups, strict=True) if each.found
    ]
    sentences.append(
        f"Layers with communities of three experts or more: {', '.join(where)}."
        if where
        else "No layer has communities of three experts or more that random graphs do not have."
    )
    return sentences


def layer_table(found: Coactivation) -> Table:
    """A row for each layer."""
    columns = (
        *("layer", "best partner, %", "by chance, %", "pairs above", "pairs below"),
        *("inseparable", "modularity", "random graphs", "communities"),
    )
    rows: list[tuple[Cell, ...]] = []
    for row, (layer, groups) in enumerate(zip(found.layers, found.groups, strict=True)):
        partner, chance = (100 * float(each) for each in found.partner_share[row])
        rows.append(
            (
                *(str(layer), partner, chance),
                int(np.triu(found.attracted[row], 1).sum()) if found.tested else None,
                int(np.triu(found.repelled[row], 1).sum()) if found.tested else None,
                len(found.inseparable[row]) if found.tested else None,
                *(groups.modularity, groups.null),
                len(groups.members) if found.tested else None,
            )
        )
    return Table(columns, tuple(rows), "Layers")


def pair_table(found: Coactivation) -> Table:
    """The strongest pairs: of each layer some, of many layers of all."""
    layers = len(found.layers)
    most = max(3, _ROWS // layers)
    pairs = (
        [pair for layer in found.layers for pair in found.strongest(most, layer)]
        if layers <= _ROWS // 3
        else found.strongest(_ROWS)
    )
    rows: list[tuple[Cell, ...]] = [
        (
            str(pair.layer),
            f"{pair.one} + {pair.two}",
            pair.tokens,
            100 * pair.share_of_one,
            100 * pair.share_of_two,
            pair.lift,
            "" if pair.low is None else f"{pair.low:.3g} to {pair.high:.3g}",
            pair.q,
        )
        for pair in pairs
    ]
    heads = ("layer", "experts", "tokens", "% of first", "% of second", "lift", "interval", "q")
    return Table(heads, tuple(rows), "Strongest pairs")


def group_table(found: Coactivation) -> Table:
    """The largest communities."""
    groups = [
        (layer, members)
        for layer, each in zip(found.layers, found.groups, strict=True)
        for members in each.members
    ]
    groups.sort(key=lambda group: -len(group[1]))
    rows: list[tuple[Cell, ...]] = [
        (str(layer), len(members), ", ".join(map(str, members)))
        for layer, members in groups[:_ROWS]
    ]
    return Table(("layer", "size", "experts"), tuple(rows), "Communities")


def _of_pair(pair: Pair) -> str:
    return (
        f"The strongest pair is {pair.one} and {pair.two} of layer {pair.layer}: "
        f"{100 * pair.share_of_one:.0f} % of the tokens of {pair.one} go to {pair.two}, too, "
        f"{100 * pair.share_of_two:.0f} % the other way, {pair.lift:.3g} times what chance gives."
    )
