"""Experts compared by what they answer: all of them on the same tokens, and each on its own."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from moe_lens.experts.answers import all_outputs
from moe_lens.experts.cosines import cosines
from moe_lens.experts.layer_sample import LayerSample
from moe_lens.telling import Progress

from .measures import Floats, Measure

__all__ = ["CENTRED", "CKA", "MEANS", "PER_TOKEN", "compare_means", "compare_samples"]

PER_TOKEN, CKA, MEANS, CENTRED = "outputs", "CKA", "mean outputs", "centred means"

FEWEST_TOKENS = 8
"""Sampled tokens below which nothing is said of the outputs."""


def compare_samples(
    samples: Sequence[LayerSample], progress: Progress | None = None
) -> tuple[Measure, Measure]:
    """Run all experts of each layer on the sampled tokens, and compare them pair by pair.

    * `PER_TOKEN`: mean over tokens of the cosine of both outputs.
    * `CKA`: linear centred kernel alignment (Kornblith et al. 2019, arXiv 1905.00414) with the
      unbiased estimate of HSIC (Song et al. 2012; Nguyen et al. 2021, arXiv 2010.15327): whether
      both tell the tokens apart in the same way, whatever the direction. 0 on average for
      unrelated outputs however few the tokens; 1 for outputs that differ by a rotation or scale.

    Memory: the outputs of one layer, see `layer_sample.OUTPUT_BYTES`, three times.
    """
    per_token, aligned = [], []
    for number, sample in enumerate(samples):
        if progress is not None:
            progress(number, len(samples))
        outputs = all_outputs(sample)
        per_token.append(token_cosines(outputs))
        aligned.append(linear_cka(outputs))
        del outputs
        mx.clear_cache()
    if progress is not None:
        progress(len(samples), len(samples))
    tokens = min(len(sample.inputs) for sample in samples)
    return (
        Measure.of(
            PER_TOKEN,
            "outputs",
            f"mean cosine of both outputs on the same tokens, {tokens} sampled ones",
            per_token,
        ),
        Measure.of(
            CKA,
            "outputs",
            f"unbiased linear CKA of both outputs on the same {tokens} tokens",
            aligned,
        ),
    )


def token_cosines(outputs: mx.array) -> Floats:
    """[E, E] mean over tokens of the cosine of two experts; outputs [S, E, hidden] float32.

    An output of zeros has cosine 0 with every other.
    """
    norms = mx.sqrt(mx.square(outputs).sum(axis=-1, keepdims=True))
    unit = (outputs / mx.maximum(norms, 1e-30)).swapaxes(0, 1).reshape(outputs.shape[1], -1)
    found: Floats = np.array(unit @ unit.T, np.float64) / len(outputs)
    return found.clip(-1, 1)


def linear_cka(outputs: mx.array) -> Floats:
    """[E, E] unbiased linear CKA; outputs [S, E, hidden] float32; NaN with less than 4 tokens."""
    tokens, experts = outputs.shape[:2]
    if tokens < 4:
        return np.full((experts, experts), np.nan)
    rows = []
    for expert in range(experts):
        answers = outputs[:, expert]
        gram = np.array(answers @ answers.T, np.float64)
        rows.append(_centred(gram).ravel().astype(np.float32))
    flat = np.stack(rows)
    return cosines((flat / np.maximum(np.abs(flat).max(), 1e-30)).astype(np.float64))


def _centred(gram: NDArray[np.float64]) -> NDArray[np.float64]:
    """U-centred (Székely and Rizzo 2014): their inner products are unbiased HSIC, to a factor."""
    tokens = len(gram)
    np.fill_diagonal(gram, 0.0)
    means = gram.sum(axis=0) / (tokens - 2)
    found: NDArray[np.float64] = gram - means - means[:, None] + means.sum() / (tokens - 1)
    np.fill_diagonal(found, 0.0)
    return found


def compare_means(means: Iterable[NDArray[np.float64]]) -> tuple[Measure, Measure]:
    """Cosines of the mean outputs of the experts, each over the tokens routed to it.

    Args:
        means: By layer [E, hidden], NaN for an expert without tokens.
    """
    plain, centred = [], []
    for each in means:
        plain.append(_known_cosines(each))
        with np.errstate(invalid="ignore"):
            centred.append(_known_cosines(each - np.nanmean(each, axis=0)))
    return (
        Measure.of(
            MEANS,
            "outputs",
            "cosine of the mean outputs, each over the tokens that were routed to the expert",
            plain,
        ),
        Measure.of(
            CENTRED,
            "outputs",
            "the same after the mean over all experts of the layer is taken out",
            centred,
        ),
    )


def _known_cosines(vectors: NDArray[np.float64]) -> Floats:
    found = cosines(np.nan_to_num(vectors))
    missing = np.isnan(vectors).any(axis=1)
    found[missing], found[:, missing] = np.nan, np.nan
    return found
