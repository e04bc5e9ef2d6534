"""Both sides of the vocabulary of experts: what they are chosen for, and what they push."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from moe_lens.analysis.result import Result
from moe_lens.analysis.table import Cell, Table
from moe_lens.errors import UsageError
from moe_lens.trace import place_of

from .routed import RoutedVocabulary
from .written import WrittenVocabulary

__all__ = ["Vocabulary"]


@dataclass(frozen=True, eq=False)
class Vocabulary(Result):
    """The vocabulary of all experts. Make one with `of`.

    Attributes:
        definition: What the numbers are.
        routed: By routing; None if not asked for.
        written: By contribution; None if not asked for.
        layer: The layer whose experts the tables show, all of them; None: the first of all.
    """

    kind: ClassVar[str] = "vocabulary"
    definition: str
    routed: RoutedVocabulary | None
    written: WrittenVocabulary | None
    layer: int | None = None

    @classmethod
    def of(
        cls,
        routed: RoutedVocabulary | None,
        written: WrittenVocabulary | None,
        layer: int | None = None,
    ) -> Vocabulary:
        """Of one side, or both of the same model.

        Raises:
            UsageError: Neither is given, or that layer has no routed experts.
        """
        parts = [part for part in (routed, written) if part is not None]
        if not parts:
            raise UsageError("there is neither routing nor contribution to show")
        if layer is not None:
            place_of(parts[0].layers, layer)
        return cls(" ".join(part.definition for part in parts), routed, written, layer)

    @property
    def title(self) -> str:
        return "Vocabulary of experts"

    def findings(self) -> list[str]:
        """Those of both sides."""
        parts = (self.routed, self.written)
        return [each for part in parts if part is not None for each in part.findings()]

    def tables(self) -> list[Table]:
        """Layers by routing, then the experts; or those of one layer."""
        if self.layer is not None:
            return [self._layer_table(self.layer)]
        if self.written is None:
            assert self.routed is not None
            return self.routed.tables()
        if self.routed is None:
            return self.written.tables()
        return [self.routed.layer_table(), self.written.expert_table(chosen_for=self._chosen_for)]

    def _chosen_for(self, place: int, expert: int) -> str:
        assert self.routed is not None
        return self.routed.top_texts(place, expert, 5)

    def _layer_table(self, layer: int) -> Table:
        """Every expert of one layer, by number."""
        source = self.written or self.routed
        assert source is not None
        place = place_of(source.layers, layer)
        width = (source.share if isinstance(source, RoutedVocabulary) else source.tokens).shape[1]
        rows = [(expert, *self._row(place, expert)) for expert in range(width)]
        columns = ["expert"]
        if self.written is not None:
            columns += [
                "tokens",
                "specific",
                "noise",
                "sharp",
                "size",
                "pushes up",
                "beyond the others",
            ]
        if self.routed is not None:
            columns += ["ids", "mean share, %", "chosen for, %"]
        return Table(tuple(columns), tuple(rows), f"Experts of layer {layer}")

    def _row(self, place: int, expert: int) -> list[Cell]:
        cells: list[Cell] = []
        if self.written is not None:
            one = self.written
            cells.append(int(one.tokens[place, expert]))
            numbers = (one.specificity, one.noise, one.sharpness, one.size)
            cells += [float(each[place, expert]) for each in numbers]
            seen = not np.isnan(one.sharpness[place, expert])
            cells += [
                one.shown(each.up[place, expert]) if seen else ""
                for each in (one.pushed, one.beyond)
            ]
        if self.routed is not None:
            cells.append(int(self.routed.ids[place, expert]))
            cells.append(float(100 * self.routed.share[place, expert]))
            cells.append(self.routed.top_texts(place, expert, 5))
        return cells
