"""Sinks that keep routing: every token's route, or the sums of a profile.

A recorder is handed to ``router.recording``. Whoever drives the model says with ``announce`` which
prompts the next forward holds, or with every forward what it is about: the numbers and labels of
its prompts. Without that the recorder numbers sequences itself and follows a
generation from one forward to the next, so both also work around ``router.generate``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from moe_lens.errors import CaptureError
from moe_lens.instrument import Forward
from moe_lens.instrument.forward import ROUTING
from moe_lens.instrument.places import Places
from moe_lens.profile import OutputSums, Profile
from moe_lens.trace import Routes, TokenTexts

__all__ = ["ProfileRecorder", "RouteRecorder"]

# Routes are folded into the profile in portions: large enough that the tables, which cost the same
# for any number of tokens, do not dominate.
FOLD_TOKENS = 32768


class RouteRecorder:
    """Keeps the route of every token of the forwards it sees.

    Args:
        router_width: Experts a router can choose from, zero experts included.
        router_logits: Also keep the router logits.
        precision: Dtype of weights and logits; float16 for what goes into a trace.
        texts: Token texts to hand on.
    """

    def __init__(
        self,
        router_width: int,
        *,
        router_logits: bool = False,
        precision: type[np.floating[Any]] = np.float32,
        texts: TokenTexts | None = None,
    ) -> None:
        self.values = ROUTING | ({"router_logits"} if router_logits else set())
        self.num_tokens = 0
        self._width = router_width
        self._precision = precision
        self._texts = texts or TokenTexts()
        self._places = Places()
        self._parts: list[Routes] = []

    def announce(self, prompts: Sequence[int], labels: Sequence[str | None]) -> None:
        """Say which prompts are the rows of the next forward."""
        self._places.announce(prompts)

    def record(self, forward: Forward) -> None:
        """Keep one forward (called by the instrument)."""
        if forward.about is not None:
            self.announce(*forward.about)
        routes = _routes_of(
            forward,
            self._places,
            self._width,
            self._precision,
            router_logits="router_logits" in self.values,
        )
        self._parts.append(replace(routes, texts=self._texts))
        self.num_tokens += len(routes)

    def take(self) -> Routes:
        """All that was kept since the last call, in prompt order.

        Raises:
            CaptureError: Nothing was kept.
        """
        if not any(len(part) for part in self._parts):
            raise CaptureError(
                "no token was captured; run the model with at least one token inside the recording"
            )
        routes, self._parts = Routes.concatenate(self._parts), []
        return routes.take(np.argsort(routes.prompt, kind="stable"))


class ProfileRecorder:
    """Adds the routing of the forwards it sees to a profile; memory does not grow with tokens.

    Args:
        router_width: Experts a router can choose from, zero experts included.
        outputs: Also sum norms and vectors of the expert outputs.
        vocabulary: Also count per token id.
        model: Identity of the model, kept in the profile.
    """

    def __init__(
        self,
        router_width: int,
        *,
        outputs: bool = False,
        vocabulary: bool = True,
        model: dict[str, str] | None = None,
    ) -> None:
        self.values = ROUTING | ({"expert_outputs"} if outputs else set())
        self.num_tokens = 0
        self._width = router_width
        self._vocabulary = vocabulary
        self._model = model
        self._places = Places()
        self._labels: dict[int, str | None] = {}
        self._waiting: list[Routes] = []
        self._folded: Profile | None = None
        self._outputs: OutputSums | None = None

    def announce(self, prompts: Sequence[int], labels: Sequence[str | None]) -> None:
        """Say which prompts are the rows of the next forward."""
        self._places.announce(prompts)
        self._labels.update(zip(prompts, labels, strict=True))

    def record(self, forward: Forward) -> None:
        """Add one forward (called by the instrument)."""
        if forward.about is not None:
            self.announce(*forward.about)
        routes = _routes_of(forward, self._places, self._width, np.float32)
        self._waiting.append(routes)
        self.num_tokens += len(routes)
        if "expert_outputs" in self.values:
            sums = _output_sums(forward, self._width)
            self._outputs = sums if self._outputs is None else self._outputs + sums
        if sum(map(len, self._waiting)) >= FOLD_TOKENS:
            self._fold()

    def profile(self) -> Profile:
        """The profile of everything recorded so far.

        Raises:
            CaptureError: Nothing was recorded.
        """
        self._fold()
        if self._folded is None:
            raise CaptureError(
                "no token was captured; run the model with at least one token inside the recording"
            )
        return replace(self._folded, outputs=self._outputs)

    def _fold(self) -> None:
        if not any(map(len, self._waiting)):
            return
        routes, self._waiting = Routes.concatenate(self._waiting), []
        labels = [self._labels.get(prompt) for prompt in range(int(routes.prompt.max()) + 1)]
        part = Profile.from_routes(routes, labels, model=self._model, vocabulary=self._vocabulary)
        self._folded = part if self._folded is None else self._folded + part


def _routes_of(
    forward: Forward,
    places: Places,
    router_width: int,
    precision: type[np.floating[Any]],
    router_logits: bool = False,
) -> Routes:
    """The routes of one forward as numpy arrays, pads left out."""
    ids, weights = forward.routing()
    ids = ids.astype(mx.uint16)  # a view of the partition would hold its whole buffer alive
    logits = _stacked_logits(forward, router_width) if router_logits else None
    mx.eval(ids, weights, *([] if logits is None else [logits]))
    valid = forward.valid
    prompt, position = places.of(forward.shape, valid, continues=forward.continues)
    return Routes(
        layers=forward.layers,
        router_width=router_width,
        token_ids=np.array(forward.token_ids).reshape(-1)[valid].astype(np.int32),
        prompt=prompt,
        position=position,
        expert_ids=np.array(ids)[:, valid],
        expert_weights=_checked(np.array(weights)[:, valid], "expert_weights", forward, precision),
        router_logits=(
            None
            if logits is None
            else _checked(np.array(logits)[:, valid], "router_logits", forward, precision)
        ),
    )


def _stacked_logits(forward: Forward, router_width: int) -> mx.array:
    """[layers, B x L, router width] float32; -inf where a layer has fewer experts."""
    layers = []
    for layer in forward.layers:
        logits = forward.value("router_logits", layer).astype(mx.float32)
        missing = router_width - logits.shape[-1]
        layers.append(mx.pad(logits, [(0, 0), (0, missing)], constant_values=-float("inf")))
    return mx.stack(layers)


def _checked(
    values: NDArray[np.float32], name: str, forward: Forward, precision: type[np.floating[Any]]
) -> NDArray[np.floating[Any]]:
    """``values`` in the asked precision, after making sure that it can hold them."""
    limit = np.finfo(precision).max
    bad = np.isnan(values) | ((np.abs(values) > limit) & np.isfinite(values))
    if bad.any():
        place, token = np.argwhere(bad)[0][:2]
        raise CaptureError(
            f"layer {forward.layers[place]} gives {name} {values[place, token]} for token {token} "
            "of a batch, which cannot be recorded; check the weights of the model, or load it in "
            "float32"
        )
    return values.astype(precision)


def _output_sums(forward: Forward, router_width: int) -> OutputSums:
    """Sums over the expert outputs of one forward, layer by layer, added up in float64."""
    rows = mx.array(np.flatnonzero(forward.valid))
    norms, weighted, outputs = [], [], []
    for layer in forward.layers:
        ids = forward.value("expert_ids", layer)[rows]
        weights = forward.value("expert_weights", layer)[rows].astype(mx.float32)
        vectors = forward.value("expert_outputs", layer)[rows].astype(mx.float32)
        norm = mx.sqrt(mx.square(vectors).sum(axis=-1))
        hidden = vectors.shape[-1]
        flat = ids.reshape(-1)
        summed = mx.zeros((router_width, hidden)).at[flat].add(vectors.reshape(-1, hidden))
        mx.eval(norm, weights, summed, flat)
        index, norm_rows = np.array(flat), np.array(norm).ravel().astype(np.float64)
        norms.append(np.bincount(index, norm_rows, router_width))
        weighted.append(np.bincount(index, norm_rows * np.array(weights).ravel(), router_width))
        outputs.append(np.array(summed).astype(np.float64))
    return OutputSums(np.stack(norms), np.stack(weighted), np.stack(outputs))
