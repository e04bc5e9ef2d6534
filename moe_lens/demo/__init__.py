"""The bundled demonstration model: a small mixture of experts with real specialisation.

Importing this package is cheap; it only knows where the files lie. The model is an ordinary
``qwen3_moe`` folder that ``mlx_lm.load`` reads, and the two corpora are JSONL files whose lines
are ``{"text": ..., "label": domain}``. Neither corpus shares a text with the other or with the
training data.

``python -m moe_lens.demo.train --output DIR`` makes all of them again.
"""

from pathlib import Path

__all__ = ["calibration_path", "evaluation_path", "model_path"]

_HERE = Path(__file__).parent


def model_path() -> Path:
    """Folder of the bundled model: weights, tokenizer, model card and ``upcycling.json``."""
    return _HERE / "model"


def calibration_path() -> Path:
    """Held-out prompts of all six domains, meant for measuring what the experts do."""
    return _HERE / "corpus" / "calibration.jsonl"


def evaluation_path() -> Path:
    """Held-out prompts, disjoint from the calibration ones, meant for measuring the damage."""
    return _HERE / "corpus" / "evaluation.jsonl"
