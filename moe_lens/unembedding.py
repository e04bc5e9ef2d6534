"""Vectors of the residual stream as logits: the model's own final norm and head, and nothing else.

    unembed = Unembedding.of(router)
    logits = unembed(vectors)                 # [n, hidden] -> [n, vocabulary]

No architecture is re-implemented. One short forward shows which module is the final norm and what
the *trunk* (the module that holds the decoder layers) returns. From then on the trunk's class is
swapped for the time of a call, so that it returns the normed vectors at once, and the model's own
``__call__`` does all that comes after: tied embeddings or a head, scales, soft caps. On the trial
this must give the logits of the plain model to the last bit, or the model is refused.

Two things can be asked of a vector that is *added* to the stream:

* Read alone (`relative`). An RMSNorm then divides the vector by its own length, so the logits are
  those of its direction: their order says what it points at, their size nothing. A LayerNorm takes
  off the mean as well. Without biases, which `relative` takes off (they are what a zero vector
  gives), v and -v give opposite logits.
* Added to a stream h (`effect`, then `head`). To first order the norm's output changes by its
  derivative at h. Of an RMSNorm that is gain (v - (v u) u) / rms(h), u = h / |h|: linear in v, in
  true logits, and without the part of v along h, which the norm divides out.

The head is linear after the norm, up to its bias, which is taken off, and a soft cap, which
squeezes large logits and changes no order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten
from numpy.typing import NDArray

from .errors import UnsupportedModelError
from .families.class_swap import ClassSwaps, call_original
from .families.layer import MoELayer, enclosing

if TYPE_CHECKING:
    from .loaded_model import LoadedModel

__all__ = ["ExpertReading", "Unembedding"]

TRIAL = tuple(range(1, 9))
"""Token ids of the forward that shows norm and head."""

Swap = tuple[nn.Module, Callable[..., Any]]
"""A module, and the ``__call__`` that it gets for a while."""


@dataclass(frozen=True, eq=False)
class Unembedding:
    """The way from the residual stream after the last layer to the logits. Make one with `of`.

    Attributes:
        hidden_size: Width of the vectors.
        vocabulary: Number of logits.
        dtype: In which vectors are handed to the norm: that of the stream.
        norm_name: Path of the final norm in the model.
    """

    hidden_size: int
    vocabulary: int
    dtype: mx.Dtype
    norm_name: str
    _model: nn.Module = field(repr=False)
    _trunk: nn.Module = field(repr=False)
    _norm: nn.Module = field(repr=False)
    _norm_in_head: bool = field(repr=False)
    _normed_dtype: mx.Dtype = field(repr=False)

    @classmethod
    def of(cls, router: LoadedModel) -> Unembedding:
        """Find norm and head by one forward of eight tokens, and prove them on it.

        A model that is streamed reads its weights once for this.

        Raises:
            UnsupportedModelError: The parts of the model are not where a language model has them,
                or do not give its logits to the last bit.
        """
        model = router.model
        found = _trial(model)
        if found is None:
            raise UnsupportedModelError(_refusal(model, "its final norm cannot be told"))
        seen, norm, inside = found
        unembed = cls(
            hidden_size=int(seen.stream.shape[-1]),
            vocabulary=int(seen.logits.shape[-1]),
            dtype=seen.stream.dtype,
            norm_name=seen.names[id(norm)],
            _model=model,
            _trunk=seen.trunk,
            _norm=norm,
            _norm_in_head=not inside,
            _normed_dtype=seen.returned.dtype,
        )
        again = unembed(seen.stream[0])
        if not bool(mx.array_equal(again, seen.logits[0], equal_nan=True)):
            reason = "its head, run by itself, gives other logits than the model"
            raise UnsupportedModelError(_refusal(model, reason))
        return unembed

    def __call__(self, vectors: mx.array) -> mx.array:
        """The logits [n, vocabulary] of residual stream vectors [n, hidden], in the head's dtype.

        They are normed as the stream is; a vector of zeros gives the biases.
        """
        returned = vectors.astype(self.dtype)[None]
        if not self._norm_in_head:
            returned = call_original(self._norm, returned).astype(self._normed_dtype)
        return self._head(returned)

    def normed(self, vectors: mx.array) -> mx.array:
        """What the final norm makes of vectors [n, hidden]."""
        normed: mx.array = call_original(self._norm, vectors.astype(self.dtype)[None])
        return normed[0]

    def effect(self, stream: mx.array, vectors: mx.array) -> mx.array:
        """How the norm's output changes, to first order, if vectors are added to the stream.

        Args:
            stream: [n, hidden] what the norm reads.
            vectors: [n, hidden], one added to each row.

        Returns:
            [n, hidden] float32, for `head`; linear in `vectors`.
        """

        def norm(x: mx.array) -> mx.array:
            normed: mx.array = call_original(self._norm, x[None])
            return normed[0].astype(mx.float32)

        _, (changes,) = mx.jvp(norm, [stream.astype(mx.float32)], [vectors.astype(mx.float32)])
        return changes

    def head(self, normed: mx.array) -> mx.array:
        """[n, vocabulary] float32: the logits of what the norm gave [n, hidden], without bias."""
        zero = mx.zeros((1, self.hidden_size), self._normed_dtype)
        both = mx.concatenate([zero, normed.astype(self._normed_dtype)])
        swaps = [(self._norm, _same)] if self._norm_in_head else []
        logits = self._head(both[None], *swaps).astype(mx.float32)
        return logits[1:] - logits[:1]

    @contextmanager
    def watching(self) -> Iterator[list[mx.array]]:
        """Collect what the norm reads, [B, L, hidden] of each forward inside the block."""
        seen: list[mx.array] = []
        base = type(self._norm)

        def call(module: nn.Module, x: mx.array) -> Any:
            seen.append(x)
            return base.__call__(module, x)  # type: ignore[operator]

        with _swapped((self._norm, call)):
            yield seen

    def relative(self, vectors: mx.array) -> mx.array:
        """The logits [n, vocabulary] in float32, less those of a zero vector: without biases."""
        zero = mx.zeros((1, self.hidden_size), self.dtype)
        return self(vectors).astype(mx.float32) - self(zero).astype(mx.float32)

    def _head(self, returned: mx.array, *swaps: Swap) -> mx.array:
        """The logits [n, vocabulary] if the trunk returns [1, n, hidden]."""

        def trunk(module: nn.Module, *args: Any, **kwargs: Any) -> mx.array:
            return returned

        tokens = mx.zeros(returned.shape[:2], mx.int32)
        with _swapped((self._trunk, trunk), *swaps):
            logits: mx.array = _plain_call(self._model)(tokens)
        return logits[0]


@dataclass(frozen=True, eq=False)
class ExpertReading:
    """Logits of what experts write, as arrays of numpy, without biases.

    Attributes:
        layers: The MoE layers of the model.
        unembedding: Of the model.
    """

    layers: Sequence[MoELayer]
    unembedding: Unembedding

    @classmethod
    def of(cls, router: LoadedModel) -> ExpertReading:
        """Find norm and head.

        Raises:
            UnsupportedModelError: As `Unembedding.of`, or it cannot be told what experts of this
                type write into the stream.
        """
        for layer in router.layers:
            layer.check_written()
        return cls(router.layers, Unembedding.of(router))

    def effects(self, vectors: NDArray[np.float64]) -> NDArray[np.float32]:
        """[n, vocabulary] of sums or means [n, hidden] of `Unembedding.effect`."""
        return np.array(self.unembedding.head(mx.array(vectors.astype(np.float32))))

    def alone(self, vectors: NDArray[np.float64], place: int | None = None) -> NDArray[np.float32]:
        """[n, vocabulary] of vectors that are read alone.

        Args:
            vectors: [n, hidden] in the stream, or [n, width] of experts.
            place: The MoE layer whose experts give them; None: they are of the stream.
        """
        given = mx.array(vectors.astype(np.float32)).astype(self.unembedding.dtype)
        if place is None:
            return np.array(self.unembedding.relative(given))
        with self.layers[place].reading():
            logits = self.unembedding.relative(self.layers[place].written(given))
            mx.eval(logits)
        return np.array(logits)


@dataclass
class _Seen:
    """What the trial showed."""

    trunk: nn.Module
    names: dict[int, str]
    logits: mx.array
    returned: mx.array
    """[1, L, hidden] of the trunk."""
    calls: list[tuple[nn.Module, mx.array, mx.array]]
    """Module, input and output, in order, of what is called outside of the layers."""
    stream: mx.array = field(init=False)
    """[1, L, hidden] what the final norm reads."""


def _trial(model: nn.Module) -> tuple[_Seen, nn.Module, bool] | None:
    """What was seen, the final norm, and whether it stands inside of the trunk."""
    modules = dict(model.named_modules())
    names = {id(module): name for name, module in modules.items()}
    layers = [names[id(layer)] for layer in getattr(model, "layers", []) if id(layer) in names]
    if not layers:
        return None
    trunk = enclosing(modules, layers[0])
    if trunk is model:
        return None
    returned: list[mx.array] = []
    calls: list[tuple[nn.Module, mx.array, mx.array]] = []
    inside = tuple(f"{layer}." for layer in layers)
    watched: list[Swap] = [
        (module, _watch(type(module), calls))
        for name, module in modules.items()
        if _may_be_norm(module) and not name.startswith(inside)
    ]
    base = type(trunk)

    def call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        output = base.__call__(module, *args, **kwargs)  # type: ignore[operator]
        returned.append(output)
        return output

    with _swapped(*watched, (trunk, call)):
        logits = _plain_call(model)(mx.array([TRIAL]))
        mx.eval(logits)
    if len(returned) != 1 or not isinstance(returned[0], mx.array):
        return None
    seen = _Seen(trunk, names, logits, returned[0], calls)
    for norm, entered, left in reversed(calls):
        if bool(mx.array_equal(left.astype(seen.returned.dtype), seen.returned)):
            seen.stream = entered
            return seen, norm, True
        if bool(mx.array_equal(entered, seen.returned)):
            seen.stream = entered
            return seen, norm, False
    return None


def _same(module: nn.Module, x: mx.array) -> mx.array:
    return x


def _may_be_norm(module: nn.Module) -> bool:
    """Whether it has no modules inside, and no more than vectors as parameters."""
    return not module.children() and all(
        value.ndim <= 1 for _, value in tree_flatten(module.parameters())
    )


def _watch(base: type, calls: list[tuple[nn.Module, mx.array, mx.array]]) -> Callable[..., Any]:
    def call(module: nn.Module, x: Any, *args: Any, **kwargs: Any) -> Any:
        output = base.__call__(module, x, *args, **kwargs)  # type: ignore[operator]
        both = (x, output)
        if all(isinstance(each, mx.array) for each in both) and x.shape == output.shape:
            calls.append((module, x, output))
        return output

    return call


def _plain_call(model: nn.Module) -> Callable[..., mx.array]:
    """The model's own ``__call__``, past an instrument that watches its forwards."""
    cls = next(each for each in type(model).__mro__ if "_moe_lens_instrument" not in vars(each))
    return lambda tokens: cls.__call__(model, tokens)  # type: ignore[operator]


@contextmanager
def _swapped(*calls: Swap) -> Iterator[None]:
    swaps = ClassSwaps()
    try:
        for module, call in calls:
            swaps.swap(module, call)
        yield
    finally:
        swaps.undo()


def _refusal(model: nn.Module, reason: str) -> str:
    name = type(model).__module__.rpartition(".")[2]
    return (
        f"vectors cannot be turned into logits for {name}: {reason}; look at the routing instead, "
        "which needs no head, or report the model type and the version of mlx-lm"
    )
