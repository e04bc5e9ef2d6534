"""Running a model over text and keeping its routing: as a trace, a profile or routes."""

from .record import Progress, record_profile, record_prompt, record_trace

__all__ = ["Progress", "record_profile", "record_prompt", "record_trace"]
