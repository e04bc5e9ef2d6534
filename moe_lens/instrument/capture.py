"""A capture: the values of chosen layers, token by token, aligned with the token ids."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from moe_lens.errors import CaptureError, UnsupportedModelError, UsageError
from moe_lens.families import VALUES, MoELayer

from .forward import ROUTING, Forward
from .places import Places

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
        needs = set(self.wanted)
        if needs & (ROUTING | {"expert_outputs"}):
            # Slots are sorted by weight, so ids and outputs need the weights, too.
            needs |= ROUTING
        self.values = frozenset(needs)
        self._given = {
            index: tuple(name for name in VALUES if name in needs and not known[index].reason(name))
            for index in chosen
        }
        for name in self.wanted:
            if not any(name in given for given in self._given.values()):
                reason = known[chosen[0]].reason(name)
                raise UnsupportedModelError(f"this model cannot give {name}: {reason}")
        self._id_dtype = (
            mx.uint8 if max(known[i].router_width for i in chosen) <= 256 else mx.uint16
        )
        self._slots: dict[int, int] = {}
        self._waiting: list[_Forward] = []
        self._pending = 0
        self._forwards: list[_Forward] = []
        self._joined: dict[tuple[str, int], list[mx.array]] = {}
        self._arrays: dict[tuple[str, int], np.ndarray] = {}
        self._tokens: dict[str, np.ndarray] | None = None
        self._by_layer: dict[int, LayerCapture] = {}

    def record(self, forward: Forward) -> None:
        """Keep what this forward showed (called by the instrument).

        Raises:
            CaptureError: If it has another k than the forwards before it.
        """
        values: dict[tuple[str, int], mx.array] = {}
        for layer, names in self._given.items():
            for name in names:
                values[name, layer] = value = forward.value(name, layer)
                if name == "expert_ids":
                    self._check_slots(layer, value.shape[-1])
        # Held as they are: the model's own evaluation fills them, and what a decoded token
        # costs is this dictionary.
        self._waiting.append(
            _Forward(forward.token_ids, forward.shape, forward.valid, forward.continues, values)
        )
        self._pending += forward.valid.size
        if self._pending >= _EVALUATE_TOKENS:
            self._join()
        self._tokens = None
        self._by_layer.clear()

    def _check_slots(self, layer: int, k: int) -> None:
        before = self._slots.setdefault(layer, k)
        if k != before:
            raise CaptureError(
                f"this capture holds {before} experts per token of layer {layer}, and now the "
                f"model runs with {k}: open one capture for each k"
            )

    def _join(self) -> None:
        """Join the forwards that wait into one compact array per value and layer."""
        if not self._waiting:
            return
        for key in self._waiting[0].values:
            parts = [forward.values[key] for forward in self._waiting]
            whole = parts[0] if len(parts) == 1 else mx.concatenate(parts)
            # Ids as a view hold the whole [tokens, experts] buffer of the partition.
            dtype = self._id_dtype if key[0] == "expert_ids" else mx.float32
            self._joined.setdefault(key, []).append(whole.astype(dtype))
        mx.async_eval([arrays[-1] for arrays in self._joined.values()])
        for forward in self._waiting:
            forward.values.clear()
        self._forwards += self._waiting
        self._waiting, self._pending = [], 0

    def finish(self) -> None:
        """Evaluate what still waits, in the thread that ran the model, whose streams it needs."""
        self._join()
        if not self._joined:
            return
        mx.eval(self._joined, [forward.token_ids for forward in self._forwards])
        for key, arrays in self._joined.items():
            known = [self._arrays[key]] if key in self._arrays else []
            self._arrays[key] = np.concatenate([*known, *map(np.array, arrays)])
        self._joined = {}

    # Reading -----------------------------------------------------------------------------

    def __len__(self) -> int:
        """The number of tokens captured."""
        return sum(int(each.valid.sum()) for each in (*self._forwards, *self._waiting))

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
            self._by_layer[layer] = LayerCapture(layer, **self._layer_rows(layer))
        return self._by_layer[layer]

    def _layer_rows(self, layer: int) -> dict[str, np.ndarray]:
        """Every value of one layer, pads dropped, slots by falling weight."""
        valid = np.concatenate([forward.valid for forward in self._forwards])
        rows = {name: self._arrays[name, layer][valid] for name in self._given[layer]}
        if "expert_weights" in rows:
            order = np.argsort(-rows["expert_weights"], axis=-1, kind="stable")
            token = np.arange(len(order))[:, None]
            for name in ("expert_ids", "expert_weights", "expert_outputs"):
                if name in rows:
                    rows[name] = rows[name][token, order]
        return {name: array for name, array in rows.items() if name in self.wanted}

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
        if self._tokens is None:
            places = Places()
            placed = [
                places.of(each.shape, each.valid, continues=each.continues)
                for each in self._forwards
            ]
            ids = [np.array(each.token_ids).reshape(-1)[each.valid] for each in self._forwards]
            self._tokens = {
                "token_ids": np.concatenate(ids).astype(np.int32),
                "prompt": np.concatenate([prompt for prompt, _ in placed]),
                "position": np.concatenate([position for _, position in placed]),
            }
        return self._tokens


@dataclass
class _Forward:
    """What a capture keeps of one forward; its values leave when forwards are joined."""

    token_ids: mx.array
    shape: tuple[int, int]
    valid: np.ndarray
    continues: bool
    values: dict[tuple[str, int], mx.array]
