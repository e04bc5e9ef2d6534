"""Every model type merges by every method, and stock mlx-lm loads what comes out."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import pytest
from mlx_lm.tokenizer_utils import TokenizerWrapper
from mlx_lm.utils import load_model
from transformers import PreTrainedTokenizerFast

from moe_lens.compress import Plan, calibrate
from moe_lens.compress.checkpoint.checkpoint import write_checkpoint
from moe_lens.compress.merging.merging import Merging
from moe_lens.compress.merging.planning import plan_merge_to
from moe_lens.compress.tensors.parent import Parent
from moe_lens.corpus import read_corpus
from moe_lens.experts.layer_sample import sample_layers
from moe_lens.router import ExpertRouter
from tiny_models import CONFIGS, save_checkpoint
from twins import write_words

METHODS = (
    Merging("complete", "frequency", "none", "mean"),
    Merging("hc-smoe", "saliency", "weights", "fitted"),
    Merging("m-smoe", "equal", "activations", "dominant"),
    Merging("ream", "saliency", "both", "fitted"),
)

IN_4_BIT = ("qwen3_moe", "gpt_oss", "deepseek_v3", "dbrx", "gemma4", "llama4", "longcat_flash")

TOKENS = [[1, 5, 9, 3, 7, 2, 8, 4]]


def open_router(folder: Path, words: Path) -> ExpertRouter:
    """With the tokenizer of `words`: two of the tiny configurations do not suit their own."""
    model, config = load_model(folder)
    tokenizer = TokenizerWrapper(PreTrainedTokenizerFast.from_pretrained(words))
    return ExpertRouter(model, tokenizer, config, path=folder)


def write_smaller(plan: Plan, source: Path, folder: Path) -> Path:
    """Without `write`, which opens the tokenizer."""
    model, config = load_model(source, lazy=True)
    folder.mkdir()
    write_checkpoint(Parent.of(model, None, config, source), plan, folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "quantise"), [*((name, None) for name in CONFIGS), *((name, 4) for name in IN_4_BIT)]
)
def test_every_model_type_merges_by_every_method(
    name: str, quantise: int | None, tmp_path: Path
) -> None:
    source = save_checkpoint(name, tmp_path / "source", quantise, experts=16)
    words = save_checkpoint("qwen3_moe", tmp_path / "words")
    router = open_router(source, words)
    corpus = read_corpus(write_words(tmp_path / "words.jsonl", 3, 1, words=16))
    calibration = calibrate(router, corpus)
    tokens = corpus.tokenize(router.tokenizer, 32)
    samples = sample_layers(router, tokens, router_inputs=True)
    for number, merging in enumerate(METHODS):
        plan = plan_merge_to(calibration, 8, merging=merging, samples=samples)
        smaller = open_router(write_smaller(plan, source, tmp_path / str(number)), words)
        assert {layer.num_experts for layer in smaller.layers} == {8}
        assert bool(mx.isfinite(smaller.forward(TOKENS)).all())
