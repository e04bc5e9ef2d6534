"""How experts are merged: which belong together, what each gives, and who answers for them.

The four choices are independent of each other. Published methods are combinations of them:

| method | grouping | weights | align | router rows |
|---|---|---|---|---|
| HC-SMoE (arXiv:2410.08589) | hc-smoe | frequency | none | (keeps all: not possible here) |
| M-SMoE (arXiv:2310.01334) | m-smoe | frequency | weights | (keeps all: not possible here) |
| REAM (arXiv:2604.04356) | ream | saliency | both | dominant |
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from moe_lens.compress.statistics.similarity import DEFINITION
from moe_lens.errors import UsageError

from .similarity_sources import OURS, SAMPLED, check_mixture

GROUPINGS: dict[str, str] = {
    "complete": "complete linkage: the least similar pair of a group counts",
    "hc-smoe": "average linkage of Euclidean distances between the experts' mean outputs on all "
    "sampled tokens (HC-SMoE, arXiv:2410.08589)",
    "m-smoe": "the most frequent experts stay; each other one joins the one among them whose "
    "router logits are most alike by cosine (M-SMoE, arXiv:2310.01334)",
    "ream": "the most salient experts stay; from the most salient one down, each takes up to 15 of "
    "those that are left, most similar first by mean gated outputs and router logits (REAM, "
    "arXiv:2604.04356)",
}
"""How experts come together."""

WEIGHTS: dict[str, str] = {
    "frequency": "how often the calibration text chose it",
    "saliency": "its REAP saliency (arXiv:2510.13999)",
    "equal": "the same for each",
}
"""What an expert's share in its group is proportional to."""

ALIGNMENTS: dict[str, str] = {
    "none": "channels as they stand",
    "activations": "channels matched by what they answer to the same sampled tokens",
    "weights": "channels matched by their weights",
    "both": "channels matched by the sum of both distances",
}
"""How the channels of a member are put in the order of the dominant one before the mean."""

ROUTER_ROWS: dict[str, str] = {
    "fitted": "a row fitted by ridge regression on sampled tokens, whose logit is the log-sum-exp "
    "of the members' logits",
    "mean": "the weighted mean of the members' rows",
    "dominant": "the row of the dominant member",
}
"""What answers for a group in the router."""

_CHOICES = {
    "grouping": GROUPINGS,
    "weights": WEIGHTS,
    "align": ALIGNMENTS,
    "router_rows": ROUTER_ROWS,
}


@dataclass(frozen=True)
class Merging:
    """The choices of one merge.

    Raises:
        UsageError: A name that there is not, or a similarity where the grouping has its own.
    """

    grouping: str = "complete"
    weights: str = "frequency"
    align: str = "none"
    router_rows: str = "fitted"
    similarity: Mapping[str, float] = field(default_factory=lambda: dict(OURS))
    """With ``complete``: sources (`similarity_sources.SOURCES`) and the share of each."""

    def __post_init__(self) -> None:
        for name, known in _CHOICES.items():
            value = getattr(self, name)
            if value not in known:
                raise UsageError(
                    f"there is no {name.replace('_', ' ')} {value!r}; choose one of "
                    f"{', '.join(known)}"
                )
        check_mixture(self.similarity)
        if self.grouping != "complete" and dict(self.similarity) != OURS:
            raise UsageError(
                f"the grouping {self.grouping} has a similarity of its own; leave the other out, "
                "or choose the grouping complete"
            )

    @property
    def needs_sample(self) -> bool:
        """Whether `layer_sample.sample_layers` is needed, beyond the sums of a calibration."""
        return (
            self.grouping != "complete"
            or self.align != "none"
            or self.router_rows == "fitted"
            or bool(SAMPLED & set(self.similarity))
        )

    def check_threshold(self) -> None:
        """Raise UsageError unless a threshold can decide what is merged."""
        if self.grouping != "complete" or dict(self.similarity) != OURS:
            raise UsageError(
                "a threshold holds for every pair of a group, which complete linkage by output "
                "similarity and activation overlap alone can promise; for another grouping say how "
                "many experts shall go (--ratio 0.5 --merge)"
            )

    def settings(self) -> dict[str, Any]:
        """Plain values for a plan."""
        found: dict[str, Any] = {name: getattr(self, name) for name in _CHOICES}
        if self.grouping == "complete":
            found["similarity"] = dict(self.similarity)
        return found


BY_THRESHOLD = Merging()
"""The default where a threshold decides what is merged."""

TO_A_NUMBER = Merging(grouping="hc-smoe", weights="saliency", align="weights")
"""The default where a number of experts is asked for: what lost least in `docs/compress.md`."""

WITHOUT_SAMPLE = Merging(router_rows="mean")
"""What the sums of a calibration allow, without a sample of what the layers read."""


def merge_definition(settings: Mapping[str, Any]) -> str:
    """What the settings of a merge mean, of a plan that may say less than all of them."""
    texts = [
        f"{what}: {known[settings[name]]}"
        for name, what, known in (
            ("grouping", "groups", GROUPINGS),
            ("weights", "the share of an expert is proportional to", WEIGHTS),
            ("align", "channels", ALIGNMENTS),
            ("router_rows", "the router", ROUTER_ROWS),
        )
        if settings.get(name) in known
    ]
    return "; ".join([DEFINITION, *texts])
