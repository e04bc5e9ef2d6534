"""Decoder layers whose weights are read when they are first used, again and again.

MLX reads a weight from its file when an array that depends on it is evaluated, and keeps it as
long as somebody holds the array. A layer is *released* by giving it arrays that nobody evaluated
yet, from another lazy load of the same checkpoint. So a released layer is never wrong to use: it
has its shapes and dtypes, and whoever does use it reads the weights once more.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from moe_lens.errors import UnsupportedModelError

Fresh = Callable[[], nn.Module]
"""Loads the checkpoint lazily, with all that was done to the model that is streamed."""


class LazyLayers:
    """The decoder layers of a model.

    Args:
        model: What ``mlx_lm.load(lazy=True)`` returned; none of its weights is read yet.
        fresh: Loads it once more; takes as long as reading the headers of the weight files. None
            for a model that is in memory and stays there.

    Raises:
        UnsupportedModelError: The model does not show its layers.
    """

    def __init__(self, model: nn.Module, fresh: Fresh | None) -> None:
        self.modules: list[nn.Module] = list(getattr(model, "layers", []))
        if not self.modules:
            raise UnsupportedModelError(
                f"{type(model).__module__.rpartition('.')[2]} does not show its layers, so its "
                "weights cannot be read layer by layer; use a machine that can hold it whole"
            )
        paths = {id(module): path for path, module in model.named_modules()}
        self.paths = [paths[id(module)] for module in self.modules]
        self._fresh = fresh
        self._unread: dict[int, Any] = {}

    def read(self, number: int) -> None:
        """Read the weights of one layer, one after the other, so that only one is in the making."""
        if self._fresh is None:
            return
        for _, value in tree_flatten(self.modules[number].parameters()):
            mx.eval(value)

    def release(self, number: int) -> None:
        """Let go of the weights of one layer."""
        if self._fresh is None:
            return
        if number not in self._unread:
            layers = self._fresh().layers  # type: ignore[attr-defined]
            self._unread = {each: layer.parameters() for each, layer in enumerate(layers)}
        self.modules[number].update(self._unread.pop(number))
        mx.clear_cache()

    def load_by(self, fresh: Fresh) -> None:
        """Take unread weights from another load from now on: modules of the model have changed."""
        self._fresh = fresh
        self._unread = {}

    def number_of(self, path: str) -> int | None:
        """The layer that holds the module at `path`; None for one outside of all layers."""
        for number, layer in enumerate(self.paths):
            if path == layer or path.startswith(f"{layer}."):
                return number
        return None
