"""A loaded model whose routing can be seen and changed while its own code runs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import mlx.core as mx

from .errors import UsageError
from .generation import Generation, stream_tokens
from .instrument import Capture, Sink
from .instrument.forward import takes_layers
from .loaded_model import LoadedModel
from .override import Override
from .streaming import LayerStream
from .trial_run import blaming_the_model

if TYPE_CHECKING:
    from mlx_lm.generate import GenerationResponse


class RoutedModel(LoadedModel):
    """A MoE model whose routing can be seen and changed.

    Outside `capture`, `override` and `recording` the model is exactly what mlx-lm loaded; inside,
    its own forward runs and a few classes are swapped. Works as a context manager, too.
    """

    def __init__(self, *model: Any, **settings: Any) -> None:
        """Takes what `LoadedModel` takes."""
        self._overrides: list[dict[int, Override]] = []
        self._users = 0
        self._evaluation: LayerStream | None = None
        super().__init__(*model, **settings)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Put every class of the model back and drop all overrides and captures."""
        self._instrument.set_sinks(())
        self._overrides.clear()
        self._users = 0
        super().close()

    # Seeing and changing -----------------------------------------------------------------

    @contextmanager
    def capture(self, *values: str, layers: Sequence[int] | None = None) -> Iterator[Capture]:
        """Capture values of every forward inside the block.

        Args:
            values: ``router_logits``, ``expert_ids``, ``expert_weights``, ``expert_outputs``,
                ``routed_output``, ``shared_output``; none for ids and weights.
            layers: Layer indices; None for all MoE layers.

        Raises:
            UsageError: For an unknown value or layer.
            UnsupportedModelError: If the model cannot give a value, with the reason.
            CaptureError: At the end of the block, if nothing ran.
        """
        seen = Capture(self.layers, values, layers)
        with self.recording(seen):
            yield seen
        seen.check()
        seen.finish()

    @contextmanager
    def recording(self, *sinks: Sink) -> Iterator[None]:
        """Hand every forward inside the block to `sinks`.

        Where one takes single layers (see `Sink`), the model is evaluated layer by layer, so that
        the values of all layers never are in memory together.
        """
        with self._evaluated_by_layer() if any(map(takes_layers, sinks)) else nullcontext():
            self._attach()
            self._instrument.set_sinks((*self._instrument.sinks, *sinks))
            try:
                yield
            finally:
                ended = {id(sink) for sink in sinks}
                left = (sink for sink in self._instrument.sinks if id(sink) not in ended)
                self._instrument.set_sinks(left)
                self._release()

    @contextmanager
    def _evaluated_by_layer(self) -> Iterator[None]:
        if self.streamed or self._evaluation is not None:
            yield
            return
        self._evaluation = LayerStream(self.model, None, self._instrument)
        try:
            yield
        finally:
            self._evaluation.close()
            self._evaluation = None

    @contextmanager
    def override(
        self,
        override: Override | Mapping[int, Override] | None = None,
        *,
        layers: Sequence[int] | None = None,
        **fields: Any,
    ) -> Iterator[None]:
        """Change the routing of every forward inside the block.

        ``override(k=1)`` changes all MoE layers, ``override(mask=[7], layers=[3])`` some,
        ``override({3: Override(mask=[7, 12])})`` each in its own way. Inside another override,
        what is set here wins.

        Raises:
            UsageError: For experts or layers out of range, k that does not fit, contradictions.
            UnsupportedModelError: If the model's rule is not known or does not verify.
        """
        asked = self._by_layer(override, layers, fields)
        combined = dict(self._overrides[-1]) if self._overrides else {}
        for index, each in asked.items():
            combined[index] = each.over(combined.get(index, Override()))
        self._instrument.check(combined)
        self._attach()
        try:
            self._instrument.set_overrides(combined)
            self._overrides.append(combined)
            try:
                yield
            finally:
                if self._overrides:
                    self._overrides.pop()
        finally:
            if self._instrument.attached:
                self._instrument.set_overrides(self._overrides[-1] if self._overrides else {})
            self._release()

    @contextmanager
    def channel_masks(self, masks: Mapping[int, mx.array]) -> Iterator[None]:
        """Multiply the channels inside the experts by `masks` in every forward inside the block.

        Args:
            masks: By layer index, [experts, width]; 0 takes a channel away, 1 leaves it. Layers
                that are not named compute what they always do. Blocks do not nest: the inner
                one's masks hold, and after it none.

        Raises:
            UsageError: A layer without routed experts, or a mask of another shape.
        """
        shapes = {layer.index: (layer.num_experts, layer.expert_width) for layer in self.layers}
        for index, mask in masks.items():
            if mask.shape != shapes.get(index):
                raise UsageError(
                    f"the channel mask of layer {index} has the shape {mask.shape}; give one of "
                    f"[experts, width] for a layer of these: {shapes}"
                )
        self._attach()
        self._instrument.set_channel_masks(masks)
        try:
            yield
        finally:
            self._instrument.set_channel_masks({})
            self._release()

    @property
    def overrides(self) -> dict[int, Override]:
        """The overrides in force, by layer."""
        return dict(self._overrides[-1]) if self._overrides else {}

    def _by_layer(
        self,
        override: Override | Mapping[int, Override] | None,
        layers: Sequence[int] | None,
        fields: dict[str, Any],
    ) -> dict[int, Override]:
        if isinstance(override, Mapping):
            if fields or layers is not None:
                raise UsageError("give overrides by layer, or fields with layers=, not both")
            asked = dict(override)
        else:
            asked = self._for_layers(override, layers, fields)
        for index, each in asked.items():
            if not isinstance(each, Override):
                raise UsageError(
                    f"layer {index}: give a moe_lens.Override, such as Override(k=1), not {each!r}"
                )
        return asked

    def _for_layers(
        self, override: Override | None, layers: Sequence[int] | None, fields: dict[str, Any]
    ) -> dict[int, Override]:
        if override is not None and fields:
            raise UsageError("give one Override, or its fields, not both")
        try:
            each = Override(**fields) if override is None else override
        except TypeError as error:
            raise UsageError(
                f"an override has no field {sorted(fields)}: it takes k, mask, force, bias, scale "
                "and ids"
            ) from error
        chosen = self.info.moe_layers if layers is None else layers
        return dict.fromkeys(chosen, each)

    def _attach(self) -> None:
        self._instrument.attach()
        self._users += 1

    def _release(self) -> None:
        self._users = max(0, self._users - 1)
        if self._users == 0:
            self._instrument.detach()

    # Writing -----------------------------------------------------------------------------

    def stream(
        self,
        prompt: str | Sequence[int],
        *,
        experts_per_token: int | None = None,
        chat: bool = False,
        **options: Any,
    ) -> Iterator[GenerationResponse]:
        """Generate, piece by piece: mlx-lm's `GenerationResponse` for every token.

        Args:
            prompt: Text or token ids.
            experts_per_token: Run all MoE layers with this k.
            chat: Put the prompt into the model's chat template.
            options: `max_tokens` (256), `temp` (0: the likeliest token), `top_p`, `seed`, and
                what ``mlx_lm.stream_generate`` takes.
        """
        tokens = self.encode(prompt, chat=chat)
        trouble = blaming_the_model(self.name, self.path, len(tokens))
        with self._maybe_override(experts_per_token), trouble:
            yield from stream_tokens(self.model, self.tokenizer, tokens, **options)

    def generate(
        self, prompt: str | Sequence[int], *, chat: bool = False, **options: Any
    ) -> Generation:
        """Generate a whole answer. Takes what `stream` takes."""
        tokens = self.encode(prompt, chat=chat)
        return Generation.collect(tokens, self.stream(tokens, **options))

    @contextmanager
    def _maybe_override(self, experts_per_token: int | None) -> Iterator[None]:
        if experts_per_token is None:
            yield
        else:
            with self.override(k=experts_per_token):
                yield
