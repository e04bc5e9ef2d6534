"""Telling a model that cannot run from a mistake of ours.

A config can say numbers with which mlx-lm builds a model whose forward then fails: more experts
per token than there are experts, say. That comes up as an error of MLX in the middle of a forward.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import mlx.core as mx

from .errors import MoeLensError
from .loading import compute_in_float32, load

__all__ = ["blaming_the_model"]


@contextmanager
def blaming_the_model(name: str, path: Path | None, tokens: int) -> Iterator[None]:
    """Run a forward; an error that plain mlx-lm has as well becomes one sentence.

    Args:
        name: Of the model, for the sentence.
        path: Its folder; None: nothing can be tried, and errors stay what they are.
        tokens: How long a sequence the forward reads.

    Raises:
        MoeLensError: mlx-lm cannot run the model either.
    """
    try:
        yield
    except MoeLensError:
        raise
    except Exception as error:
        reason = None if path is None else _why_not(path, tokens)
        if reason is None:
            raise
        raise MoeLensError(
            f"mlx-lm cannot run {name} ({reason}): its config.json does not fit its weights, or "
            "this machine; download or convert the model again"
        ) from error


def _why_not(path: Path, tokens: int) -> str | None:
    """What mlx-lm says when it runs the model by itself; None where it can. Reads no weights."""
    try:
        model = load(path, lazy=True)[0]
    except MoeLensError:  # code of its own, which is not run once more
        return None
    try:
        compute_in_float32(model)
        model(mx.zeros((1, tokens), mx.int32))
    except Exception as error:
        return (" ".join(str(error).split()) or repr(error))[:300]
    return None
