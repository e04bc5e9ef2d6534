"""When does training settle which experts a token goes to? (OLMoE, arXiv 2409.02060, Eq. 5)

    found = saturation([Trace.open(run) for run in runs], steps=[5000, 120000, 490000])
    found.final.value[0, 0]     # of the first checkpoint's choices in the first MoE layer, the
                                # share that the last checkpoint makes, too

Router saturation of checkpoint t is RS(t) = 1/N sum over tokens of |E(t) ∩ E(T)| / k, where E(t)
are the k experts that t chooses for a token and T is the last checkpoint. *First* asks the same of
the first choice alone (k = 1); *next* compares with the next checkpoint instead of the last one.
At random, |E(t) ∩ E(T)| / k is k / E, and 1 / E for the first choice.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from moe_lens.errors import CaptureError, UsageError
from moe_lens.kernels import NO_EXPERT
from moe_lens.telling import Progress
from moe_lens.trace import Routes, Trace

from .expert_sets import expert_sets, shared_experts
from .resampling import draws, interval
from .result import Result
from .table import Cell, Table
from .units import Units

__all__ = ["Overlap", "Saturation", "in_step", "saturation"]


@dataclass(frozen=True, eq=False)
class Overlap:
    """One question, for each checkpoint but the last, and each MoE layer.

    Attributes:
        value: [checkpoints - 1, layers] float64, share of the choices that are the same.
        low: [checkpoints - 1, layers] float64, lower end of the 95 % interval over prompts; NaN
            of a text with one prompt.
        high: [checkpoints - 1, layers] float64, upper end.
        random: [layers] float64, expectation if both chose at random.
    """

    value: NDArray[np.float64]
    low: NDArray[np.float64]
    high: NDArray[np.float64]
    random: NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Saturation(Result):
    """How much of the final routing each checkpoint has.

    Attributes:
        definition: What the numbers are.
        names: Name of each checkpoint, first to last.
        steps: [checkpoints] float64, the step of each.
        fraction: [checkpoints] float64, step / last step.
        layers: Model layer index of each MoE layer.
        tokens: Tokens compared.
        prompts: Prompts they come from.
        final: Against the last checkpoint, all choices.
        first: Against the last checkpoint, the first choice.
        next: Against the next checkpoint, all choices.
        next_first: Against the next checkpoint, the first choice.
        seed: Of the intervals.
    """

    kind: ClassVar[str] = "saturation"
    definition: str
    names: tuple[str, ...]
    steps: NDArray[np.float64]
    fraction: NDArray[np.float64]
    layers: tuple[int, ...]
    tokens: int
    prompts: int
    final: Overlap
    first: Overlap
    next: Overlap
    next_first: Overlap
    seed: int

    @property
    def title(self) -> str:
        return f"Router saturation, {len(self.names)} checkpoints, {self.tokens:,} tokens"

    def findings(self) -> list[str]:
        """The first checkpoint, the last before the end, and the layers that settle when."""
        random = 100 * float(self.final.random.mean())
        found = [
            f"{self.names[0]} ({100 * self.fraction[0]:.3g} % of the steps) makes "
            f"{100 * self.final.value[0].mean():.1f} % of the final choices "
            f"({_span(self.final.value[0])} by layer), {random:.1f} % at random."
        ]
        if len(self.names) > 2:
            found.append(
                f"{self.names[-2]} ({100 * self.fraction[-2]:.3g} %) makes "
                f"{100 * self.final.value[-1].mean():.1f} % ({_span(self.final.value[-1])})."
            )
        if len(self.layers) > 1:
            means = self.final.value.mean(axis=0)
            slow, fast = int(means.argmin()), int(means.argmax())
            apart = bool((self.final.high[:, slow] < self.final.low[:, fast]).all())
            found.append(
                f"Averaged over checkpoints layer {self.layers[slow]} settles last "
                f"({100 * means[slow]:.1f} %) and layer {self.layers[fast]} first "
                f"({100 * means[fast]:.1f} %); their intervals "
                + ("never touch." if apart else "overlap at some checkpoints.")
            )
        return found

    def tables(self) -> list[Table]:
        """Means over layers with their range; then each question by layer, a few layers of many."""
        return [
            self._overview(),
            self._by_layer(self.final, "All choices that are those of the last checkpoint, %"),
            self._by_layer(self.first, "First choice that is that of the last checkpoint, %"),
        ]

    def _overview(self) -> Table:
        asked = (self.final, self.first, self.next, self.next_first)
        rows: list[tuple[Cell, ...]] = [
            (
                name,
                float(self.steps[place]),
                float(100 * self.fraction[place]),
                *(float(100 * each.value[place].mean()) for each in asked),
            )
            for place, name in enumerate(self.names[:-1])
        ]
        rows.append(("random", None, None, *(float(100 * each.random.mean()) for each in asked)))
        columns = ("checkpoint", "step", "% of steps", "last", "last, first", "next", "next, first")
        return Table(columns, tuple(rows), "Same choices as the last and the next checkpoint, %")

    def _by_layer(self, asked: Overlap, title: str) -> Table:
        shown = _some(len(self.layers), 12)
        rows: list[tuple[Cell, ...]] = [
            (name, *(float(100 * asked.value[place, each]) for each in shown))
            for place, name in enumerate(self.names[:-1])
        ]
        rows.append(("random", *(float(100 * asked.random[each]) for each in shown)))
        of_all = "" if len(shown) == len(self.layers) else f" ({len(shown)} of {len(self.layers)})"
        columns = ("checkpoint", *(f"layer {self.layers[each]}" for each in shown))
        return Table(columns, tuple(rows), title + of_all)


class _Shared:
    """Sums over the tokens of each unit: choices that two checkpoints share, and their number."""

    def __init__(self, units: Units, layers: int) -> None:
        self.units = units
        # All choices and first choice; both of one checkpoint and those of the other.
        self.same = np.zeros((2, len(units), layers))
        self.chosen = np.zeros((2, len(units), layers))

    def add(self, routes: Routes, final: Routes) -> None:
        unit = self.units.of_rows(final)
        number = len(self.units)
        for place, (ours, theirs) in enumerate(
            zip(routes.expert_ids, final.expert_ids, strict=True)
        ):
            sets = (expert_sets(ids, final.router_width) for ids in (ours, theirs))
            counted = (
                (0, shared_experts(*sets), (theirs != NO_EXPERT).sum(axis=1)),
                (1, ours[:, 0] == theirs[:, 0], theirs[:, 0] != NO_EXPERT),
            )
            for asked, same, chosen in counted:
                self.same[asked, :, place] += np.bincount(unit, same, number)
                self.chosen[asked, :, place] += np.bincount(unit, chosen, number)


def saturation(
    traces: Sequence[Trace],
    *,
    names: Sequence[str] | None = None,
    steps: Sequence[float] | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> Saturation:
    """Compare the routing of checkpoints of one model on the same tokens.

    Every run but the last is read twice, and the last one once for each other; three shards are
    in memory at a time.

    Args:
        traces: Runs of the same text, first checkpoint to last.
        names: Of the checkpoints; by default those of their models.
        steps: Training steps; by default 1, 2, ...
        seed: Of the intervals.
        progress: Called with tokens compared and tokens in all.

    Raises:
        UsageError: Fewer than two runs, or runs of other text, other tokens or another model.
        CaptureError: The runs have no tokens.
    """
    if len(traces) < 2:
        raise UsageError(f"{len(traces)} run cannot be compared; give two or more checkpoints")
    names = [str(each.model["name"]) for each in traces] if names is None else list(names)
    numbers = np.arange(1.0, len(traces) + 1) if steps is None else np.array(steps, np.float64)
    last = traces[-1]
    for trace, name in zip(traces, names, strict=True):
        _check_same(trace, name, last, names[-1])
    if last.num_tokens == 0:
        raise CaptureError(f"the trace {last.path} has no tokens; record it again")
    units, layers = Units.of(last), len(last.layers)
    sums = [[_Shared(units, layers) for _ in range(2)] for _ in traces[:-1]]
    done, total = 0, last.num_tokens * len(sums)
    for place, (to_last, to_next) in enumerate(sums):
        for parts in in_step([traces[place], traces[place + 1], last], names[place]):
            to_next.add(parts[0], parts[1])
            to_last.add(parts[0], parts[2])
            done += len(parts[0])
            if progress is not None:
                progress(done, total)
    asked = [
        _overlap([each[against] for each in sums], which, last.router_width, seed)
        for against, which in ((0, 0), (0, 1), (1, 0), (1, 1))
    ]
    k = asked[0].random * last.router_width
    return Saturation(
        definition=(
            "Share of the experts chosen for a token that another checkpoint chooses for it, too: "
            "mean over tokens of |E(t) ∩ E(T)| / k, all choices or the first one; against the last "
            f"checkpoint or the next. Random: k / {last.router_width}, k = "
            f"{', '.join(sorted({f'{each:.3g}' for each in k}))}; first 1 / {last.router_width}. "
            "Intervals: 95 %, prompts drawn anew by label. OLMoE, arXiv 2409.02060, Eq. 5."
        ),
        names=tuple(names),
        steps=numbers,
        fraction=numbers / numbers[-1] if numbers[-1] else np.full(len(numbers), np.nan),
        layers=last.layers,
        tokens=last.num_tokens,
        prompts=int((last.prompt_tokens > 0).sum()),
        final=asked[0],
        first=asked[1],
        next=asked[2],
        next_first=asked[3],
        seed=seed,
    )


def in_step(traces: Sequence[Trace], name: str = "a run") -> Iterator[list[Routes]]:
    """The same prompts of every trace, part by part, however each of them is cut into shards.

    One shard of each trace is in memory. A trace may be given more than once.

    Args:
        traces: With equal numbers of tokens in each prompt.
        name: Of the first, for the message.

    Raises:
        UsageError: A prompt has other tokens in one of them.
    """
    readers = [trace.shards() for trace in traces]
    held: list[Routes | None] = [None] * len(traces)
    while True:
        for place, reader in enumerate(readers):
            part = held[place]
            if part is None or not len(part):
                held[place] = next(reader, None)
        parts = [part for part in held if part is not None]
        if len(parts) < len(traces):
            return
        stop = min(int(part.prompt[-1]) for part in parts)
        cuts = [int(np.searchsorted(part.prompt, stop, side="right")) for part in parts]
        here = [part.rows(0, cut) for part, cut in zip(parts, cuts, strict=True)]
        for other in here[1:]:
            if not np.array_equal(here[0].token_ids, other.token_ids):
                raise UsageError(
                    f"{name} and another checkpoint read other tokens, so their choices cannot be "
                    "compared; record both with the same tokenizer"
                )
        yield here
        held = [part.rows(cut, len(part)) for part, cut in zip(parts, cuts, strict=True)]


def _check_same(trace: Trace, name: str, last: Trace, last_name: str) -> None:
    """Raise UsageError unless both are runs of one architecture on one text."""
    shapes = [(each.layers, each.router_width, each.slots) for each in (trace, last)]
    if shapes[0] != shapes[1]:
        said = [
            f"{name_} has {len(layers)} MoE layers of {width} experts, {k} per token"
            for name_, (layers, width, k) in zip((name, last_name), shapes, strict=True)
        ]
        raise UsageError(f"{' and '.join(said)}: they are no checkpoints of one model")
    if trace.prompt_sha256 != last.prompt_sha256:
        raise UsageError(
            f"{name} and {last_name} were recorded on other prompts; record both on the same text"
        )
    if not np.array_equal(trace.prompt_tokens, last.prompt_tokens):
        raise UsageError(
            f"{name} and {last_name} read prompts of other lengths; record both with the same "
            "tokenizer and --sequence-length"
        )


def _overlap(sums: Sequence[_Shared], which: int, width: int, seed: int) -> Overlap:
    units = sums[0].units
    same = np.stack([each.same[which] for each in sums])
    chosen = np.stack([each.chosen[which] for each in sums])
    value = same.sum(axis=1) / chosen.sum(axis=1)
    low, high = np.full_like(value, np.nan), np.full_like(value, np.nan)
    if len(units) > 1:
        drawn = draws(units.label, seed=seed)
        for place in range(len(sums)):
            sizes = np.maximum(drawn @ chosen[place], 1)
            low[place], high[place] = interval(drawn @ same[place] / sizes, units=len(units))
    # The mean number of experts that the last checkpoint chooses of all; 1 for the first choice.
    k = chosen[-1].sum(axis=0) / units.tokens.sum()
    return Overlap(value, low, high, k / width)


def _some(number: int, most: int) -> list[int]:
    """Places of evenly spread layers, the first and the last among them."""
    return sorted({int(place) for place in np.linspace(0, number - 1, min(number, most)).round()})


def _span(values: NDArray[np.float64]) -> str:
    return f"{100 * values.min():.1f} to {100 * values.max():.1f} %"
