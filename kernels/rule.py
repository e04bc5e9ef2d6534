"""The rule of a router: how one block turns logits into expert ids and expert weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import mlx.core as mx

Score = Literal[
    "identity",
    "softmax",
    "softmax_precise",
    "softmax_float32",
    "sigmoid",
    "sigmoid_float32",
    "sqrt_softplus_float32",
]
"""How logits become scores.

``softmax`` keeps the dtype of the logits, ``softmax_precise`` accumulates in float32 and
returns that dtype, ``softmax_float32`` casts first and returns float32; the sigmoids alike.
The three differ in their last bits, which is enough to choose another expert at a tie.
"""

Side = Literal["low", "high", "sorted"]
"""Which partition picks the k best, and so which of two equal scores wins and in which slot.

``low`` is ``argpartition(-scores, k - 1)[:k]``, ``high`` is ``argpartition(scores, -k)[-k:]``
and ``sorted`` is ``argsort(-scores)[:k]``.
"""


@dataclass(frozen=True)
class Groups:
    """Group-limited routing: only the experts of the best groups may be chosen.

    Experts ``0 .. E-1`` form `count` groups of ``E / count`` neighbours. A group's score is the
    sum of its two best selection scores (``"top2"``, DeepSeek-V3, arXiv:2412.19437, section
    2.1.2) or its best one (``"max"``, DeepSeek-V2, arXiv:2405.04434). The selection scores of
    all but the best `keep` groups are replaced by `fill` before the top-k.
    """

    count: int
    keep: int
    score: Literal["top2", "max"] = "top2"
    fill: float = 0.0
    zero_scores: bool = False
    """Whether an expert of a dropped group that is chosen all the same has weight 0."""


@dataclass(frozen=True)
class Rule:
    """How one block routes, as data. E is the width of the router.

    The order is: `multiplier`, `softcap`, `temperature` on the logits; `score`; `selection_bias`
    and `groups` for the selection only; the k best by `side`; the *unbiased* scores of the
    chosen, through `score_chosen` where set; `normalise`; `scale`; `per_expert_scale`; `cast`.
    """

    score: Score
    score_chosen: Score | None = None
    """Applied to the scores of the chosen alone (top-k first, softmax after: Mixtral)."""
    multiplier: float = 1.0
    softcap: float = 0.0
    """``softcap * tanh(logits / softcap)`` in float32; 0 is none."""
    temperature: float = 1.0
    selection_bias: mx.array | None = None
    """[E], added to the scores for the selection only (auxiliary-loss-free balancing)."""
    bias_dtype: Literal["promote", "scores"] = "promote"
    """Whether scores plus bias take the wider dtype, or the bias is cast to the scores' dtype."""
    groups: Groups | None = None
    side: Side = "low"
    normalise: Literal["no", "sum", "sum_floor", "l1"] = "no"
    """``sum`` divides by the sum plus `epsilon`, ``sum_floor`` by the larger of the sum and
    `epsilon`, ``l1`` by the L1 norm."""
    epsilon: float = 0.0
    normalise_from_k: int = 1
    """The smallest k that is normalised (DeepSeek leaves k = 1 alone)."""
    scale: float | None = None
    per_expert_scale: mx.array | None = None
    """[E], times the weight of each chosen expert (Gemma 4)."""
    cast: Literal["no", "logits", "input"] = "no"
    """The dtype of the weights: as computed, that of the logits, or that of the block's input."""

    def describe(self) -> str:
        """One line for people, such as ``sigmoid + selection bias -> top-k -> / sum -> x 2.5``."""
        steps = []
        if self.multiplier != 1.0:
            steps.append(f"logits x {self.multiplier:g}")
        if self.softcap > 0:
            steps.append(f"softcap {self.softcap:g}")
        if self.temperature != 1.0:
            steps.append(f"/ {self.temperature:g}")
        names = {"identity": "logits", "sqrt_softplus_float32": "sqrt(softplus)"}
        score = names.get(self.score, self.score.split("_")[0])
        steps.append(score + (" + selection bias" if self.selection_bias is not None else ""))
        if self.groups is not None:
            steps.append(f"best {self.groups.keep} of {self.groups.count} groups")
        steps.append("top-k")
        if self.score_chosen is not None:
            steps.append(self.score_chosen.split("_")[0])
        if self.normalise != "no":
            steps.append("/ sum")
        if self.scale is not None and self.scale != 1.0:
            steps.append(f"x {self.scale:g}")
        if self.per_expert_scale is not None:
            steps.append("x per-expert scale")
        return " -> ".join(steps)
