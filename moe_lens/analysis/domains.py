"""Do experts belong to domains? (OLMoE, arXiv 2409.02060, section 5.4, Eq. 7)

    found = domains(trace)                # domains are the labels of the prompts
    found.rate[0, 0, 5]                   # share of the first domain's tokens routed to expert 5
    found.information.value - found.information.shuffled

Three questions, from one expert to a whole layer:

* *Which expert prefers which domain?* Rates with intervals, and claims, as in `enrichment`.
* *How different are two domains?* Jensen-Shannon divergence of their distributions over experts.
* *How much does an expert tell of the domain?* Mutual information, each domain as likely.

The last two are above 0 on finite text even if domains mean nothing, the more so the fewer
prompts there are. Both are therefore given with what labels shuffled over the prompts give.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from moe_lens.errors import UsageError
from moe_lens.telling import Progress
from moe_lens.trace import Trace

from . import distributions
from .divergence import Divergence, divergences
from .enrichment import FEWEST_UNITS, enrichment
from .passes import fold
from .resampling import FALSE_SHARE
from .result import Result
from .table import Cell, Table
from .units import UnitCounts, Units

__all__ = ["Domains", "domains"]

Array = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Domains(Result):
    """How domains, the labels of the prompts, are routed.

    Attributes:
        definition: What the numbers are.
        layers: Model layer index of each MoE layer.
        domains: The labels, sorted.
        tokens: [domains] int64, tokens of each.
        prompts: [domains] int64, prompts of each.
        choices: Slots of a token that were counted, from the highest weight; None: all.
        uniform: [layers] float64, the rate of every expert if all were chosen equally often.
        rate: [domains, layers, R] float64, share of the domain's tokens routed to the expert.
        rate_low: [domains, layers, R] float64, lower end of its 95 % interval over prompts; NaN of
            a domain with one prompt.
        rate_high: [domains, layers, R] float64, upper end.
        lift: [domains, layers, R] float64, rate over its mean over the domains; NaN for an expert
            that was never chosen.
        low: [domains, layers, R] float64, lower end of the interval of the lift.
        high: [domains, layers, R] float64, upper end.
        q: [domains, layers, R] float64, false discoveries to be expected among all cells at least
            as clear; NaN on too little data.
        claimed: [domains, layers, R] bool, whether the expert may be said to prefer the domain.
        score: [domains, layers, R] float64, log2((rate + 1e-4) / (mean rate + 1e-4)).
        variation: [domains, layers] float64, total variation between the domain's distribution
            over experts and the mean of all domains'.
        pairs: [domains, domains, layers] float64, Jensen-Shannon divergence in bits.
        divergence: Its mean over pairs, by layer.
        information: Mutual information of domain and expert, by layer.
        seed: Of shuffles and intervals.
    """

    kind: ClassVar[str] = "domains"
    definition: str
    layers: tuple[int, ...]
    domains: tuple[str, ...]
    tokens: NDArray[np.int64]
    prompts: NDArray[np.int64]
    choices: int | None
    uniform: Array
    rate: Array
    rate_low: Array
    rate_high: Array
    lift: Array
    low: Array
    high: Array
    q: Array
    claimed: NDArray[np.bool_]
    score: Array
    variation: Array
    pairs: Array
    divergence: Divergence
    information: Divergence
    seed: int

    @property
    def title(self) -> str:
        return (
            f"Experts by domain, {int(self.tokens.sum()):,} tokens of {len(self.domains)} domains"
        )

    @property
    def used(self) -> int:
        """Experts of all layers that any of the domains chose."""
        return int((self.rate > 0).any(axis=0).sum())

    def top(self, domain: int, number: int) -> list[tuple[int, int]]:
        """(place of the layer, expert) of the clearest claims of a domain, clearest first."""
        clear = np.where(self.claimed[domain], self.low[domain], -np.inf)
        order = np.argsort(-clear, axis=None, kind="stable")[:number]
        found = [divmod(int(each), clear.shape[1]) for each in order]
        return [each for each in found if clear[each] > -np.inf]

    def findings(self) -> list[str]:
        """Where domains differ most, how many experts prefer one, and what is not claimed."""
        said = [self._difference(), self._preferences()]
        few = [
            f"{name} ({count})"
            for name, count in zip(self.domains, self.prompts, strict=True)
            if count < FEWEST_UNITS
        ]
        if few:
            said.append(
                f"Nothing is claimed of domains with fewer than {FEWEST_UNITS} prompts: "
                f"{', '.join(few)}."
            )
        return said

    def _difference(self) -> str:
        found = self.information
        place = int(np.argmax(found.value - found.shuffled))
        clear = int((found.q <= FALSE_SHARE).sum())
        said = (
            f"Layer {self.layers[place]} tells domains apart most: its experts carry "
            f"{found.value[place]:.3f} of {np.log2(len(self.domains)):.2f} bits about the domain, "
            f"{found.shuffled[place]:.3f} with labels shuffled"
        )
        if np.isnan(found.q).all():
            return f"{said}; that is too few prompts to say more."
        return f"{said}; {clear} of {len(self.layers)} layers are above chance."

    def _preferences(self) -> str:
        experts = int(self.claimed.any(axis=0).sum())
        if experts == 0:
            return f"No expert can be said to prefer a domain, at q up to {FALSE_SHARE}."
        best, place, expert = max(
            (
                (int(domain), *self.top(int(domain), 1)[0])
                for domain in np.flatnonzero(self.claimed.any((1, 2)))
            ),
            key=lambda cell: float(self.low[cell]),
        )
        cell = (best, place, expert)
        return (
            f"{experts} of {self.used} experts in use prefer a domain; of such claims at most "
            f"{100 * FALSE_SHARE:.0f} % are expected to be false. The clearest is "
            f"expert {expert} of layer {self.layers[place]} for {self.domains[best]}: it takes "
            f"{100 * self.rate[cell]:.1f} % of its tokens, {self.lift[cell]:.2f} times the mean of "
            f"the domains ({self.low[cell]:.2f} to {self.high[cell]:.2f})."
        )

    def tables(self) -> list[Table]:
        """Layers; the clearest experts of each domain; how far domains are from each other."""
        return [self._by_layer(), self._clearest(), self._apart()]

    def _by_layer(self) -> Table:
        rows: list[tuple[Cell, ...]] = [
            (
                layer,
                float(self.information.value[place]),
                float(self.information.shuffled[place]),
                float(self.divergence.value[place]),
                float(self.divergence.shuffled[place]),
                float(self.information.q[place]),
                int(self.claimed[:, place].any(axis=0).sum()),
                100 * float(self.rate[:, place].max()),
                100 * float(self.uniform[place]),
            )
            for place, layer in enumerate(self.layers)
        ]
        columns = (
            *("layer", "information", "shuffled", "divergence", "shuffled ", "q"),
            *("experts claimed", "highest rate, %", "uniform, %"),
        )
        return Table(columns, tuple(rows), "Domains apart, bits")

    def _clearest(self) -> Table:
        rows: list[tuple[Cell, ...]] = []
        for domain, name in enumerate(self.domains):
            for place, expert in self.top(domain, 3):
                cell = (domain, place, expert)
                interval = f"{100 * self.rate_low[cell]:.1f} to {100 * self.rate_high[cell]:.1f}"
                rows.append(
                    (
                        name,
                        self.layers[place],
                        expert,
                        100 * float(self.rate[cell]),
                        interval,
                        float(self.lift[cell]),
                        f"{self.low[cell]:.2f} to {self.high[cell]:.2f}",
                        float(self.score[cell]),
                        float(self.q[cell]),
                    )
                )
        columns = (
            *("domain", "layer", "expert", "rate, %", "interval", "lift", "interval of lift"),
            *("score", "q"),
        )
        return Table(columns, tuple(rows), "Clearest experts of each domain")

    def _apart(self) -> Table:
        """Divergence of pairs where the page has room for them, else of each domain."""
        mean = self.pairs.mean(axis=2)
        shown = len(self.domains) <= 10
        rows: list[tuple[Cell, ...]] = []
        for place, name in enumerate(self.domains):
            row = [float(each) for each in mean[place]] if shown else []
            cells: list[Cell] = [None if other == place else each for other, each in enumerate(row)]
            counted = (int(self.prompts[place]), int(self.tokens[place]))
            rows.append((name, *counted, float(self.variation[place].mean()), *cells))
        columns = ("domain", "prompts", "tokens", "total variation")
        names = self.domains if shown else ()
        title = "Mean over layers: total variation from the mean domain"
        return Table(
            (*columns, *names), tuple(rows), f"{title}, and divergence, bits" if shown else title
        )


def domains(
    trace: Trace,
    *,
    choices: int | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> Domains:
    """How the prompts of each label are routed, and how far that tells labels apart.

    Args:
        trace: A recorded run whose prompts have labels; those without take no part.
        choices: Count only the first so many slots of a token, those with the highest weights.
        seed: Of shuffles and intervals.
        progress: Called with tokens read and tokens in all.

    Raises:
        UsageError: Fewer than two labels have tokens, or there are not so many slots.
        CaptureError: The trace has no tokens.
    """
    if choices is not None and not 1 <= choices <= trace.slots:
        raise UsageError(
            f"a token of this run has {trace.slots} choices; choices can be 1 to {trace.slots}, "
            f"not {choices}"
        )
    units = Units.of(trace)
    names = tuple(name for place, name in enumerate(units.names) if units.prompts_of(place))
    if len(names) < 2:
        raise UsageError(
            f"domains are the labels of the prompts, and this text has {len(names)} of them with "
            'tokens; give JSONL with a "label" in each line, or a folder with a folder of text '
            "files for each domain"
        )
    seen = UnitCounts(units, len(trace.layers), trace.router_width, choices=choices)
    fold(trace, seen, progress=progress)
    table = enrichment(units, seen.counts, seed=seed)
    kept = np.array([units.prompts_of(place) > 0 for place in range(len(units.names))])
    one_hot = units.label[None] == np.flatnonzero(kept)[:, None]
    counts = np.tensordot(one_hot.astype(np.int64), seen.counts, axes=1)
    tokens = one_hot @ units.tokens
    p = distributions.shares(counts)
    divergence, information = divergences(units, seen.counts, seed=seed)
    uniform = counts.sum(axis=(0, 2)) / tokens.sum() / trace.router_width
    slots = "any slot" if choices is None else f"one of the first {choices} slots"
    return Domains(
        definition=(
            f"Rate: share of a domain's tokens routed to the expert, in {slots} (OLMoE, arXiv "
            "2409.02060, Eq. 7). Lift: rate / its mean over domains. Claimed: q at most "
            f"{FALSE_SHARE} (labels shuffled, Benjamini-Hochberg), 95 % interval (prompts drawn "
            "anew) above 1. Information: mutual, of domain and expert; divergence: mean "
            "Jensen-Shannon of pairs; bits, domains weigh alike."
        ),
        layers=trace.layers,
        domains=names,
        tokens=tokens,
        prompts=one_hot @ units.prompts,
        choices=choices,
        uniform=uniform,
        rate=table.rate[kept],
        rate_low=table.rate_low[kept],
        rate_high=table.rate_high[kept],
        lift=table.lift[kept],
        low=table.low[kept],
        high=table.high[kept],
        q=table.q[kept],
        claimed=table.claimed[kept],
        score=distributions.specialisation(table.rate[kept]),
        variation=distributions.total_variation(p),
        pairs=distributions.jensen_shannon(p),
        divergence=divergence,
        information=information,
        seed=seed,
    )
