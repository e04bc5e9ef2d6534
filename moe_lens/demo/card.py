"""Measure a trained demo model and write its card: ``python -m moe_lens.demo.card DIR``.

Every number of ``DIR/README.md`` is measured here and also stored in ``DIR/card.json``. The text
baselines need the training tokens, which are made again from the running interpreter's library;
run the card with the Python version that trained the model.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import platform
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm import load
from mlx_lm.utils import dequantize_model
from tokenizers import Tokenizer

from moe_lens.demo import measure, network, upcycle
from moe_lens.demo.batches import load_prompts, tokenise
from moe_lens.demo.card_text import render
from moe_lens.demo.domains import DOMAINS, SHARES, build_corpus
from moe_lens.demo.tokenizer import VOCABULARY

SAMPLE_PROMPTS = (
    "37+58=",
    "sort d b c =",
    '{"id": 12, "name": "',
    "<!DOCTYPE html>\n",
    "def is_prime(n):\n",
    "Return a list of",
)


def main(arguments: list[str] | None = None) -> None:
    """Measure, then write ``card.json`` and ``README.md``."""
    parser = argparse.ArgumentParser(prog="python -m moe_lens.demo.card", description=__doc__)
    parser.add_argument("folder", type=Path, help="model folder written by moe_lens.demo.train")
    parser.add_argument("--corpus", type=Path, help="folder of the prompts")
    options = parser.parse_args(arguments)
    numbers = measure_all(options.folder, options.corpus or find_corpus(options.folder))
    text = json.dumps(numbers, indent=2)
    (options.folder / "card.json").write_text(text + "\n", encoding="utf-8")
    (options.folder / "README.md").write_text(render(numbers), encoding="utf-8")


def find_corpus(folder: Path) -> Path:
    """Where the prompts lie: in the model folder after training, beside it in this package."""
    inside = folder / "corpus"
    return inside if inside.is_dir() else folder.resolve().parent / "corpus"


def measure_all(folder: Path, corpus_folder: Path) -> dict[str, Any]:
    """All numbers of the card as one JSON-ready mapping."""
    model, tokenizer = load(str(folder))
    training = json.loads((folder / "training.json").read_text(encoding="utf-8"))
    pairs = upcycle.load_pairs(folder / "upcycling.json")
    prompts = load_prompts(corpus_folder / "evaluation.jsonl")
    labels = [prompt["label"] for prompt in prompts]
    ids = [tokenizer.encode(prompt["text"]) for prompt in prompts]
    samples = {text: _continue(model, tokenizer, text) for text in SAMPLE_PROMPTS}
    quantised_loss = _mean(measure.losses(model, ids[::16]))

    model = dequantize_model(model)
    numbers: dict[str, Any] = {
        "training": training,
        "shares": SHARES,
        "files": _files(folder),
        "parameters": _parameters(model),
        "prompts": {
            split: _prompt_sizes(load_prompts(corpus_folder / f"{split}.jsonl"), tokenizer)
            for split in ("calibration", "evaluation")
        },
        "samples": samples,
    }
    with measure.captured(model) as routing:
        losses = measure.losses(model, ids)
    numbers["dequantising_changes_loss_by"] = _mean(losses[::16]) - quantised_loss
    numbers["perplexity"] = {
        "model": measure.perplexities(losses, labels),
        "baselines": _baselines(folder, ids, labels, training["seed"]),
    }
    numbers["loss"] = _domain_mean(losses, labels)
    right, total = measure.addition_accuracy(model, tokenizer)
    numbers["addition"] = {"right": right, "total": total}
    numbers["strings"] = {
        task: {"right": right, "total": total}
        for task, (right, total) in measure.string_accuracy(
            model, tokenizer, training["seed"]
        ).items()
    }
    experts = 2 * len(next(iter(pairs.values())))
    numbers["specialisation"] = measure.specialisation(routing, labels, experts)
    numbers["pairs"] = _pair_tables(measure.expert_similarity(model, routing), pairs)
    numbers["merged"] = _merged(model, pairs, tokenizer, ids, labels)
    numbers["merged"]["loss_change"] = numbers["merged"]["loss"] - numbers["loss"]
    numbers["python"] = platform.python_version()
    return numbers


def _continue(model: Any, tokenizer: Any, text: str, steps: int = 32) -> str:
    """A greedy continuation by the stock, quantised model."""
    return str(tokenizer.decode(measure.greedy(model, [tokenizer.encode(text)], steps)[0]))


def _mean(losses: list[measure.Floats]) -> float:
    return float(np.concatenate(losses).mean())


def _domain_mean(losses: list[measure.Floats], labels: list[str]) -> float:
    """Mean over domains of the mean token loss, nats: all domains weigh the same."""
    return float(np.mean(np.log(list(measure.perplexities(losses, labels).values()))))


def _files(folder: Path) -> dict[str, Any]:
    """Sizes in bytes, and the fingerprint of the weights."""
    weights = folder / "model.safetensors"
    return {
        "weights_bytes": weights.stat().st_size,
        "tokenizer_bytes": (folder / "tokenizer.json").stat().st_size,
        "sha256": hashlib.sha256(weights.read_bytes()).hexdigest(),
    }


def _parameters(model: Any) -> dict[str, int]:
    """Parameters in all, in the experts, and those that one token's forward pass touches."""
    sizes = {name: int(array.size) for name, array in network.flat_weights(model).items()}
    experts = sum(size for name, size in sizes.items() if ".switch_mlp." in name)
    used = experts * model.args.num_experts_per_tok // model.args.num_experts
    total = sum(sizes.values())
    return {"total": total, "experts": experts, "active": total - experts + used}


def _prompt_sizes(prompts: list[dict[str, str]], tokenizer: Any) -> dict[str, int]:
    lengths = [len(tokenizer.encode(prompt["text"])) for prompt in prompts]
    return {
        "prompts": len(prompts),
        "tokens": sum(lengths),
        "shortest": min(lengths),
        "longest": max(lengths),
    }


def _baselines(
    folder: Path, ids: list[list[int]], labels: list[str], seed: int
) -> dict[str, dict[str, float]]:
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    corpus = build_corpus(seed)
    streams = {name: tokenise(corpus.texts(name, "train"), tokenizer) for name in DOMAINS}
    return measure.baseline_perplexities(streams, ids, labels, VOCABULARY)


def _pair_tables(
    similarity: dict[int, dict[str, measure.Floats]], pairs: upcycle.Pairs
) -> dict[int, list[dict[str, Any]]]:
    """Per layer and pair the three likenesses, and the nearest expert that is not the partner.

    ``score`` is the mean of Jaccard overlap and output cosine; the nearest other expert is the
    one of highest score with either member of the pair.
    """
    tables: dict[int, list[dict[str, Any]]] = {}
    for layer, matrices in similarity.items():
        score = (matrices["jaccard"] + matrices["output"]) / 2
        rows = []
        for first, second in pairs[layer]:
            others = [e for e in range(len(score)) if e not in (first, second)]
            nearest = max(others, key=lambda e: max(score[first, e], score[second, e]))
            member = first if score[first, nearest] >= score[second, nearest] else second
            rows.append(
                {
                    "experts": [first, second],
                    **{name: float(matrix[first, second]) for name, matrix in matrices.items()},
                    "score": float(score[first, second]),
                    "nearest": {
                        "experts": [member, nearest],
                        "jaccard": float(matrices["jaccard"][member, nearest]),
                        "output": float(matrices["output"][member, nearest]),
                        "score": float(score[member, nearest]),
                    },
                }
            )
        tables[layer] = rows
    return tables


def _merged(
    model: Any, pairs: upcycle.Pairs, tokenizer: Any, ids: list[list[int]], labels: list[str]
) -> dict[str, Any]:
    """The model with every pair merged back to one expert (means of weights and router rows)."""
    weights = upcycle.merge_pairs(network.flat_weights(model), pairs)
    experts = len(next(iter(pairs.values())))
    merged = network.build(network.configuration(experts, top_k=1))
    merged.load_weights(list(weights.items()))
    mx.eval(merged.parameters())
    losses = measure.losses(merged, ids)
    right, total = measure.addition_accuracy(merged, tokenizer)
    return {
        "loss": _domain_mean(losses, labels),
        "perplexity": measure.perplexities(losses, labels),
        "addition": {"right": right, "total": total},
    }


if __name__ == "__main__":
    main()
