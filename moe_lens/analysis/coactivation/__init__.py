"""Which experts are chosen together, how much more than their loads explain, and in which groups.

    found = coactivation(trace)
    found.share[0, 4, 6]        # of the tokens that chose expert 4, those that chose 6 as well
    found.lift[0, 4, 6]         # against what chance gives experts with these loads
    found.strongest(10)

The share is that of OLMoE (Muennighoff et al. 2024, arXiv 2409.02060, Eq. 6): N_ij / N_i. Its lift
divides the tokens that chose both by those expected of k distinct experts drawn with the layer's
loads (`chance`). How sure a lift is comes from runs of prompts (`certainty`).
"""

from .chance import chance_pairs
from .communities import Communities
from .find import coactivation
from .graph import coactivation_graph
from .result import Coactivation, Pair

__all__ = [
    "Coactivation",
    "Communities",
    "Pair",
    "chance_pairs",
    "coactivation",
    "coactivation_graph",
]
