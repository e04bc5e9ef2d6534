"""Were the experts of a layer copies of one network, or did they learn apart? A reading of cosines.

Where every expert is a common part plus a part of its own, unrelated to the others, the cosine of
two is the share of their squared norm that they have in common. So:

* mean over pairs of 0.5 or more: half of what experts are is the same in all of them: *copies*, as
  upcycling from a dense network leaves them (arXiv 2212.05055);
* half of the experts or more have a partner at 0.5 or more, but the mean is lower: *groups*;
* the same only once channels are put in order: *reordered* copies;
* the mean is above 0.05 and above what chance gives: *related*;
* otherwise *apart*: what experts have in common is less than a twentieth, or no more than chance.

Chance is five standard deviations of cosines with a scrambled expert (see `aligning`), pooled over
layers. It is a reading of the numbers and no proof: experts that were copies and trained for long
may look apart, and common training data makes experts related that never were copies.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .weights import ALIGNED, LYING, Chance, WeightReading

__all__ = ["SAYS", "Origins", "origins"]

COPIED, COMMON = 0.5, 0.05
DEVIATIONS = 5.0

SAYS = {
    "copies": "copies of one (upcycled)",
    "groups": "groups of near copies",
    "reordered": "copies with channels in another order",
    "related": "related, no copies",
    "apart": "trained apart",
}


@dataclass(frozen=True, eq=False)
class Origins:
    """What every layer looks like, and the numbers that say so, [layers] each.

    Attributes:
        words: Key of `SAYS` for each layer.
        mean: Mean cosine of all pairs, as they lie.
        highest: Highest cosine of a pair, as they lie.
        partnered: Share of experts with a partner at 0.5 or more, as they lie.
        partnered_aligned: The same with aligned channels, as far as pairs were aligned.
        chance: Cosine that five standard deviations of chance reach.
        chance_aligned: Highest cosine of a scrambled expert after aligning; NaN if none was.
    """

    words: tuple[str, ...]
    mean: NDArray[np.float64]
    highest: NDArray[np.float64]
    partnered: NDArray[np.float64]
    partnered_aligned: NDArray[np.float64]
    chance: float
    chance_aligned: float


def origins(reading: WeightReading) -> Origins:
    """Read `Origins` from cosines."""
    by_name = {each.name: each for each in reading.measures}
    lying, aligned = by_name[LYING], by_name[ALIGNED]
    places = range(len(lying.values))
    mean = lying.means().mean
    highest = np.array([np.nanmax(each) for each in lying.values])
    partnered = np.array([(lying.nearest(place)[1] >= COPIED).mean() for place in places])
    ordered = np.array([(aligned.nearest(place)[1] >= COPIED).mean() for place in places])
    chance = _chance(reading.chance)
    words = tuple(_word(*each, chance) for each in zip(mean, partnered, ordered, strict=True))
    most = reading.chance.aligned.max(initial=-np.inf)
    return Origins(
        words=words,
        mean=mean,
        highest=highest,
        partnered=partnered,
        partnered_aligned=ordered,
        chance=chance,
        chance_aligned=float(most) if np.isfinite(most) else np.nan,
    )


def _chance(chance: Chance) -> float:
    """Scrambled experts can only be wider apart in their cosines than vectors of noise."""
    measured = float(np.sqrt(np.square(chance.lying).mean())) if len(chance.lying) else 0.0
    return DEVIATIONS * max(measured, chance.spread)


def _word(mean: float, partnered: float, ordered: float, chance: float) -> str:
    if mean >= COPIED:
        return "copies"
    if partnered >= 0.5:
        return "groups"
    if ordered >= 0.5:
        return "reordered"
    return "related" if mean > max(COMMON, chance) else "apart"
