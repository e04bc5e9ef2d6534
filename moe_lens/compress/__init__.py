"""Smaller checkpoints: which experts are alike or idle, a plan, a folder, and what it cost.

    from moe_lens.compress import compress
    result = compress("demo", threshold=0.8, output="demo-small")
    result.verification.summary()

Step by step: `calibrate` runs text through a model and returns additive statistics; `plan_merge`
and `plan_prune` turn them into a `Plan`, which is JSON a person can read and edit; `write` applies
a plan to the checkpoint it was made from, so that stock ``mlx_lm.load`` opens the result; `verify`
compares both models on text that did not calibrate.
"""

from .applying import write
from .calibration.calibration import calibrate
from .calibration.channel_calibration import calibrate_channels
from .checkpoint.expert_width import width_for
from .checkpoint.in_memory import in_memory
from .choice.frontier import Frontier, frontier
from .choice.simulate import simulated
from .compression import compress
from .compression_result import CompressionResult
from .merging.planning import NothingToMergeError, plan_merge
from .plan.plan import ExpertGroup, LayerPlan, Plan
from .plan.plan_json import read_plan
from .pruning.channels import plan_channels
from .pruning.pruning import plan_every_prune, plan_prune
from .report.upload import upload
from .stages import STAGES
from .statistics.channel_statistics import ChannelCalibration, ChannelStatistics
from .statistics.similarity import SCALE, Similarity, similarity
from .statistics.statistics import Calibration, LayerStatistics
from .verification.verification import LossTooLargeError, Verification
from .verification.verify import verify

__all__ = [
    "SCALE",
    "STAGES",
    "Calibration",
    "ChannelCalibration",
    "ChannelStatistics",
    "CompressionResult",
    "ExpertGroup",
    "Frontier",
    "LayerPlan",
    "LayerStatistics",
    "LossTooLargeError",
    "NothingToMergeError",
    "Plan",
    "Similarity",
    "Verification",
    "calibrate",
    "calibrate_channels",
    "compress",
    "frontier",
    "in_memory",
    "plan_channels",
    "plan_every_prune",
    "plan_merge",
    "plan_prune",
    "read_plan",
    "similarity",
    "simulated",
    "upload",
    "verify",
    "width_for",
    "write",
]
