"""Measures of load and sureness of a trace or profile, with intervals and what chance would give.

    found = balance(trace)
    found.share[0, 2]                    # part of the slots that each expert of the third layer got
    found.gini.value[0], found.gini.even[0]

With x_e the slots that expert e of E got (0 if it was never chosen):

* coefficient of variation: standard deviation of x (divided by E) / mean of x;
* Gini: sum over ranks i = 1..E of (2 i - E - 1) x_(i) / (E sum x), x ascending;
* entropy: - sum p_e log p_e / log E with p = x / sum x;
* MaxVio: (max x - mean x) / mean x (arXiv 2408.15664).

None is 0 (or 1) for a perfectly fair router, because counts of finite text are uneven by chance:
`even` is the router that chooses at random, on as many tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moe_lens.analysis import distributions
from moe_lens.analysis.resampling import RESAMPLES, draws, interval, spread
from moe_lens.profile import Profile
from moe_lens.telling import Progress
from moe_lens.trace import Trace

from .even import even_dead, even_measures
from .groups import Group, of_profile, of_trace, why_no_logits
from .result import HOT, Balance, PerLayer

__all__ = ["balance"]

Array = NDArray[np.float64]

_DRAWN = 60_000_000
"""Loads drawn in all, as far as `_FEWEST_DRAWS` allows."""

_FEWEST_DRAWS = 300

NOT_IN_PROFILE = "a profile holds no router logits; give a trace that was recorded with them"

UNITS = {
    "cv": "standard deviation over mean",
    "gini": "0 even, (E - 1) / E one expert",
    "entropy": "part of log E",
    "max_violation": "mean loads",
    "weight_mass": "sum of weights",
    "weight_margin": "weight",
    "router_entropy": "nats",
    "softmax_mass": "probability",
    "logit_margin": "nats",
    "load_loss": "1 even",
}


def balance(source: Trace | Profile, *, seed: int = 0, progress: Progress | None = None) -> Balance:
    """How evenly experts are loaded, over all prompts and by label, and how sure the router is.

    Without router logits a trace does not tell how many experts each layer has: where a model was
    pruned to a different number in each, record them, or the missing ones count as dead.

    Args:
        source: A recorded run; or a profile, which has intervals for all prompts together only,
            and no router logits. All experts of a profile count as experts with weights.
        seed: Of draws and simulations.
        progress: Called with tokens read and tokens in all.

    Raises:
        CaptureError: There are no tokens.
    """
    width, layers = source.router_width, len(source.layers)
    exists = np.ones((layers, width), dtype=bool)
    real = width
    missing: str | None = NOT_IN_PROFILE
    if isinstance(source, Profile):
        groups = of_profile(source)
    else:
        groups, seen = of_trace(source, progress)
        missing = None if seen is not None else why_no_logits(source)
        exists = exists if seen is None else seen.exists
        real = int(source.header["num_experts"])
    experts = np.clip(exists.sum(axis=1) - (width - real), 1, real)
    rounds = int(np.clip(_DRAWN // (len(groups) * layers * width), _FEWEST_DRAWS, RESAMPLES))
    tables = [_measured(each, experts, width - real, rounds, seed) for each in groups]
    share = np.stack([each.share for each in tables])
    hot = np.stack([each.low for each in tables]) * experts[:, None] > HOT

    def per_layer(name: str) -> PerLayer | None:
        if any(name not in each.values for each in tables):
            return None
        parts = [np.stack([each.values[name][kind] for each in tables]) for kind in range(4)]
        return PerLayer(UNITS[name], *parts)

    def there(name: str) -> PerLayer:
        found = per_layer(name)
        assert found is not None
        return found

    return Balance(
        definition=(
            "Load: slots (choices of tokens) of an expert. Gini: sum of (2 i - E - 1) x_i / (E sum "
            "x), loads x ascending, zeros included. CV: standard deviation / mean. MaxVio: (max - "
            "mean) / mean (arXiv 2408.15664). At random: k distinct experts drawn evenly for as "
            f"many tokens, simulated. Hot: share above {HOT:g} / E with its 95 % interval (prompts "
            "drawn anew). Softmax: of the router logits, whatever the router scores by."
        ),
        layers=source.layers,
        groups=tuple(each.name for each in groups),
        tokens=np.array([int(each.tokens.sum()) for each in groups]),
        prompts=np.array([each.prompts for each in groups]),
        experts=experts,
        slots=tables[0].slots,
        share=share[..., :real],
        share_low=np.stack([each.low for each in tables])[..., :real],
        share_high=np.stack([each.high for each in tables])[..., :real],
        cv=there("cv"),
        gini=there("gini"),
        entropy=there("entropy"),
        max_violation=there("max_violation"),
        dead=np.stack([(each.share == 0).sum(axis=1) for each in tables]),
        dead_even=np.stack([each.dead_even for each in tables]),
        hot=hot.sum(axis=2),
        hot_experts=tuple(
            (source.layers[place], int(expert)) for place, expert in np.argwhere(hot[0])
        ),
        zero_share=np.stack([each.zero_share for each in tables]),
        weight_mass=there("weight_mass"),
        weight_margin=per_layer("weight_margin"),
        router_entropy=per_layer("router_entropy"),
        softmax_mass=per_layer("softmax_mass"),
        logit_margin=per_layer("logit_margin"),
        load_loss=per_layer("load_loss"),
        missing=missing,
        seed=seed,
    )


@dataclass(frozen=True, eq=False)
class _Measured:
    """One group: shares [layers, R] with interval, and (value, low, high, even) by name."""

    share: Array
    low: Array
    high: Array
    slots: Array
    zero_share: Array
    dead_even: Array
    values: dict[str, tuple[Array, Array, Array, Array]]


def _measured(
    group: Group, experts: NDArray[np.int64], zeros: int, rounds: int, seed: int
) -> _Measured:
    units, layers, width = group.counts.shape
    counts, tokens = group.counts.sum(axis=0), int(group.tokens.sum())
    # Single precision for the many products: a relative error of 1e-7 is nothing to an interval.
    drawn = None
    if units > 1:
        drawn = draws(group.stratum, seed=seed, resamples=rounds).astype(np.float32)
    share, low, high = (np.full((layers, width), np.nan) for _ in range(3))
    rows: dict[str, list[tuple[float, ...]]] = {}
    real = np.array([counts[place, :number].sum() for place, number in enumerate(experts)])
    slots = real / tokens
    for place, number in enumerate(experts):
        loads = counts[place, :number]
        share[place, :number] = distributions.shares(loads)
        k = int(np.clip(round(slots[place]), 1, number))
        even = even_measures(tokens, k, int(number), seed)
        resampled = None
        if drawn is not None:
            resampled = drawn @ group.counts[:, place, :number].astype(np.float32)
        if resampled is not None:
            ends = interval(distributions.shares(resampled), units=units)
            low[place, :number], high[place, :number] = ends
        for name, limits in _LIMITS.items():
            value = _MEASURES[name](loads)
            again = None if resampled is None else _MEASURES[name](resampled)
            rows.setdefault(name, []).append(
                (*_with_interval(value, again, units, limits), even[name])
            )
        if group.probability is not None:
            p = group.probability[:, place, :number]
            value = _load_loss(loads, p.sum(axis=0))
            again = None
            if drawn is not None and resampled is not None:
                again = _load_loss(resampled, drawn @ p.astype(np.float32))
            found = _with_interval(value, again, units, (0.0, np.inf))
            rows.setdefault("load_loss", []).append((*found, 1.0))
    values = {name: _columns(found) for name, found in rows.items()}
    nothing = np.full(layers, np.nan)
    most = {
        "router_entropy": np.log(experts + zeros),
        "softmax_mass": counts.sum(axis=1) / tokens / (experts + zeros),
    }
    for name, table in group.sums.items():
        mean = table.sum(axis=0) / tokens
        ends = (nothing, nothing)
        if drawn is not None:
            again = (drawn @ table) / (drawn @ group.tokens.astype(np.float64))[:, None]
            ends = interval(again, units=units)
        values[name] = (mean, *ends, most.get(name, nothing))
    values |= {name: (mean, nothing, nothing, nothing) for name, mean in group.means.items()}
    return _Measured(
        share=share,
        low=low,
        high=high,
        slots=slots,
        zero_share=1 - real / np.maximum(1, counts.sum(axis=1)),
        dead_even=np.array(
            [even_dead(tokens, slots[place], int(each)) for place, each in enumerate(experts)]
        ),
        values=values,
    )


def _entropy(loads: NDArray[np.number]) -> Array:
    experts = loads.shape[-1]
    if experts == 1:
        return np.ones(loads.shape[:-1])
    return distributions.entropy(distributions.shares(loads)) / np.log2(experts)


_MEASURES = {
    "cv": distributions.variation,
    "gini": distributions.gini,
    "entropy": _entropy,
    "max_violation": distributions.max_violation,
}
_LIMITS = {
    "cv": (0.0, np.inf),
    "gini": (0.0, 1.0),
    "entropy": (0.0, 1.0),
    "max_violation": (0.0, np.inf),
}


def _load_loss(loads: NDArray[np.number], probability: NDArray[np.floating]) -> Array:
    """E x sum f P; f the share of the slots, P that of the softmax, of each expert."""
    both = distributions.shares(loads) * distributions.shares(probability)
    return loads.shape[-1] * both.sum(axis=-1)


def _with_interval(
    value: Array, drawn: Array | None, units: int, limits: tuple[float, float]
) -> tuple[float, float, float]:
    if drawn is None:
        return float(value), np.nan, np.nan
    low, high = spread(value, drawn, units=units)
    return float(value), float(np.clip(low, *limits)), float(np.clip(high, *limits))


def _columns(rows: list[tuple[float, ...]]) -> tuple[Array, Array, Array, Array]:
    value, low, high, even = np.array(rows).T
    return value, low, high, even
