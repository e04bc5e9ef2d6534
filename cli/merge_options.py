"""Options of ``moe-lens compress`` that say how experts are merged."""

from __future__ import annotations

from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moe_lens.errors import UsageError

if TYPE_CHECKING:
    from moe_lens.compress.merging.merging import Merging


MERGING = "How experts are merged"


class Grouping(StrEnum):
    """`moe_lens.compress.merging.merging.GROUPINGS`."""

    COMPLETE = "complete"
    HC_SMOE = "hc-smoe"
    M_SMOE = "m-smoe"
    REAM = "ream"


class Weights(StrEnum):
    """`moe_lens.compress.merging.merging.WEIGHTS`."""

    FREQUENCY = "frequency"
    SALIENCY = "saliency"
    EQUAL = "equal"


class Alignment(StrEnum):
    """`moe_lens.compress.merging.merging.ALIGNMENTS`."""

    NONE = "none"
    ACTIVATIONS = "activations"
    WEIGHTS = "weights"
    BOTH = "both"


class RouterRows(StrEnum):
    """`moe_lens.compress.merging.merging.ROUTER_ROWS`."""

    FITTED = "fitted"
    MEAN = "mean"
    DOMINANT = "dominant"


Merge = Annotated[
    bool,
    typer.Option(
        "--merge",
        help="With --ratio, merge that share of the experts into the others.",
        rich_help_panel=MERGING,
    ),
]

GroupingOption = Annotated[
    Grouping | None,
    typer.Option(
        "--grouping",
        show_default=False,
        help="With --merge, which experts come together. hc-smoe (default): those with the "
        "nearest mean outputs. complete: by the similarity of --threshold, or of --similarity. "
        "m-smoe: each joins the most frequent one of like router logits. ream: the most salient "
        "take their likes.",
        rich_help_panel=MERGING,
    ),
]

SimilarityOption = Annotated[
    str | None,
    typer.Option(
        "--similarity",
        metavar="MIX",
        help="With --grouping complete, shares of outputs, overlap, mean-outputs, gated-outputs, "
        "router-logits and weights, such as outputs=0.5,weights=0.5.",
        rich_help_panel=MERGING,
    ),
]

WeightsOption = Annotated[
    Weights | None,
    typer.Option(
        "--merge-weights",
        show_default=False,
        help="What an expert counts in its group: its saliency (REAP; default with --merge), how "
        "often it is chosen (frequency; default with --threshold), or all the same (equal).",
        rich_help_panel=MERGING,
    ),
]

AlignOption = Annotated[
    Alignment | None,
    typer.Option(
        "--align",
        show_default=False,
        help="Match the channels of merged experts before the mean, by their weights, by their "
        "activations on the same tokens, or both. Default: weights with --merge, none with "
        "--threshold.",
        rich_help_panel=MERGING,
    ),
]

RouterRowsOption = Annotated[
    RouterRows | None,
    typer.Option(
        "--router-rows",
        show_default=False,
        help="What asks for a group: a row fitted to the log-sum-exp of its members' logits "
        "(fitted, the default), the mean of their rows, or that of the dominant member.",
        rich_help_panel=MERGING,
    ),
]


def read_merging(
    *,
    merge: bool,
    threshold: float | None,
    grouping: Grouping | None,
    similarity: str | None,
    weights: Weights | None,
    align: Alignment | None,
    router_rows: RouterRows | None,
) -> Merging | None:
    """The choices that were made, over the defaults of this kind of merge; None: none was.

    Raises:
        UsageError: Choices without a merge.
    """
    given: dict[str, Any] = {
        name: value.value
        for name, value in {
            "grouping": grouping,
            "weights": weights,
            "align": align,
            "router_rows": router_rows,
        }.items()
        if value is not None
    }
    if not given and similarity is None:
        return None
    if not merge and threshold is None:
        raise UsageError(
            "--grouping, --similarity, --merge-weights, --align and --router-rows belong to a "
            "merge: add --threshold T, or --merge to --ratio R"
        )
    from dataclasses import replace

    from moe_lens.compress.merging.merging import BY_THRESHOLD, TO_A_NUMBER
    from moe_lens.compress.merging.similarity_sources import parse_mixture

    if similarity is not None:
        given["similarity"] = parse_mixture(similarity)
        given.setdefault("grouping", Grouping.COMPLETE.value)
    return replace(TO_A_NUMBER if merge else BY_THRESHOLD, **given)
