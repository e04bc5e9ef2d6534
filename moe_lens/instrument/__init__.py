"""Watching a loaded model: its seams attached, its forwards handed to whoever keeps them."""

from .capture import Capture, LayerCapture
from .forward import Forward, Sink
from .instrument import Instrument, NextForward

__all__ = ["Capture", "Forward", "Instrument", "LayerCapture", "NextForward", "Sink"]
