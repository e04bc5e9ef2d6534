"""Trying plans before one is written: the best of all methods at one size."""
