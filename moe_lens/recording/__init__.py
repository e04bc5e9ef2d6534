"""Running a model over text and keeping its routing: as a trace, a profile or routes."""

from .record import record_profile, record_prompt, record_trace

__all__ = ["record_profile", "record_prompt", "record_trace"]
