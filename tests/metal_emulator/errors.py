"""What the emulator raises."""

from __future__ import annotations


class NoCompilerError(RuntimeError):
    """No C++ compiler was found; the message says how to get one."""


class KernelTextError(ValueError):
    """The text of a kernel is not valid: a compile error, or a word the language has not."""


class KernelFaultError(RuntimeError):
    """A launch went wrong: divergence, out of bounds, an unwritten output, a crash."""
