"""Training the router rows of a model in memory, everything else frozen.

The loss is KL(parent || smaller) of the next-token distributions (Router-KD, arXiv:2603.02217), the
optimiser Adam (arXiv:1412.6980) with a learning rate that falls to 0 along a cosine.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_flatten, tree_map_with_path, tree_unflatten
from numpy.typing import NDArray

from moe_lens.compress.plan.router_row import RouterRow
from moe_lens.compress.tensors.unpacked import unpack
from moe_lens.compress.verification.losses import log_softmax
from moe_lens.compress.verification.reading_cost import Forward
from moe_lens.corpus.batches import pad
from moe_lens.errors import UnsupportedModelError, UsageError
from moe_lens.families import MoELayer
from moe_lens.telling import Progress

if TYPE_CHECKING:
    from moe_lens.router import ExpertRouter

LEARNING_RATE = 2e-3
BATCH_TOKENS = 1024
"""Of one step, or one longer prompt."""

_LOGITS_BYTES = 256 << 20
_TRIED_TOKENS = 8


def train(
    parent: Forward,
    child: ExpertRouter,
    tokens: Sequence[Sequence[int]],
    *,
    steps: int,
    seed: int = 0,
    progress: Progress | None = None,
) -> list[float]:
    """Train the router rows of a model in memory, in place; returns the loss of every step.

    Args:
        parent: What it should answer like.
        child: The smaller model; its routers are not packed.
        tokens: The text.
        steps: Of Adam.
        seed: Of the order of the prompts.
        progress: Called with steps done and in all.

    Raises:
        UsageError: No prompt has two tokens.
        UnsupportedModelError: MLX gives no gradients here.
    """
    model = child.model
    _freeze_all_but_routers(child)
    rate = optim.cosine_decay(LEARNING_RATE, steps)
    optimizer = optim.Adam(learning_rate=rate)
    step = nn.value_and_grad(model, router_loss)
    stay = {layer.index: layer.num_experts for layer in child.layers}
    losses: list[float] = []
    model.train()
    try:
        drawn = batches(tokens, int(child.info.vocab_size or 1 << 15), seed)
        for number in range(steps):
            ids, lengths = next(drawn)
            target = mx.stop_gradient(log_softmax(parent(ids, lengths)))
            mx.eval(target)
            loss, gradients = _gradients(step, model, ids, lengths, target)
            if number == 0:
                _check_gradients(gradients, child)
            gradients = _without_identity(gradients, child, stay)
            optimizer.update(model, gradients)
            mx.eval(model.parameters(), optimizer.state, loss)
            losses.append(float(loss))
            if progress is not None:
                progress(number + 1, steps)
    finally:
        model.eval()
        model.unfreeze()
    return losses


def _freeze_all_but_routers(router: ExpertRouter) -> None:
    router.model.freeze()
    for layer in router.layers:
        layer.router.unfreeze(keys=["weight", "bias"], recurse=False)


def router_loss(model: nn.Module, ids: mx.array, counted: mx.array, target: mx.array) -> mx.array:
    """Mean KL(parent || child) over the counted positions [B, L]."""
    found = log_softmax(model(ids))
    share = mx.exp(target)
    kl = mx.where(share > 0, share * (target - found), 0.0).sum(axis=-1)
    return (kl * counted).sum() / counted.sum()


def _gradients(
    step: Callable[..., Any],
    model: nn.Module,
    ids: NDArray[np.int32],
    lengths: Sequence[int],
    target: mx.array,
) -> tuple[mx.array, dict[str, Any]]:
    counted = np.arange(ids.shape[1])[None, :] + 1 < np.asarray(lengths)[:, None]
    try:
        loss, gradients = step(model, mx.array(ids), mx.array(counted), target)
        mx.eval(loss, gradients)
    except (RuntimeError, ValueError, NotImplementedError) as error:
        raise UnsupportedModelError(
            f"MLX gives no gradients for the router of this model here ({error}); leave "
            "--repair-router out"
        ) from error
    return loss, gradients


def _check_gradients(gradients: dict[str, Any], child: ExpertRouter) -> None:
    """Raise UnsupportedModelError unless the loss reaches the router and is finite."""
    values = [value for _, value in tree_flatten(gradients)]
    sizes = [float(mx.abs(value).max()) for value in values]
    if not all(np.isfinite(sizes)):
        raise UnsupportedModelError(
            f"the gradients of the router of {child.name} are not finite; leave --repair-router out"
        )
    if not any(sizes):
        raise UnsupportedModelError(
            f"the loss of {child.name} does not depend on its router's weights in a way that MLX "
            "can follow (every gradient is 0); leave --repair-router out"
        )


def _without_identity(
    gradients: dict[str, Any], child: ExpertRouter, stay: dict[int, int]
) -> dict[str, Any]:
    """The gradients with 0 for the rows of identity experts, which no plan changes."""
    if not any(layer.zero_experts for layer in child.layers):
        return gradients
    real = next(iter(stay.values()))

    def masked(_: str, value: mx.array) -> mx.array:
        rows = mx.arange(value.shape[0]) < real
        return value * rows.reshape(-1, *[1] * (value.ndim - 1))

    found: dict[str, Any] = tree_map_with_path(masked, gradients)
    return found


def batches(
    tokens: Sequence[Sequence[int]], vocabulary: int, seed: int
) -> Iterator[tuple[NDArray[np.int32], list[int]]]:
    """Padded prompts and their lengths, without end: every prompt once before any twice."""
    usable = [list(ids) for ids in tokens if len(ids) > 1]
    if not usable:
        raise UsageError("no prompt of the calibration text has two tokens; give longer text")
    most = max(1, min(BATCH_TOKENS, _LOGITS_BYTES // (4 * vocabulary)))
    generator = np.random.default_rng(seed)
    batch: list[list[int]] = []
    while True:
        for place in generator.permutation(len(usable)):
            ids = usable[place][:most] if len(usable[place]) > most else usable[place]
            longest = max(map(len, [*batch, ids]))
            if batch and longest * (len(batch) + 1) > most:
                yield pad([np.asarray(each, np.int32) for each in batch])
                batch = []
            batch.append(ids)


def trained_rows(layer: MoELayer) -> list[RouterRow]:
    """The router rows of a layer's experts, in order."""
    router: Any = layer.router
    weight = np.array(router.weight.astype(mx.float32))
    bias = router.get("bias")
    biases = None if bias is None else np.array(bias.astype(mx.float32))
    return [
        RouterRow.of(weight[number], None if biases is None else float(biases[number]))
        for number in range(layer.num_experts)
    ]


def check_trainable(router: ExpertRouter) -> None:
    """Find out on the parent, before any plan is made, whether its routers can be trained.

    Raises:
        UnsupportedModelError: MLX gives no gradients for them here; the message has the reason.
    """
    reason = _reason(router.layers)
    if router.streamed:
        reason = "a backward pass needs all layers in memory, and this model is read layer by layer"
    if reason is not None:
        raise UnsupportedModelError(
            f"the router of {router.name} cannot be repaired: {reason}; leave --repair-router out"
        )
    model, routers = router.model, [layer.router for layer in router.layers]
    known = {id(module) for module in routers}
    packed = [(name, each) for name, each in model.named_modules() if id(each) in known]
    ids = np.arange(1, 1 + _TRIED_TOKENS, dtype=np.int32)[None]
    vocabulary = router.vocabulary
    unpack(model, routers)
    try:
        _freeze_all_but_routers(router)
        model.train()
        even = mx.full((1, _TRIED_TOKENS, vocabulary), -math.log(vocabulary))
        step = nn.value_and_grad(model, router_loss)
        _, gradients = _gradients(step, model, ids, [_TRIED_TOKENS], even)
        _check_gradients(gradients, router)
    finally:
        model.eval()
        model.unfreeze()
        model.update_modules(tree_unflatten(packed))


def _reason(layers: Sequence[MoELayer]) -> str | None:
    for layer in layers:
        if layer.family.raw and not isinstance(layer.router.get("weight"), mx.array):
            return f"layer {layer.index} has no router weight of its own"
    return None
