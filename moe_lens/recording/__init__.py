"""Running a model over text and keeping its routing: as a trace, a profile or routes.

Beside it, what a trace does not hold: predictions, and the effects of experts.
"""

from .effects import ExpertEffects, record_effects
from .predictions import record_predictions
from .record import record_profile, record_prompt, record_trace

__all__ = [
    "ExpertEffects",
    "record_effects",
    "record_predictions",
    "record_profile",
    "record_prompt",
    "record_trace",
]
