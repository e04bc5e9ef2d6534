"""What a compression gives back."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe_lens.timing import Timing

from .plan.json_text import dump
from .plan.plan import Plan
from .verification.verification import Verification


@dataclass(frozen=True)
class CompressionResult:
    """What `compress` did.

    `output` and `verification` are None after a dry run. `timing` says where the
    time went and how much memory it took. `notes` are sentences a user should see: which text was
    used, experts that no token reached, how the model was made to run here.
    """

    plan: Plan
    output: Path | None
    verification: Verification | None
    timing: Timing
    notes: tuple[str, ...] = ()

    @property
    def definition(self) -> str:
        """What the numbers in plan and verification mean."""
        parts = [self.plan.definition]
        if self.verification is not None:
            parts.append(self.verification.definition)
        return "; ".join(parts)

    @property
    def warnings(self) -> tuple[str, ...]:
        """The warnings of the verification."""
        return () if self.verification is None else self.verification.warnings

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "output": None if self.output is None else str(self.output),
            "plan": self.plan.to_dict(),
            "verification": None if self.verification is None else self.verification.to_dict(),
            "timing": self.timing.to_dict(),
            "notes": list(self.notes),
            "warnings": list(self.warnings),
        }

    def to_json(self) -> str:
        """Indented JSON."""
        return dump(self.to_dict())

    def _repr_html_(self) -> str:
        parts = [self.plan._repr_html_()]
        if self.verification is not None:
            parts.append(self.verification._repr_html_())
        return "".join(parts)
