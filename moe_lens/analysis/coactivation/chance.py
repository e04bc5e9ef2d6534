"""How often two experts would be chosen together if only their loads mattered.

A token draws k *distinct* experts. Were they drawn with these loads and otherwise independently,
the set S would have the probability of conditional Bernoulli sampling (Chen, Dempster and Liu 1994,
Biometrika 81(3); the largest entropy with these loads and this k):

    P(S) = product of w_i over S / sum over all sets of k,    with P(i in S) = share of expert i

and a pair is expected with P(i and j in S), computed exactly by `chance_pairs`. The plain product
of two shares is too large, since drawing i leaves a place less for j: with even loads it is
k^2 / E^2 where the truth is k (k - 1) / (E (E - 1)), 1.9 times too much for 2 of 16, 1.13 times for
8 of 128.

Polynomials of z hold the probability of each number of draws: a factor (1 - p_i + p_i z) for each
expert, with p_i / (1 - p_i) = w_i. All terms are positive, so nothing cancels.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit, logit

__all__ = ["chance_pairs"]

Floats = NDArray[np.float64]

_CLOSE, _NONE = 1e-10, 1e-13
_ROUNDS = 100
_FARTHEST = 3.0
"""Of one step in log odds."""


def chance_pairs(share: Floats) -> Floats:
    """Probability that a token chooses both experts, if only loads matter.

    Args:
        share: [layers, R] share of the tokens that chose each expert. A layer's shares add up to
            k; where that is no whole number, tokens have the whole numbers of experts next to it.

    Returns:
        [layers, R, R] float64, symmetric, with `share` on the diagonal. Row i adds up to k times
        the share of i. The error against the definition is below 1e-8 for shares that
        are 0, 1, or at least 1e-12 away from both.
    """
    share = np.clip(np.asarray(share, dtype=np.float64), 0.0, 1.0)
    # Always and never are exact; a rounding away from them has no finite odds.
    share = np.where(np.minimum(share, 1.0 - share) < _NONE, np.round(share), share)
    sizes = _sizes(share.sum(axis=1))
    found = _joint(_fitted(share, sizes), sizes)
    every = np.arange(share.shape[1])
    found[:, every, every] = share
    return found


def _joint(odds: Floats, sizes: Floats) -> Floats:
    """[layers, R, R] how often two are drawn together, and on the diagonal how often each is."""
    before, after = _products(odds, sizes.shape[1])
    weight = _weight(before, sizes)
    pairs = np.zeros((*odds.shape, odds.shape[1]))
    layers, width, degrees = before[:, :-1].shape
    # What the experts after j must still draw, given r drawn by those before, for each size.
    rest = np.zeros((layers, width + 1, degrees))
    for drawn in range(degrees - 2):
        left = after[:, :, : degrees - 2 - drawn]
        rest[:, :, drawn] = np.einsum("ljs,ls->lj", left, weight[:, drawn + 2 :])
    between = before[:, :-1]
    place = np.arange(width)
    for step in range(1, width):
        between = between[:, : width - step]  # all experts before i + step but i itself
        one, two = place[: width - step], place[step:]
        both = np.einsum("lir,lir->li", between, rest[:, step + 1 :])
        pairs[:, one, two] = odds[:, one] * odds[:, two] * both
        between = _times(between, odds[:, two][:, :, None])
    pairs += pairs.transpose(0, 2, 1)
    pairs[:, place, place] = _shares(odds, sizes)
    return pairs


def _sizes(k: Floats) -> Floats:
    """[layers, sizes] how often a token has each number of experts."""
    whole = np.round(k)
    k = np.where(np.abs(k - whole) < 1e-9, whole, k)
    low = np.floor(k).astype(np.int64)
    sizes = np.zeros((len(k), int(np.ceil(k).max(initial=0)) + 2))
    rows = np.arange(len(k))
    sizes[rows, low] = 1.0 - (k - low)
    sizes[rows, low + 1] = k - low
    return sizes


def _fitted(share: Floats, sizes: Floats) -> Floats:
    """[layers, R] the p_i whose draws of these sizes have these shares.

    Each round moves the log odds by what the share is off, which nearly always converges at once;
    layers that take long, with experts that nearly every token chooses, are finished by Newton's
    method. Shares of 0 and 1 need no fit.
    """
    odds = share.copy()
    inside = (share > 0) & (share < 1)
    for _ in range(_ROUNDS):
        reached = _shares(odds, sizes)
        if np.abs(reached - share).max(initial=0.0) < _CLOSE:
            return odds
        # A share that rounds to always or never is off by less than can be seen.
        free = inside & (reached > 0) & (reached < 1)
        moved = odds[free] * share[free] * (1.0 - reached[free])
        stayed = (1.0 - odds[free]) * (1.0 - share[free]) * reached[free]
        odds[free] = moved / (moved + stayed)
    for layer in np.flatnonzero(np.abs(reached - share).max(axis=1) >= _CLOSE):
        only = slice(layer, layer + 1)
        odds[layer] = _newton(odds[only], share[only], sizes[only])
    return odds


def _newton(odds: Floats, share: Floats, sizes: Floats) -> Floats:
    """[R] the p_i of one layer: the derivative of the shares by log odds is their covariance."""
    inside = np.flatnonzero((share[0] > 0) & (share[0] < 1))
    step, best = 1.0, np.inf
    kept = odds
    change = np.zeros(len(inside))
    for _ in range(_ROUNDS):
        joint = _joint(odds, sizes)[0]
        reached = np.diagonal(joint)
        off = (share[0] - reached)[inside]
        worst = float(np.abs(off / (share * (1 - share))[0, inside]).max(initial=0.0))
        if worst < best:
            kept, best, step = odds, worst, 1.0
            if best < _CLOSE:
                break
            covariance = (joint - np.outer(reached, reached))[np.ix_(inside, inside)]
            change = np.linalg.lstsq(covariance, off, rcond=1e-13)[0]
        else:  # too far: go half as far from where it was best
            step /= 2
            if step < 1e-6:
                break
        moved = logit(kept[0, inside]) + step * np.clip(change, -_FARTHEST, _FARTHEST)
        odds = kept.copy()
        odds[0, inside] = expit(moved)
    return np.asarray(kept[0])


def _shares(odds: Floats, sizes: Floats) -> Floats:
    """[layers, R] how often each expert is drawn."""
    before, after = _products(odds, sizes.shape[1])
    weight = _weight(before, sizes)
    found = np.zeros_like(odds)
    degrees = sizes.shape[1]
    for drawn in range(degrees - 1):
        rest = np.einsum("ljs,ls->lj", after[:, 1:, : degrees - 1 - drawn], weight[:, drawn + 1 :])
        found += before[:, :-1, drawn] * rest
    return np.clip(found * odds, 0.0, 1.0)


def _weight(before: Floats, sizes: Floats) -> Floats:
    """[layers, sizes] how often a number of draws is wanted over how probable it is."""
    total = before[:, -1]
    return np.divide(sizes, total, out=np.zeros_like(sizes), where=total > 0)


def _products(odds: Floats, degrees: int) -> tuple[Floats, Floats]:
    """[layers, R + 1, degrees] twice: of the experts before each place, and from it on."""
    layers, width = odds.shape
    before = np.zeros((layers, width + 1, degrees))
    after = np.zeros_like(before)
    before[:, 0, 0] = after[:, -1, 0] = 1.0
    for place in range(width):
        before[:, place + 1] = _times(before[:, place], odds[:, place, None])
        back = width - 1 - place
        after[:, back] = _times(after[:, back + 1], odds[:, back, None])
    return before, after


def _times(polynomial: Floats, odds: Floats) -> Floats:
    """`polynomial` times (1 - p + p z), without the highest degree."""
    product = polynomial * (1.0 - odds)
    product[..., 1:] += polynomial[..., :-1] * odds
    return product
