"""Do all experts work? How evenly a router loads them, and how sure it is of its choice."""

from .balance import balance
from .result import Balance, PerLayer

__all__ = ["Balance", "PerLayer", "balance"]
