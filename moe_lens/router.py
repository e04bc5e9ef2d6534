"""`ExpertRouter`: the public face. Load a model, see its routing, change it, record it."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Self

from .async_router import AsyncExpertRouter
from .corpus import Corpus
from .loading import load
from .recording import record_trace
from .routed_model import RoutedModel
from .trace import Trace


class ExpertRouter(RoutedModel):
    """A MoE model to load by name, see, change and record.

    `RoutedModel` has `capture`, `override`, `recording`, `forward`, `stream` and `generate`; this
    adds how models come in (`from_pretrained`) and how routing goes out (`trace`).

    Example:
        ```python
        router = ExpertRouter.from_pretrained("demo")
        with router.capture("expert_ids", "expert_weights") as seen:
            router.generate("def fib(n):", max_tokens=32)
        seen[3].expert_ids  # MoE layer 3, [tokens, k], aligned with seen.token_ids
        ```
    """

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path,
        *,
        revision: str | None = None,
        trust_remote_code: bool = False,
        kernel: str | None = None,
    ) -> Self:
        """Load ``demo``, a folder, or a hub id.

        On MLX's CPU backend a half-precision model is cast to float32 in memory (see `notes`).

        Args:
            name: ``demo``, a folder, or a hub id.
            revision: Of a hub id.
            trust_remote_code: Let the tokenizer run code that comes with the model.
            kernel: Whether overridden routing runs in the fused kernel: ``auto`` (where a GPU
                has proved it), ``never`` or ``always``; None: as MOE_LENS_KERNEL says, or auto.

        Raises:
            UsageError: For a name that is no model.
            UnsupportedModelError: For a dense model, or code that was not trusted.
            MoeLensError: For missing or corrupt files, or a hub that cannot be reached.
        """
        model, tokenizer, config, path = load(
            name, revision=revision, trust_remote_code=trust_remote_code
        )
        return cls(model, tokenizer, config, name=str(name), path=path, kernel=kernel)

    @classmethod
    async def from_pretrained_async(cls, name: str | Path, **options: Any) -> AsyncExpertRouter:
        """`from_pretrained` in a thread of its own, which then runs every call."""
        return await AsyncExpertRouter.start(lambda: cls.from_pretrained(name, **options))

    def trace(self, corpus: Corpus | str | Path, output: str | Path, **options: Any) -> Trace:
        """Record the routing of every token of `corpus` into the folder `output`.

        Takes what `moe_lens.recording.record_trace` takes.
        """
        return record_trace(self, corpus, output, **options)
