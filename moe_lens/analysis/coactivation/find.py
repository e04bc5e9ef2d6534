"""`coactivation`: counts pairs, compares them with chance, groups them."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from moe_lens.analysis.passes import fold
from moe_lens.analysis.resampling import FALSE_SHARE, false_discovery
from moe_lens.errors import CaptureError, UsageError
from moe_lens.profile import Profile
from moe_lens.telling import Progress
from moe_lens.trace import Trace

from .certainty import certainty
from .chance import chance_pairs
from .communities import communities, inseparable
from .order import partner_graph, side_by_side
from .pair_counts import PairCounts, RunProducts
from .ratio import ratio_of
from .result import Coactivation

__all__ = ["CLOSE", "coactivation"]

CLOSE = 0.5
"""Two experts are nearly inseparable if each is chosen with the other this often or more."""


def coactivation(
    source: Trace | Profile,
    *,
    adjacent_ranks: bool = False,
    seed: int = 0,
    progress: Progress | None = None,
) -> Coactivation:
    """Which experts are chosen together.

    Args:
        source: A recorded run; or a profile, which has the counts but says nothing of how sure
            they are, so nothing is claimed of it.
        adjacent_ranks: Let the share count pairs of neighbouring ranks only, as the published
            script of OLMoE does; lift and claims stay those of all pairs.
        seed: Of the communities.
        progress: Called with tokens read and tokens in all.

    Raises:
        UsageError: Tokens choose one expert, so there are no pairs; or adjacent ranks of a profile.
        CaptureError: There are no tokens.
    """
    adjacent: NDArray[np.int64] | None = None
    products: RunProducts | None = None
    runs = 0
    if isinstance(source, Trace):
        seen = PairCounts(source, adjacent_ranks=adjacent_ranks)
        fold(source, seen, progress=progress)
        seen.finish()
        together, tokens = seen.together, seen.tokens
        adjacent, products, runs = seen.adjacent, seen.products, seen.runs
    else:
        if adjacent_ranks:
            raise UsageError("a profile does not know ranks; give the trace for adjacent ranks")
        if source.num_tokens == 0:
            raise CaptureError("the profile has no tokens; record it again")
        together, tokens = source.coactivation, source.num_tokens
    counts = np.diagonal(together, axis1=1, axis2=2)
    k = counts.sum(axis=1) / tokens
    if (k <= 1).all():
        raise UsageError(
            "every token chooses one expert, so no two are chosen together; locality and balance "
            "say what there is to know of such a model"
        )
    chance = chance_pairs(counts / tokens)
    error, p = certainty(together, tokens, chance, products, runs)
    q = _symmetric(false_discovery(np.where(np.tri(p.shape[1], dtype=bool), np.nan, p)))
    lift = ratio_of(together, tokens * chance)
    claimed = (q <= FALSE_SHARE) & (lift > 1)
    share = ratio_of(together, counts[:, :, None])
    close = claimed & (np.minimum(share, share.transpose(0, 2, 1)) >= CLOSE)
    graphs = [partner_graph(*each) for each in zip(lift, claimed, strict=True)]
    groups = communities(np.stack(graphs), seed=seed)
    return Coactivation(
        definition=_definition(adjacent_ranks),
        layers=source.layers,
        tokens=tokens,
        runs=runs,
        k=k,
        together=together,
        adjacent=adjacent,
        chance=chance,
        error=error,
        q=q,
        order=np.stack([side_by_side(*each) for each in zip(lift, groups, strict=True)]),
        groups=groups,
        inseparable=tuple(inseparable(each) for each in close),
        seed=seed,
    )


def _definition(adjacent_ranks: bool) -> str:
    asked = (
        "those that chose j in the next higher or lower rank (the published script of OLMoE)"
        if adjacent_ranks
        else "those that chose j, too"
    )
    return (
        f"Share: of the tokens that chose expert i, {asked}; OLMoE, arXiv 2409.02060, Eq. 6. Lift: "
        "tokens that chose both, over those expected if k distinct experts were drawn with these "
        "loads and nothing else (conditional Bernoulli sampling). Intervals: 95 %, from runs of "
        "prompts. q: two-sided, Benjamini and Hochberg over all pairs."
    )


def _symmetric(upper: NDArray[np.float64]) -> NDArray[np.float64]:
    """A table from its part above the diagonal, NaN elsewhere."""
    return np.where(np.isnan(upper), upper.transpose(0, 2, 1), upper)
