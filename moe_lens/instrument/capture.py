"""A capture: the values of chosen layers, token by token, aligned with the token ids."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from moe_lens.errors import CaptureError, UnsupportedModelError, UsageError
from moe_lens.families import VALUES, MoELayer
from moe_lens.trace import NO_EXPERT

from .forward import ROUTING, Forward
from .places import Places

_ALL = -1
"""In place of a layer: an array of all layers."""

_EVALUATE_TOKENS = 256
"""Tokens whose values may wait, lazy, for the model's own evaluation."""


@dataclass(frozen=True)
class LayerCapture:
    """What one layer showed, one row for each token. Values that were not asked for are None.

    Attributes:
        layer: Index of the layer in the model.
        expert_ids: [tokens, k] uint8 (uint16 above 256 experts), slot 0 has the highest weight.
        expert_weights: [tokens, k] float32, what the block multiplies by.
        router_logits: [tokens, router width] float32.
        expert_outputs: [tokens, k, hidden] float32, before the weights, in the order of the ids.
        routed_output: [tokens, hidden] float32.
        shared_output: [tokens, hidden] float32, before any gate.
        expert_inputs: [tokens, hidden] float32, what the experts read.
    """

    layer: int
    expert_ids: np.ndarray | None = None
    expert_weights: np.ndarray | None = None
    router_logits: np.ndarray | None = None
    expert_outputs: np.ndarray | None = None
    routed_output: np.ndarray | None = None
    shared_output: np.ndarray | None = None
    expert_inputs: np.ndarray | None = None


class Capture:
    """Values of every forward while it is attached; read it by layer: ``seen[3].expert_ids``.

    Pads are left out. Rows are tokens in the order in which the model read them; `prompt` and
    `position` say where each belongs.

    Args:
        layers: The MoE layers of the model.
        values: Names from `moe_lens.VALUES`; empty for ids and weights.
        only: Indices of the layers to keep; None for all.

    Raises:
        UsageError: For an unknown value or layer.
        UnsupportedModelError: If no chosen layer can give a value, with the reason.
    """

    def __init__(
        self, layers: Sequence[MoELayer], values: Sequence[str], only: Sequence[int] | None = None
    ) -> None:
        self.wanted = tuple(values) or ("expert_ids", "expert_weights")
        unknown = sorted(set(self.wanted) - set(VALUES))
        if unknown:
            raise UsageError(f"there is no value {unknown[0]!r}: choose from {', '.join(VALUES)}")
        known = {layer.index: layer for layer in layers}
        chosen = tuple(known) if only is None else tuple(only)
        missing = [index for index in chosen if index not in known]
        if missing or not chosen:
            raise UsageError(
                f"layer {missing[0] if missing else '(none)'} has no routed experts; the MoE "
                f"layers are {', '.join(map(str, known))}"
            )
        self.layers = chosen
        self._given = {
            index: tuple(name for name in self.wanted if known[index].reason(name) is None)
            for index in chosen
        }
        for name in self.wanted:
            if not any(name in given for given in self._given.values()):
                reason = known[chosen[0]].reason(name)
                raise UnsupportedModelError(f"this model cannot give {name}: {reason}")
        needs = set(self.wanted)
        if needs & (ROUTING | {"expert_outputs"}):
            # Slots are sorted by weight, so ids and outputs need the weights, too.
            needs |= ROUTING
        self.values = frozenset(needs)
        self._id_dtype = (
            mx.uint8 if max(known[i].router_width for i in chosen) <= 256 else mx.uint16
        )
        self._forwards: list[_Kept] = []
        self._pending = self._evaluated = 0
        self._rows: dict[str, np.ndarray] | None = None
        self._by_layer: dict[int, LayerCapture] = {}

    def record(self, forward: Forward) -> None:
        """Keep what this forward showed (called by the instrument)."""
        self._forwards.append(_Kept(forward, self._given, self._id_dtype))
        self._pending += forward.valid.size
        if self._pending >= _EVALUATE_TOKENS:
            # Until then, the model's own evaluation fills the arrays; a second one for every
            # decoded token would cost more than the capture itself.
            mx.async_eval([kept.arrays() for kept in self._forwards[self._evaluated :]])
            self._evaluated, self._pending = len(self._forwards), 0
        self._rows = None
        self._by_layer.clear()

    def finish(self) -> None:
        """Evaluate what still waits, in the thread that ran the model, whose streams it needs."""
        for kept in self._forwards:
            kept.finish()
        self._evaluated, self._pending = len(self._forwards), 0

    # Reading -----------------------------------------------------------------------------

    def __len__(self) -> int:
        """The number of tokens captured."""
        return sum(int(kept.valid.sum()) for kept in self._forwards)

    def __iter__(self) -> Iterator[LayerCapture]:
        return (self[layer] for layer in self.layers)

    @property
    def token_ids(self) -> np.ndarray:
        """[tokens] int32."""
        return self._token_rows()["token_ids"]

    @property
    def prompt(self) -> np.ndarray:
        """[tokens] int32, the number of the sequence a token belongs to, from 0."""
        return self._token_rows()["prompt"]

    @property
    def position(self) -> np.ndarray:
        """[tokens] int32, the place of a token in its sequence, from 0."""
        return self._token_rows()["position"]

    def __getitem__(self, layer: int) -> LayerCapture:
        """The values of one layer, named by its index in the model."""
        if layer not in self._given:
            raise UsageError(f"layer {layer} was not captured; captured are {list(self.layers)}")
        self.check()
        self.finish()
        if layer not in self._by_layer:
            arrays = {
                name: np.concatenate([kept.rows(name, layer) for kept in self._forwards])
                for name in self._given[layer]
            }
            self._by_layer[layer] = LayerCapture(layer, **arrays)
        return self._by_layer[layer]

    def check(self) -> None:
        """Raise a CaptureError if nothing was captured."""
        if len(self) == 0:
            raise CaptureError(
                "nothing was captured: the model did not run inside the capture (call generate, "
                "forward or the model itself within the with block)"
            )

    def _token_rows(self) -> dict[str, np.ndarray]:
        self.check()
        self.finish()
        if self._rows is None:
            places = Places()
            placed = [
                places.of(kept.shape, kept.valid, continues=kept.continues)
                for kept in self._forwards
            ]
            self._rows = {
                "token_ids": np.concatenate([kept.tokens() for kept in self._forwards]),
                "prompt": np.concatenate([prompt for prompt, _ in placed]),
                "position": np.concatenate([position for _, position in placed]),
            }
        return self._rows


class _Kept:
    """What a capture keeps of one forward: compact arrays, pads and slot order as they came.

    Sorting is left to the reader, so that a forward costs a stack and a cast.
    """

    def __init__(
        self, forward: Forward, given: dict[int, tuple[str, ...]], id_dtype: mx.Dtype
    ) -> None:
        self.valid = forward.valid
        self.shape = forward.shape
        self.continues = forward.continues
        self.token_ids = forward.token_ids
        self._place = {layer: place for place, layer in enumerate(forward.layers)}
        self._lazy: dict[tuple[str, int], mx.array] = {}
        self._arrays: dict[tuple[str, int], np.ndarray] = {}
        names = {name for each in given.values() for name in each}
        if names & (ROUTING | {"expert_outputs"}):
            ids, weights = forward.slots()
            # Ids as a view would hold the whole [tokens, experts] buffer of the partition.
            self._lazy["expert_ids", _ALL] = ids.astype(mx.uint16 if forward.uneven else id_dtype)
            self._lazy["expert_weights", _ALL] = weights
        for layer, wanted in given.items():
            for name in wanted:
                if name not in ROUTING:
                    self._lazy[name, layer] = forward.value(name, layer).astype(mx.float32)

    def arrays(self) -> list[mx.array]:
        return [*self._lazy.values(), self.token_ids]

    def finish(self) -> None:
        mx.eval(self.arrays())
        self._arrays |= {key: np.array(value) for key, value in self._lazy.items()}
        self._lazy.clear()

    def tokens(self) -> np.ndarray:
        return np.array(self.token_ids).reshape(-1)[self.valid].astype(np.int32)

    def rows(self, name: str, layer: int) -> np.ndarray:
        """[valid tokens, ...] of one layer, slots by falling weight."""
        if name not in ROUTING and name != "expert_outputs":
            return self._arrays[name, layer][self.valid]
        place = self._place[layer]
        ids = self._arrays["expert_ids", _ALL][place][self.valid]
        weights = self._arrays["expert_weights", _ALL][place][self.valid]
        if ids.dtype == np.uint16 and ids.size:
            used = ids[0] != NO_EXPERT
            ids, weights = ids[:, used], weights[:, used]
        order = np.argsort(-weights, axis=-1, kind="stable")
        if name == "expert_outputs":
            outputs = self._arrays[name, layer][self.valid]
            return np.take_along_axis(outputs, order[..., None], axis=1)
        return np.take_along_axis(ids if name == "expert_ids" else weights, order, axis=-1)
