"""Every method's plan for one size, from one reading of the text."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

from moe_lens.compress.merging.experts_per_token import candidates as ks_worth_measuring
from moe_lens.compress.merging.merging import BY_THRESHOLD, TO_A_NUMBER, Merging
from moe_lens.compress.merging.planning import plan_merge, plan_merge_to
from moe_lens.compress.plan.limits import Limits
from moe_lens.compress.plan.plan import Plan
from moe_lens.compress.pruning.channels import plan_channels
from moe_lens.compress.pruning.pruning import plan_prune
from moe_lens.compress.statistics.saliency import METHODS
from moe_lens.compress.tensors.size_table import Shape, SizeTable
from moe_lens.errors import MoeLensError, UsageError
from moe_lens.telling import Progress

from .readings import Readings
from .trials import Skipped

CHANNELS = "channels"
NO_COUNT = "no smaller number of whole experts fits into this size"
MERGES: dict[str, Merging] = {
    "merge": TO_A_NUMBER,
    "complete": BY_THRESHOLD,
    "hc-smoe": Merging(grouping="hc-smoe"),
    "m-smoe": Merging(grouping="m-smoe", align="weights"),
    "ream": Merging(grouping="ream", weights="saliency", align="both", router_rows="dominant"),
}
"""What tables call a merge, and its choices. HC-SMoE and M-SMoE keep the router as it was and
several copies of each expert, which saves nothing; here their groups get fitted rows."""

ALIKE = 0.8
"""A similarity that experts reach which do the same; see `similarity.SCALE`."""
MERGE_ALIKE = f"merge at {ALIKE:g}"
"""The merge of all that is so alike, where that makes the model smaller than it need be: fewer
groups of true copies may lose less than more groups, some of them of copies and some not."""

SPLITS = (0.25, 0.5, 0.75)
"""Of the logarithm of the share that stays, how much of it the channels bear."""


NAMES = (*METHODS, *MERGES, MERGE_ALIKE, CHANNELS)
"""What can be asked for by name."""


def check_method_names(names: Iterable[str] | None) -> None:
    """Raise UsageError unless there are all of these methods."""
    for name in names or ():
        if name not in NAMES:
            raise UsageError(f"there is no method {name!r}; choose one of {', '.join(NAMES)}")


@dataclass(frozen=True)
class Candidate:
    """A plan to try, with these numbers of experts per token (none: its own)."""

    name: str
    plan: Plan
    ks: tuple[int, ...] = ()


Found = Candidate | Skipped


def possible_counts(readings: Readings, k: int | None) -> range:
    """Numbers of experts that a smaller model can have, ascending, below the parent's."""
    model = readings.statistics.model
    per_group = Limits(model).group_for(k or model.experts_per_token)
    return range(per_group * model.group_count, model.num_experts, model.group_count)


def possible_shapes(readings: Readings, k: int | None = None) -> list[Shape]:
    """The narrowest and the widest experts with every number of them: what a size can be."""
    model = readings.statistics.model
    widths = [model.expert_width]
    if readings.widths is not None and readings.channels is not None:
        widths += readings.widths.possible[:1]
    counts = [*possible_counts(readings, k), model.num_experts]
    return [
        Shape(count, width)
        for count in counts
        for width in widths
        if (count, width) != (model.num_experts, model.expert_width)
    ]


def single_candidates(
    readings: Readings,
    table: SizeTable,
    limit: int,
    *,
    methods: Iterable[str] | None = None,
    experts_per_token: int | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> Iterator[Found]:
    """The plan of every method that removes, merges or narrows experts, of at most `limit` bytes.

    Args:
        readings: Of the calibration text.
        table: Of the parent.
        limit: Bytes of the weight files.
        methods: Names to leave out all others; None for every method.
        experts_per_token: Of the smaller model; None keeps it, and tries fewer for merges.
        seed: Of ``random``.
        progress: Called with layers of each plan done and in all.
    """
    wanted = None if methods is None else set(methods)
    model = readings.statistics.model
    count = table.most_experts(
        limit, model.expert_width, possible_counts(readings, experts_per_token)
    )
    for method in METHODS:
        if wanted is None or method in wanted:
            make = partial(_prune, readings, method, count, experts_per_token, seed, progress)
            yield _planned(method, make)
    # Merged experts may be fewer than a token has slots: the slots go with them.
    count = table.most_experts(
        limit, model.expert_width, possible_counts(readings, experts_per_token or 1)
    )
    for name in MERGES:
        if wanted is None or name in wanted:
            yield _merged(readings, name, count, experts_per_token, progress)
    if count is not None and (wanted is None or MERGE_ALIKE in wanted):
        make = partial(_merge_alike, readings, count, experts_per_token, progress)
        alike = _planned(MERGE_ALIKE, make)
        if isinstance(alike, Candidate):
            yield _with_fewer_k(readings, alike, experts_per_token)
    if wanted is None or CHANNELS in wanted:
        yield _channels(readings, table, limit, experts_per_token)


def combined_candidates(
    readings: Readings,
    table: SizeTable,
    limit: int,
    method: str,
    *,
    experts_per_token: int | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> Iterator[Found]:
    """Fewer and narrower experts at once, at up to three splits of the same bytes.

    Args:
        readings: Of the calibration text.
        table: Of the parent.
        limit: Bytes of the weight files.
        method: What removes the experts.
        experts_per_token: Of the smaller model; None keeps it.
        seed: Of ``random``.
        progress: Called with layers of each plan done and in all.
    """
    if readings.channels is None or readings.widths is None:
        return
    shapes = _split_shapes(readings, table, limit, experts_per_token)
    for shape in shapes:
        make = partial(_narrowed, readings, method, shape, experts_per_token, seed, progress)
        yield _planned(f"{method} + {CHANNELS}", make)


def _split_shapes(readings: Readings, table: SizeTable, limit: int, k: int | None) -> list[Shape]:
    assert readings.widths is not None
    full = table.full
    share = max(1e-6, (limit - table.fixed) / (table.bytes(full) - table.fixed))
    counts = possible_counts(readings, k)
    found: dict[Shape, None] = {}
    for split in SPLITS:
        wanted = full.expert_width * share**split
        width = min(readings.widths.possible, key=lambda each: (abs(each - wanted), -each))
        count = table.most_experts(limit, width, counts)
        if count is not None:
            found[Shape(count, width)] = None
    # One that could keep all experts at its width is no split: channels alone stand for it.
    return [s for s in found if table.bytes(Shape(full.num_experts, s.expert_width)) > limit]


def _planned(name: str, make: Callable[[], Plan], ks: Sequence[int] = ()) -> Found:
    try:
        return Candidate(name, make(), tuple(ks))
    except MoeLensError as error:
        return Skipped(name, str(error))


def _prune(
    readings: Readings,
    method: str,
    count: int | None,
    k: int | None,
    seed: int,
    progress: Progress | None,
) -> Plan:
    if count is None:
        raise MoeLensError(NO_COUNT)
    if method == "greedy" and readings.samples is None:
        raise MoeLensError(readings.no_samples or "")
    return plan_prune(
        readings.statistics,
        method=method,
        experts=count,
        experts_per_token=k,
        seed=seed,
        router=readings.router,
        samples=readings.samples,
        progress=progress,
    )


def _merged(
    readings: Readings, name: str, count: int | None, k: int | None, progress: Progress | None
) -> Found:
    merging = _with_possible_rows(MERGES[name], readings)
    found = _planned(name, partial(_merge, readings, merging, count, k, progress))
    return found if isinstance(found, Skipped) else _with_fewer_k(readings, found, k)


def _with_possible_rows(merging: Merging, readings: Readings) -> Merging:
    """Router rows can only be fitted where the sample has what the router reads."""
    if merging.router_rows == "fitted" and not readings.router_inputs:
        return replace(merging, router_rows="mean")
    return merging


def _with_fewer_k(readings: Readings, merge: Candidate, k: int | None) -> Candidate:
    """A merge with the numbers of experts per token worth measuring; with `k`, that alone."""
    if k is not None:
        return merge
    return replace(merge, ks=ks_worth_measuring(readings.statistics, merge.plan)[0])


def _merge_alike(readings: Readings, count: int, k: int | None, progress: Progress | None) -> Plan:
    merging = _with_possible_rows(BY_THRESHOLD, readings)
    plan = plan_merge(
        readings.statistics,
        ALIKE,
        experts_per_token=k,
        merging=merging,
        samples=readings.samples,
        progress=progress,
    )
    if plan.num_experts >= count:
        raise MoeLensError("it is no smaller than the size asked for")
    return plan


def _merge(
    readings: Readings,
    merging: Merging,
    count: int | None,
    k: int | None,
    progress: Progress | None,
) -> Plan:
    if count is None:
        raise MoeLensError(NO_COUNT)
    if merging.needs_sample and readings.samples is None:
        raise MoeLensError(readings.no_samples or "")
    return plan_merge_to(
        readings.statistics,
        count,
        experts_per_token=k,
        merging=merging,
        samples=readings.samples,
        progress=progress,
    )


def _channels(readings: Readings, table: SizeTable, limit: int, k: int | None) -> Found:
    if readings.channels is None or readings.widths is None:
        return Skipped(CHANNELS, readings.no_channels or "")
    model = readings.statistics.model
    width = table.widest(limit, model.num_experts, readings.widths.possible)
    if width is None:
        return Skipped(CHANNELS, "no width of all experts is narrow enough for this size")
    plan = plan_channels(readings.channels, width)
    return Candidate(CHANNELS, plan if k is None else plan.with_experts_per_token(k))


def _narrowed(
    readings: Readings,
    method: str,
    shape: Shape,
    k: int | None,
    seed: int,
    progress: Progress | None,
) -> Plan:
    assert readings.channels is not None
    fewer = _prune(readings, method, shape.num_experts, k, seed, progress)
    return plan_channels(readings.channels, shape.expert_width, fewer)
