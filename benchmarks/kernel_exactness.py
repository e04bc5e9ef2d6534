"""How exactly the routing kernel agrees with the reference, measured.

    python benchmarks/kernel_exactness.py [--tokens 4096] [--factory emulator|metal]

For each rule and dtype: the share of tokens with a tie at the k-th place, where a wrong tie rule
changes experts; then, for scores fed in (the default) and for scores computed in the kernel
(`one_launch`), the share of tokens whose experts differ from the reference's, the share of weights
that differ and by how many units in the last place at most. At the end: how far the exponentials
themselves are from the true ones, which is where the weights of one-launch rules come from.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

import metal_emulator
from moe_lens.kernels import Rule, fused_route
from routing_cases import DTYPES, Question, by_id, slots_as_sorted, units_apart

EXPERTS, K, AT_ONCE = 128, 8, 512


def rules() -> dict[str, Rule]:
    bias = mx.array(np.random.default_rng(1).uniform(-0.05, 0.05, EXPERTS).astype(np.float32))
    return {
        "softmax, top-k, / sum (Qwen3)": Rule("softmax_precise", side="high", normalise="sum"),
        "softmax in float32, top-k": Rule("softmax_float32"),
        "sigmoid + bias, / sum (DeepSeek-V3)": Rule(
            "sigmoid_float32", selection_bias=bias, normalise="sum", epsilon=1e-20
        ),
        "sigmoid in the logits' dtype": Rule("sigmoid", side="high", normalise="sum"),
        "sqrt-softplus + bias": Rule("sqrt_softplus_float32", selection_bias=bias),
        "top-k, softmax (Mixtral)": Rule("identity", score_chosen="softmax_precise"),
    }


def compare(question: Question, factory: Callable[..., Any], one_launch: bool) -> np.ndarray:
    """Other experts, weights that differ, weights compared, largest distance in units."""
    got = fused_route(question.rule, question.logits, K, factory=factory, one_launch=one_launch)
    with slots_as_sorted():
        ids, weights = by_id(*question.by_reference())
    own_ids, own_weights = by_id(got.ids, got.weights)
    same = (own_ids == ids).all(-1)
    apart = units_apart(own_weights, weights)[same]
    return np.array([(~same).sum(), (apart > 0).sum(), apart.size, apart.max(initial=0)])


def measure(rule: Rule, dtype: mx.Dtype, tokens: int, factory: Callable[..., Any]) -> str:
    random = np.random.default_rng(0)
    ties, sums, largest = 0, np.zeros((2, 3)), np.zeros(2)
    for _ in range(0, tokens, AT_ONCE):
        logits = mx.array(random.normal(size=(AT_ONCE, EXPERTS))).astype(dtype)
        question = Question(rule, logits, K)
        ids, _ = question.by_reference()
        ties += int((question.statistics(ids)[1] == 0).sum())
        for row, one_launch in enumerate((False, True)):
            *counts, most = compare(question, factory, one_launch)
            sums[row] += counts
            largest[row] = max(largest[row], most)
    done = -(-tokens // AT_ONCE) * AT_ONCE
    cells = [f"{100 * ties / done:6.2f} %"]
    for row in range(2):
        others, differ, compared = sums[row]
        cells.append(f"{100 * others / done:8.3f} %{100 * differ / compared:8.3f} %")
        cells.append(f"{int(largest[row]):4d}")
    return "  ".join(cells)


def largest_error_of_softmax(factory: Callable[..., Any]) -> tuple[int, int]:
    """Units between float32 softmax weights and those of float64: MLX's here, and the kernel's."""
    logits = np.random.default_rng(2).normal(size=(4 * AT_ONCE, K)).astype(np.float32) * 2
    exact = np.exp(logits.astype(np.float64))
    exact /= exact.sum(-1, keepdims=True)
    rule = Rule("softmax_float32", side="sorted")
    routed = fused_route(rule, mx.array(logits), K, factory=factory, one_launch=True)
    wanted = mx.array(np.take_along_axis(exact, np.array(routed.ids).astype(int), -1))
    own = mx.softmax(mx.array(logits), axis=-1)
    return (
        int(units_apart(own, mx.array(exact.astype(np.float32))).max()),
        int(units_apart(routed.weights, wanted.astype(mx.float32)).max()),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--factory", choices=("emulator", "metal"), default="emulator")
    options = parser.parse_args()
    emulated = options.factory == "emulator"
    factory = metal_emulator.metal_kernel if emulated else mx.fast.metal_kernel
    print(f"{EXPERTS} experts, {K} per token, {options.tokens} tokens of normal logits, by the")
    print(f"{options.factory}, against MLX {mx.__version__} on {mx.default_device()}")
    print(f"{'':36}{'':10}{'':9}   {'scores fed in':^26}{'scores in the kernel':^26}")
    print(
        f"{'rule':36}{'dtype':10}{'ties':>9} {'experts   weights  units':>27}"
        f"{'experts   weights  units':>26}"
    )
    for name, rule in rules().items():
        for dtype in DTYPES:
            print(f"{name:36}{dtype:10} {measure(rule, DTYPES[dtype], options.tokens, factory)}")
    by_mlx, by_kernel = largest_error_of_softmax(factory)
    print(f"softmax of {K} in float32 against float64: MLX at most {by_mlx} units off,")
    print(f"the kernel at most {by_kernel}")


if __name__ == "__main__":
    main()
