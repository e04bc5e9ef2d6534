"""The parts of a compression, as its progress names them, and what each of them counts."""

from __future__ import annotations

from dataclasses import replace

from moe_lens.telling import LOADING, Stage

CALIBRATING = Stage("calibrating", "tokens")
CALIBRATING_CHANNELS = Stage("calibrating channels", "tokens")
SAMPLING = Stage("sampling layers", "tokens")
PLANNING = Stage("planning", "layers")
TRYING = Stage("trying", "tokens")
MEASURING_LAYERS = Stage("measuring layers", "measurements")
CHOOSING_K = Stage("choosing experts per token", "tokens")
REPAIRING = Stage("repairing the router", "steps")
WRITING = Stage("writing", "bytes")
COMPARING = Stage("comparing the export", "bytes")
VERIFYING = Stage("verifying", "tokens")
REPORTING = Stage("reporting")

STAGES = (
    LOADING,
    CALIBRATING,
    CALIBRATING_CHANNELS,
    SAMPLING,
    PLANNING,
    TRYING,
    MEASURING_LAYERS,
    CHOOSING_K,
    REPAIRING,
    WRITING,
    COMPARING,
    VERIFYING,
    REPORTING,
)
"""What the progress of `compress` names, about in this order; not each of them is always there,
and `TRYING` comes once for every method that is tried."""


def trying(method: str) -> Stage:
    """The trial of one method."""
    return replace(TRYING, of=method)
