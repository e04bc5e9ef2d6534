"""moe-lens: see, change and compress the routing of mixture-of-experts models on MLX."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from .async_router import AsyncExpertRouter
    from .corpus import Corpus, Prompt, read_corpus
    from .errors import CaptureError, MoeLensError, UnsupportedModelError, UsageError
    from .families import VALUES, all_supported, support
    from .generation import Generation
    from .info import ModelInfo
    from .instrument import Capture, Forward, LayerCapture, Sink
    from .override import Override
    from .profile import Profile
    from .router import ExpertRouter
    from .trace import NO_EXPERT, Trace

_HOMES = {
    "AsyncExpertRouter": "async_router",
    "Capture": "instrument",
    "LayerCapture": "instrument",
    "Corpus": "corpus",
    "Prompt": "corpus",
    "read_corpus": "corpus",
    "CaptureError": "errors",
    "MoeLensError": "errors",
    "UnsupportedModelError": "errors",
    "UsageError": "errors",
    "VALUES": "families",
    "all_supported": "families",
    "support": "families",
    "NO_EXPERT": "trace",
    "Forward": "instrument",
    "Sink": "instrument",
    "ModelInfo": "info",
    "Override": "override",
    "Profile": "profile",
    "ExpertRouter": "router",
    "Generation": "generation",
    "Trace": "trace",
}

__all__ = [
    "NO_EXPERT",
    "VALUES",
    "AsyncExpertRouter",
    "Capture",
    "CaptureError",
    "Corpus",
    "ExpertRouter",
    "Forward",
    "Generation",
    "LayerCapture",
    "ModelInfo",
    "MoeLensError",
    "Override",
    "Profile",
    "Prompt",
    "Sink",
    "Trace",
    "UnsupportedModelError",
    "UsageError",
    "__version__",
    "all_supported",
    "read_corpus",
    "support",
]


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used: ``import moe_lens`` alone loads no MLX."""
    if name not in _HOMES:
        raise AttributeError(f"module 'moe_lens' has no attribute {name!r}")
    from importlib import import_module

    value = getattr(import_module(f".{_HOMES[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
