"""Models larger than memory: every layer's weights are read when it runs, and let go of after."""

from .layer_stream import LayerStream, Passed
from .waves import Batch, plan_waves, wave_tokens

__all__ = ["Batch", "LayerStream", "Passed", "plan_waves", "wave_tokens"]
