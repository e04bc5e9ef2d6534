"""What watching and changing the routing costs, as ratios to the plain model.

    python benchmarks/capture.py
    python benchmarks/capture.py --block deepseek_v3 --json capture.json

One timed unit is all that a user pays for: opening the capture or override (which swaps the
classes), the forwards, and reading what was captured. A unit is one prefill of 2048 tokens, or 256
tokens decoded one by one. All variants run in turn in one process on the same input, in an order
that rotates, so that a busy machine slows all of them; a ratio is the median over the repetitions
of variant / plain within one turn, and beside it stands the ratio of the fastest units.
"""

from __future__ import annotations

import argparse
import contextlib
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.generate import generate_step
from mlx_lm.models import deepseek_v3, qwen3_moe
from rich.console import Console
from rich.table import Table
from turns import Measured, in_turns, paired, where

from moe_lens.errors import MoeLensError
from moe_lens.router import ExpertRouter

HIDDEN, EXPERTS, ACTIVE, EXPERT_WIDTH, VOCAB = 1024, 64, 8, 128, 256
PREFILL, DECODED = 2048, 256
TARGETS = {"prefill": 1.02, "decoding": 1.05}

Unit = Callable[[], None]
Watch = Callable[[ExpertRouter], contextlib.AbstractContextManager[Any]]


@contextlib.contextmanager
def _plain(router: ExpertRouter) -> Iterator[None]:
    yield


@contextlib.contextmanager
def _captured(router: ExpertRouter, *values: str) -> Iterator[None]:
    with router.capture(*values) as seen:
        yield
    for layer in seen:  # reading is part of the price
        assert layer.expert_ids is not None


VARIANTS: dict[str, Watch] = {
    "plain": _plain,
    "idle attach": lambda router: router.recording(),
    "ids and weights": lambda router: _captured(router, "expert_ids", "expert_weights"),
    "everything": lambda router: _captured(router, *router.info.values),
    "override k": lambda router: router.override(k=router.info.experts_per_token),
}


class OneBlock(nn.Module):
    """A model that is one MoE block: an embedding feeds it."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, HIDDEN)
        self.layers = [nn.Module()]
        self.layers[0].mlp = block

    def __call__(self, inputs: mx.array, cache: Any = None) -> mx.array:
        output: mx.array = self.layers[0].mlp(self.embedding(inputs))
        return output


def _block(name: str, expert_width: int) -> nn.Module:
    """A block of hidden size 1024 with 64 experts, 8 of them active."""
    shared: dict[str, Any] = dict(
        model_type=name,
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        intermediate_size=HIDDEN,
        moe_intermediate_size=expert_width,
        num_hidden_layers=1,
        num_attention_heads=8,
        num_key_value_heads=8,
        num_experts_per_tok=ACTIVE,
        norm_topk_prob=True,
        rms_norm_eps=1e-6,
        rope_theta=10000.0,
        max_position_embeddings=4096,
    )
    if name == "qwen3_moe":
        own = dict(num_experts=EXPERTS, decoder_sparse_step=1, mlp_only_layers=[])
        own |= dict(head_dim=128, tie_word_embeddings=False)
        return qwen3_moe.Qwen3MoeSparseMoeBlock(qwen3_moe.ModelArgs.from_dict(shared | own))
    own = dict(n_routed_experts=EXPERTS, n_shared_experts=1, n_group=8, topk_group=4)
    own |= dict(topk_method="noaux_tc", scoring_func="sigmoid", routed_scaling_factor=2.5)
    block = deepseek_v3.DeepseekV3MoE(deepseek_v3.ModelArgs.from_dict(shared | own))
    block.gate.weight = mx.random.normal(block.gate.weight.shape) * 0.03
    return block


def block_router(name: str, expert_width: int = EXPERT_WIDTH) -> ExpertRouter:
    """A router over one random block."""
    mx.random.seed(0)
    model = OneBlock(_block(name, expert_width))
    mx.eval(model.parameters())
    return ExpertRouter(model, None, {"model_type": name}, name=f"{name} block")


def units(router: ExpertRouter) -> dict[str, Callable[[], None]]:
    """The two kinds of work: a prefill, and decoding token by token."""
    vocabulary = router.info.vocab_size or VOCAB
    tokens = np.random.default_rng(0).integers(0, vocabulary, PREFILL)
    whole = mx.array(tokens)[None]
    singles = [mx.array([[token]]) for token in tokens[:DECODED].tolist()]

    def prefill() -> None:
        mx.eval(router.model(whole))

    def decode_block() -> None:
        for token in singles:
            mx.eval(router.model(token))

    def decode_model() -> None:
        for _ in generate_step(whole[0, :16], router.model, max_tokens=DECODED):
            pass

    is_block = isinstance(router.model, OneBlock)
    return {"prefill": prefill, "decoding": decode_block if is_block else decode_model}


def measure(router: ExpertRouter, work: Unit, repetitions: int, what: str) -> list[Measured]:
    """Run every variant in turns."""

    def watched(watch: Watch) -> Unit:
        def run() -> None:
            with watch(router):
                work()

        return run

    variants = {name: watched(watch) for name, watch in VARIANTS.items()}
    return in_turns(variants, repetitions, what)


def show(console: Console, title: str, results: list[Measured], repetitions: int) -> None:
    """Print the ratios of one kind of work."""
    table = Table(title=f"{title} ({repetitions} repetitions)", title_justify="left")
    table.add_column("variant")
    for heading in ("CPU, fastest", "CPU ratio", "of fastest", "wall ratio", "of fastest"):
        table.add_column(heading, justify="right")
    plain = results[0]
    for each in results:
        table.add_row(
            each.variant,
            f"{min(each.cpu) * 1e3:.1f} ms",
            f"{paired(each.cpu, plain.cpu):.3f}",
            f"{min(each.cpu) / min(plain.cpu):.3f}",
            f"{paired(each.wall, plain.wall):.3f}",
            f"{min(each.wall) / min(plain.wall):.3f}",
        )
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--block", choices=["qwen3_moe", "deepseek_v3"], default="qwen3_moe")
    parser.add_argument("--prefill-repetitions", type=int, default=7)
    parser.add_argument("--decoding-repetitions", type=int, default=21)
    parser.add_argument("--json", type=Path, help="also write all samples to this file")
    options = parser.parse_args()
    console = Console()
    routers = [block_router(options.block)]
    try:
        routers.append(ExpertRouter.from_pretrained("demo"))
    except MoeLensError as error:
        console.print(f"demo is left out: {error}")
    repetitions = {
        "prefill": options.prefill_repetitions,
        "decoding": options.decoding_repetitions,
    }
    report: dict[str, Any] = {**where(), "results": {}}
    for router in routers:
        for kind, work in units(router).items():
            amount = f"{PREFILL} tokens" if kind == "prefill" else f"{DECODED} tokens, one by one"
            title = f"{router.name}, {kind}: {amount}"
            results = measure(router, work, repetitions[kind], title)
            show(console, title, results, repetitions[kind])
            report["results"][title] = [asdict(each) for each in results]
            ids = next(each for each in results if each.variant == "ids and weights")
            ratio = paired(ids.cpu, results[0].cpu)
            met = "met" if ratio <= TARGETS[kind] else "missed"
            console.print(f"ids and weights: {ratio:.3f}, target {TARGETS[kind]:.2f} {met}\n")
    if options.json is not None:
        options.json.write_text(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
