"""The merge of `compress`: sample what it needs, plan, and measure the experts per token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from moe_lens.compress.plan.plan import Plan
from moe_lens.compress.pruning.pruning import removed_per_group
from moe_lens.compress.stages import CHOOSING_K, PLANNING, SAMPLING
from moe_lens.compress.statistics.statistics import Calibration
from moe_lens.errors import UsageError
from moe_lens.experts.layer_sample import sample_layers
from moe_lens.telling import StageProgress, begin

from .experts_per_token import choose_experts_per_token
from .merging import Merging
from .planning import plan_merge, plan_merge_to

if TYPE_CHECKING:
    from moe_lens.router import ExpertRouter


def check_merge(
    merging: Merging | None,
    threshold: float | None,
    *,
    merge: bool,
    sized: bool,
    narrower: bool,
) -> None:
    """Raise UsageError unless what is asked of a merge fits together.

    Args:
        merging: Its choices, if any were made.
        threshold: By which to merge.
        merge: Whether experts shall be merged to a number, not removed.
        sized: Whether that number is given, in any way.
        narrower: Whether the experts shall lose channels as well.
    """
    if merge and not sized:
        raise UsageError(
            "merge to what number? give the share of the experts that shall be gone (--ratio 0.5 "
            "--merge), or how many stay (--experts 64 --merge); a threshold merges without being "
            "told to"
        )
    if merge and narrower:
        raise UsageError(
            "merged experts cannot lose channels in the same step; compress twice, or remove "
            "experts (--ratio without --merge)"
        )
    if merging is None:
        return
    if threshold is not None:
        merging.check_threshold()
    elif not merge:
        raise UsageError("the choices of a merge belong to a threshold, or to a size with `merge`")


def merge_stage(
    router: ExpertRouter,
    statistics: Calibration,
    tokens: Sequence[Sequence[int]],
    merging: Merging,
    *,
    threshold: float | None = None,
    ratio: float | None = None,
    experts: int | None = None,
    experts_per_token: int | None = None,
    per_layer: bool = False,
    trust_remote_code: bool = False,
    seed: int = 0,
    progress: StageProgress | None = None,
) -> Plan:
    """The plan of a merge, by a threshold or to a number of experts.

    Args:
        router: The parent.
        statistics: Its calibration, with similarities.
        tokens: The calibration text.
        merging: How groups are found and made into experts.
        threshold: Merge what is at least so similar.
        ratio: In its place, merge until this share of the experts of each layer is gone.
        experts: Or until so many are left.
        experts_per_token: Of the smaller model; None measures whether fewer are better.
        per_layer: With a threshold, each layer keeps the groups that it has alone.
        trust_remote_code: Let the model's files run code.
        seed: Of the sample.
        progress: Called with the stage, and tokens done and in all.

    Raises:
        UsageError: As `plan_merge` and `plan_merge_to`.
        NothingToMergeError: As `plan_merge`.
    """

    samples = None
    if merging.needs_sample:
        samples = sample_layers(router, tokens, seed, begin(progress, SAMPLING), router_inputs=True)
    planned = begin(progress, PLANNING)
    if threshold is not None:
        plan = plan_merge(
            statistics,
            threshold,
            experts_per_token=experts_per_token,
            merging=merging,
            samples=samples,
            per_layer=per_layer,
            progress=planned,
        )
    else:
        model = statistics.model
        fewer = removed_per_group(model, ratio, experts)
        plan = plan_merge_to(
            statistics,
            model.num_experts - fewer * model.group_count,
            experts_per_token=experts_per_token,
            merging=merging,
            samples=samples,
            progress=planned,
        )
    if experts_per_token is not None:
        return plan
    return choose_experts_per_token(
        router,
        statistics,
        plan,
        tokens,
        trust_remote_code=trust_remote_code,
        seed=seed,
        progress=begin(progress, CHOOSING_K),
    )
