"""Additive sums of routing: how they are counted, added and stored."""

from .profile import OutputSums, Profile

__all__ = ["OutputSums", "Profile"]
