"""A loaded model: how it is computed, where its weights are, and running it on token ids."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Self

import mlx.core as mx
import mlx.nn as nn

from .errors import UsageError
from .families import SEGMENTED, STOCK, MoELayer, decide, segment, segmented, unsegment
from .generation import encode_prompt
from .info import ModelInfo, describe_model
from .instrument import Instrument, NextForward
from .kernels import Kernel
from .loading import compute_in_float32
from .streaming import Batch, LayerStream, Passed, plan_waves, wave_tokens
from .streaming.lazy_layers import Fresh
from .streaming.memory import WeightMemory
from .token_batch import batch_lengths, token_batch
from .trial_run import blaming_the_model

logger = logging.getLogger("moe_lens")


class LoadedModel:
    """A MoE model that runs token ids.

    A model that does not fit into memory is *streamed* until `close`: it was loaded lazily, and
    `fresh` loads it once more in the same way. Each layer then reads its weights when it runs, so
    a forward costs a reading of the checkpoint; `forwards` runs many batches for one.

    Attributes:
        model: What ``mlx_lm.load`` returned.
        tokenizer: mlx-lm's tokenizer wrapper.
        config: config.json.
        path: The model's folder.
        info: The model in numbers.
        layers: The MoE layers.
        notes: What was done to make the model run here, in sentences.
        kernel: What runs the rules under an override; its `reason` says why it is what it is.
        cpu_experts: ``stock`` or ``segmented``: how the experts are computed; can be assigned.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        config: dict[str, Any],
        *,
        name: str = "model",
        path: Path | None = None,
        kernel: Kernel | str | None = None,
        fresh: Fresh | None = None,
    ) -> None:
        self.name = name
        self.path = path
        self.model = model
        self.tokenizer = tokenizer
        self.config = config
        self.kernel = kernel if isinstance(kernel, Kernel) else _kernel(kernel)
        self._instrument = Instrument(model, self.kernel)
        self.info: ModelInfo = describe_model(name, model, self.layers, config)
        note = compute_in_float32(model)
        self.notes: list[str] = [] if note is None else [note]
        for each in self.notes:
            logger.warning(each)
        self._vocabulary: int | None = None
        self._fresh = fresh
        self._layer_stream: LayerStream | None = None
        if fresh is not None:
            self._stream(fresh)

    @property
    def layers(self) -> list[MoELayer]:
        return self._instrument.layers

    def close(self) -> None:
        """Put every class of the model back."""
        self._instrument.detach()
        self.cpu_experts = STOCK
        if self._layer_stream is not None:
            self._layer_stream.close()
            for layer in self.layers:
                layer.after_reading.clear()
            self._layer_stream = None

    def __repr__(self) -> str:
        info = self.info
        return (
            f"{type(self).__name__}({self.name!r}: {info.model_type}, "
            f"{len(info.moe_layers)} MoE layers of {info.num_experts} experts, "
            f"{info.experts_per_token} per token)"
        )

    # How it is computed, and where its weights are -----------------------------------------

    def _stream(self, fresh: Fresh) -> None:
        self._layer_stream = LayerStream(self.model, fresh, self._instrument)
        for layer in self.layers:
            layer.after_reading.append(partial(self._layer_stream.release, layer.path))
        self._note_memory()

    def _note_memory(self) -> None:
        found = WeightMemory.of(self.model)
        note = (
            f"{self.name} is streamed: its {found.total / 1e9:.1f} GB of weights are read layer by "
            f"layer, and at most {found.streamed / 1e9:.2f} GB of them are in memory"
        )
        self.notes.append(note)
        logger.warning(note)

    @property
    def cpu_experts(self) -> str:
        """How the experts are computed: ``stock``, as mlx-lm does, or ``segmented``.

        By segment, NumPy multiplies all rows of an expert at once, many times faster than MLX's
        CPU backend, which takes them one by one. Sums then have another order, so the last bits
        of what the model answers differ, and it gives no gradients. Assigned ``auto``, it is
        ``segmented`` on MLX's CPU backend. Experts in a list (DBRX) stay ``stock``.

        Raises:
            UsageError: Assigned something else, ``segmented`` on a GPU, or inside of a `capture`,
                an `override` or a `recording`.
        """
        return SEGMENTED if segmented(self.layers) else STOCK

    @cpu_experts.setter
    def cpu_experts(self, asked: str) -> None:
        change = segment if decide(asked) == SEGMENTED else unsegment
        if self._instrument.attached:
            raise UsageError(
                "change how experts are computed outside of `capture`, `override` and `recording`"
            )
        change(self.layers)

    def twin(self) -> Self:
        """Another router of this model: its modules are copies, which share their weights.

        So it takes no further memory; what is done to the modules of one (classes, unpacked
        weights) the other does not see. A model that is streamed is loaded lazily once more.
        """
        fresh = self._fresh if self.streamed else None
        model = copy.deepcopy(self.model) if fresh is None else fresh()
        found = type(self)(
            model,
            self.tokenizer,
            self.config,
            name=self.name,
            path=self.path,
            kernel=self.kernel,
            fresh=fresh,
        )
        found.cpu_experts = self.cpu_experts
        return found

    def change_modules(self, change: Callable[[nn.Module], None]) -> None:
        """Change modules of the model in place; of a streamed one, whenever it is read as well."""
        change(self.model)
        if self._layer_stream is None or self._fresh is None:
            return
        load = self._fresh

        def changed() -> nn.Module:
            model = load()
            change(model)
            return model

        self._fresh = changed
        self._layer_stream.layers.load_by(changed)
        self._note_memory()

    @property
    def streamed(self) -> bool:
        """Whether the weights of a layer are read when it runs, and let go of after."""
        return self._layer_stream is not None

    # Running -----------------------------------------------------------------------------

    def forward(self, token_ids: Any, lengths: Sequence[int] | None = None) -> mx.array:
        """Logits [B, L, vocab] of token ids [B, L] (or one sequence [L]), without a cache.

        Args:
            token_ids: Whole numbers; shorter rows are padded on the right.
            lengths: [B] the real length of each row, so that pads are left out of every record.

        Raises:
            UsageError: If they are no batch of this model's token ids.
        """
        tokens = token_batch(token_ids, self.info.vocab_size)
        return self._forward(Batch(tokens, lengths))

    def forwards(self, batches: Sequence[Batch], passed: Passed | None = None) -> list[mx.array]:
        """Logits [B, L, vocab] of each batch, without a cache, lazily.

        A model that is streamed reads its weights once for all of them; `waves` gives batches
        whose forwards may be under way together.

        Args:
            batches: What is run.
            passed: Of a model that is streamed, called after every layer.
        """
        if self._layer_stream is None:
            return [self._forward(batch) for batch in batches]
        return self._layer_stream.run(self._forward, batches, passed)

    def waves(self, batches: Iterable[Batch]) -> Iterator[list[Batch]]:
        """Batches, in order, in the groups that `forwards` should get."""
        return plan_waves(batches, self.wave_tokens)

    @property
    def wave_tokens(self) -> int:
        """Tokens that `forwards` should get at once; 0: one batch."""
        if self._layer_stream is None:
            return 0
        return wave_tokens(self.info.hidden_size or 4096)

    @property
    def vocabulary(self) -> int:
        """The number of logits."""
        if self._vocabulary is None:
            known = self.info.vocab_size if self.streamed else None  # reading it whole costs
            self._vocabulary = known or int(self.forward([[0]]).shape[-1])
        return self._vocabulary

    def _forward(self, batch: Batch) -> mx.array:
        lengths = batch_lengths(batch.lengths, batch.ids.shape)
        self._instrument.next = NextForward(lengths, batch.about, batch.sinks)
        try:
            with blaming_the_model(self.name, self.path, batch.ids.shape[1]):
                logits: mx.array = self.model(mx.array(batch.ids))
            return logits
        finally:
            self._instrument.next = NextForward()

    def encode(self, prompt: str | Sequence[int], *, chat: bool = False) -> list[int]:
        """Token ids of a prompt; with `chat`, of the chat template with it as user message."""
        return encode_prompt(self.tokenizer, prompt, chat=chat)


def _kernel(mode: str | None) -> Kernel:
    try:
        return Kernel(mode)
    except ValueError as error:
        raise UsageError(str(error)) from error
