"""A model that runs layer by layer from weights that never are in memory together.

The class of every decoder layer is swapped for a subclass that runs the layer as mlx-lm wrote it,
evaluates what comes out, hands over what the seams inside have shown, and lets go of the weights.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from moe_lens.families.class_swap import ClassSwaps

from .lazy_layers import Fresh, LazyLayers
from .waves import Batch, Wave

Passed = Callable[[float], None]
"""Called with the share of the layers that all batches of a wave have run."""


class Watch(Protocol):
    """What must know of every layer that runs: the instrument."""

    def pause(self) -> Any:
        """The forward that runs now is about to wait; returns what `resume` takes."""

    def resume(self, paused: Any, layer_path: str) -> None:
        """The forward goes on, with the layer at this path."""

    def finish_layer(self, layer_path: str) -> None:
        """The layer has run: evaluate what its seams have shown, and let go of its graph."""


class LayerStream:
    """Runs a model layer by layer, and reads the weights of each layer when it runs.

    Args:
        model: Loaded lazily, nothing read yet.
        fresh: Loads it once more in the same way; None: the weights stay, and only what the
            layers compute is evaluated and handed over one by one.
        watch: The instrument of the model; None where nobody watches.

    Raises:
        UnsupportedModelError: The model does not show its layers.
    """

    def __init__(self, model: nn.Module, fresh: Fresh | None, watch: Watch | None = None) -> None:
        self.layers = LazyLayers(model, fresh)
        self._watch = watch
        self._wave: Wave | None = None
        self._swaps = ClassSwaps()
        for number, module in enumerate(self.layers.modules):
            self._swap(number, module)

    def close(self) -> None:
        """Put the classes back; the model stays lazily loaded."""
        self._swaps.undo()

    def run(
        self,
        forward: Callable[[Batch], mx.array],
        batches: Sequence[Batch],
        passed: Passed | None = None,
    ) -> list[mx.array]:
        """What `forward`, which runs the model, gives for each batch; weights are read once.

        The head is left lazy: whoever evaluates a result computes its logits then.
        """

        def done(number: int) -> None:
            self._release(number)
            if passed is not None:
                passed((number + 1) / len(self.layers.modules))

        self._wave = Wave(forward, done)
        try:
            return self._wave.run(batches)
        finally:
            self._wave = None

    def release(self, path: str) -> None:
        """Let go of the weights of the layer that holds the module at `path`."""
        number = self.layers.number_of(path)
        if number is not None:
            self._release(number)

    def _release(self, number: int) -> None:
        self.layers.release(number)

    def _swap(self, number: int, module: nn.Module) -> None:
        base, path = type(module), self.layers.paths[number]

        def call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            wave = self._wave if self._wave is not None and self._wave.running else None
            watch = self._watch
            paused = None if watch is None else watch.pause()
            if wave is not None:
                wave.wait(number)
            if watch is not None:
                watch.resume(paused, path)
            self.layers.read(number)
            output = base.__call__(module, *args, **kwargs)
            mx.eval(_arrays(output), [_arrays(each) for each in _caches(args, kwargs)])
            if watch is not None:
                watch.finish_layer(path)
            if wave is None:
                self._release(number)
            return output

        self._swaps.swap(module, call)


def _arrays(values: Any) -> list[mx.array]:
    return [each for _, each in tree_flatten(values) if isinstance(each, mx.array)]


def _caches(args: Sequence[Any], kwargs: dict[str, Any]) -> list[Any]:
    """What the key-value caches among the arguments of a layer hold."""
    given = [each for each in (*args, *kwargs.values()) if hasattr(each, "state")]
    return [each.state for each in given if not (hasattr(each, "empty") and each.empty())]
