"""`ExpertRouter`: the public face. Load a model, see its routing, change it, record it."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Self

from .async_router import AsyncExpertRouter
from .corpus import Corpus
from .families import STOCK, decide
from .loading import load, read_weights
from .recording import record_trace
from .routed_model import RoutedModel
from .streaming.loads import streamed_loads
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
        stream: bool | None = None,
        trust_model_file: bool = False,
        cpu_experts: str = STOCK,
    ) -> Self:
        """Load ``demo``, a folder, or a hub id.

        On MLX's CPU backend a half-precision model is cast to float32 in memory (see `notes`).
        A model that does not fit into memory is streamed: the weights of a layer are read when it
        runs. It answers the same, to the last bit, at the cost of a reading for each forward.

        Args:
            name: ``demo``, a folder, or a hub id.
            revision: Of a hub id.
            trust_remote_code: Let the tokenizer run code that comes with the model.
            kernel: Whether overridden routing runs in the fused kernel: ``auto`` (where a GPU
                has proved it), ``never`` or ``always``; None: as MOE_LENS_KERNEL says, or auto.
            stream: Whether the weights are read layer by layer; None: if they take more than 60 %
                of the free memory.
            trust_model_file: Let the model's own file run, and no code of its tokenizer.
            cpu_experts: How the experts are computed on MLX's CPU backend (see the attribute):
                ``stock``, as mlx-lm does, to the last bit, ``segmented``, or ``auto``.

        Raises:
            UsageError: For a name that is no model, or ``segmented`` on a GPU.
            UnsupportedModelError: For a dense model, or code that was not trusted.
            MoeLensError: For missing or corrupt files, or a hub that cannot be reached.
        """
        decide(cpu_experts)
        model, tokenizer, config, path = load(
            name,
            revision=revision,
            trust_remote_code=trust_remote_code,
            trust_model_file=trust_model_file,
            lazy=True,
        )
        fresh = streamed_loads(model, path, stream)
        if fresh is None:
            read_weights(model, path)
        found = cls(model, tokenizer, config, name=str(name), path=path, kernel=kernel, fresh=fresh)
        found.cpu_experts = cpu_experts
        return found

    @classmethod
    async def from_pretrained_async(cls, name: str | Path, **options: Any) -> AsyncExpertRouter:
        """`from_pretrained` in a thread of its own, which then runs every call."""
        return await AsyncExpertRouter.start(lambda: cls.from_pretrained(name, **options))

    def trace(self, corpus: Corpus | str | Path, output: str | Path, **options: Any) -> Trace:
        """Record the routing of every token of `corpus` into the folder `output`.

        Takes what `moe_lens.recording.record_trace` takes.
        """
        return record_trace(self, corpus, output, **options)
