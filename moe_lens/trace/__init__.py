"""The per-token record of a run: a folder on disk, and the same routes in memory."""

from .folder import Trace, is_trace
from .routes import NO_EXPERT, Routes, place_of
from .tokens import TokenTexts

__all__ = ["NO_EXPERT", "Routes", "TokenTexts", "Trace", "is_trace", "place_of"]
