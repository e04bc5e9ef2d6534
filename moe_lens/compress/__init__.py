"""Smaller checkpoints: which experts are alike or idle, a plan, a folder, and what it cost.

    from moe_lens.compress import compress
    result = compress("demo", threshold=0.8, output="demo-small")
    result.verification.summary()

Step by step: `calibrate` runs text through a model and returns additive statistics; `plan_merge`
and `plan_prune` turn them into a `Plan`, which is JSON a person can read and edit; `write` applies
a plan to the checkpoint it was made from, so that stock ``mlx_lm.load`` opens the result; `verify`
compares both models on text that did not calibrate.
"""

from .calibration import calibrate
from .checkpoint import write
from .compression import STAGES, CompressionResult, compress
from .plan import ExpertGroup, LayerPlan, Plan
from .plan_json import read_plan
from .planning import NothingToMergeError, plan_merge, plan_prune
from .similarity import SCALE, Similarity, similarity
from .statistics import Calibration, LayerStatistics
from .verification import Verification
from .verify import verify

__all__ = [
    "SCALE",
    "STAGES",
    "Calibration",
    "CompressionResult",
    "ExpertGroup",
    "LayerPlan",
    "LayerStatistics",
    "NothingToMergeError",
    "Plan",
    "Similarity",
    "Verification",
    "calibrate",
    "compress",
    "plan_merge",
    "plan_prune",
    "read_plan",
    "similarity",
    "verify",
    "write",
]
