"""Whether what stands on disk is what was measured: loaded by mlx-lm alone, compared in logits."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from moe_lens.checkpoint_files.folder import check_weights
from moe_lens.errors import MoeLensError
from moe_lens.loading import compute_in_float32
from moe_lens.streaming import LayerStream
from moe_lens.streaming.loads import streamed_loads

TOKENS = 256
"""Most tokens of text that the loads are compared on."""

TOLERANCE = 1e-4
"""Largest difference of two logits, as a share of the largest logit, that counts as equal.

Both loads compute the same operations on the same bytes, so they usually agree in every bit; what
is written wrong is off by far more.
"""

Live = Callable[[Sequence[int]], mx.array]
"""Token ids -> logits [tokens, vocab] of the smaller model as it was before it was written."""


@dataclass(frozen=True)
class StockLoad:
    """How far logits of a stock load are from those of the live model, on `tokens` tokens.

    `largest_difference` is absolute, over all logits; `largest_logit` is the scale to read it by.
    `against` says what the live model was.
    """

    tokens: int
    largest_difference: float
    largest_logit: float
    against: str

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


def stock_logits(
    folder: Path,
    tokens: Sequence[int],
    check_tokenizer: Callable[[Any], None],
    *,
    name: str,
    trust_remote_code: bool = False,
    trust_model_file: bool = False,
    stream: bool | None = None,
) -> NDArray[np.float32]:
    """Logits [tokens, vocab] of ``mlx_lm.load(folder)``, which is let go of afterwards.

    On MLX's CPU backend a half-precision model is cast to float32, since that backend cannot
    multiply its experts otherwise.

    Args:
        folder: The smaller model.
        tokens: Token ids.
        check_tokenizer: Called with the tokenizer that stock loading gives, before the model
            runs; raises where `tokens` mean nothing to this model.
        name: What the model is called in an error.
        trust_remote_code: Let the model run the code it comes with.
        trust_model_file: Let it run its model file, and no code of its tokenizer.
        stream: Whether its weights are read layer by layer; None: if it is too large.

    Raises:
        MoeLensError: The files are missing or corrupt, mlx-lm does not load them, or the model
            does not run.
    """
    import mlx_lm

    check_weights(folder)
    with _usable(name):
        model, tokenizer = mlx_lm.load(
            str(folder),
            tokenizer_config={"trust_remote_code": True} if trust_remote_code else None,
            trust_remote_code=trust_remote_code or trust_model_file,
            lazy=True,
        )[:2]
    check_tokenizer(tokenizer)
    fresh = streamed_loads(model, folder, stream)
    with _usable(name):
        compute_in_float32(model)
        layers = None if fresh is None else LayerStream(model, fresh)
        logits = as_rows(model(mx.array([list(tokens)], mx.int32)))
    del model, layers
    gc.collect()
    mx.clear_cache()
    return logits


@contextmanager
def _usable(name: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # whatever stock loading trips over, the folder is of no use
        reason = (str(error).strip() or repr(error)).splitlines()[0]
        raise MoeLensError(
            f"stock mlx_lm.load cannot use {name} ({reason}); write it again"
        ) from error


def as_rows(logits: mx.array) -> NDArray[np.float32]:
    """[..., vocab] as [tokens, vocab] float32."""
    return np.array(logits.reshape(-1, logits.shape[-1]).astype(mx.float32))


def check_stock_load(
    stock: NDArray[np.float32], live: NDArray[np.float32], against: str
) -> StockLoad:
    """Compare logits [tokens, vocab] of a stock load with those of the live model.

    Raises:
        MoeLensError: They differ, so the folder does not hold the model that was measured.
    """
    if stock.shape != live.shape:
        raise MoeLensError(
            f"the model that stock mlx_lm.load opens has logits of shape {stock.shape}, "
            f"{against} of {live.shape}; the folder does not hold this model: write it again"
        )
    both = np.isfinite(stock) & np.isfinite(live)
    # Logits that are ruled out (-inf) or broken (NaN) must be so in both.
    same_elsewhere = np.array_equal(stock[~both], live[~both], equal_nan=True)
    difference = float(np.abs(stock[both] - live[both]).max(initial=0.0))
    scale = float(np.abs(live[both]).max(initial=0.0))
    if not same_elsewhere or not difference <= TOLERANCE * scale:
        raise MoeLensError(
            "the model that stock mlx_lm.load opens does not give the logits of "
            f"{against} (they differ by up to {difference:.3g} at a largest logit of "
            f"{scale:.3g}); the folder does not hold this model: write it again"
        )
    return StockLoad(len(stock), difference, scale, against)
