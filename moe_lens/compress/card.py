"""README.md of the smaller model: what it is made from, what was done, what was lost."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from moe_lens import __version__

from .parent import Parent
from .plan import Plan
from .report import loss_rows, markdown, pair_rows, plan_rows, size_rows
from .verification import DEFINITIONS, Verification

_PAIRS = 64
"""Rows of the card's table of merged pairs; `plan.json` has all."""

_KEPT = ("language", "license", "license_name", "license_link", "pipeline_tag")


def write_card(
    folder: Path, parent: Parent, plan: Plan, verification: Verification | None = None
) -> None:
    """Write the model card; without a verification it says that nothing was measured."""
    data = _front_matter(parent, plan)
    text = "\n\n".join(
        [
            f"# {_title(plan)}",
            _made_from(parent, plan),
            "## What was done",
            _what(plan),
            markdown(*plan_rows(plan)),
            *_pairs(plan),
            "## What it cost",
            *_cost(verification),
            "## How to load it",
            _loading(),
        ]
    )
    content = f"---\n{data.to_yaml()}\n---\n\n{text}\n"
    (folder / "README.md").write_text(content, encoding="utf-8")


def _front_matter(parent: Parent, plan: Plan) -> ModelCardData:
    kept: dict[str, Any] = {}
    card = parent.path / "README.md"
    if card.is_file():
        kept = _metadata(card)
    if "/" in plan.model.name:
        kept["base_model"] = plan.model.name
    tags = [tag for tag in kept.pop("tags", []) if isinstance(tag, str)]
    for tag in ("mlx", "moe-lens", f"{plan.kind}d-experts"):
        if tag not in tags:
            tags.append(tag)
    kept.setdefault("pipeline_tag", "text-generation")
    return ModelCardData(library_name="mlx", tags=tags, **kept)


def _metadata(card: Path) -> dict[str, Any]:
    """What stays true of the parent's front matter; nothing where it cannot be read."""
    try:
        found = ModelCard.load(card, ignore_metadata_errors=True).data.to_dict()
    except (ValueError, OSError):
        return {}
    return {key: found[key] for key in (*_KEPT, "tags") if key in found}


def _title(plan: Plan) -> str:
    name = plan.model.name.rstrip("/").rpartition("/")[2]
    return f"{name}, {plan.num_experts} of {plan.model.num_experts} experts"


def _made_from(parent: Parent, plan: Plan) -> str:
    model = plan.model
    return (
        f"Made from `{model.name}` ({model.model_type}) by moe-lens {__version__}: "
        f"{plan.summary()}. `plan.json` says what became of every expert and can be applied again "
        f"to the same checkpoint (fingerprint `{model.fingerprint[:16]}`)."
    )


def _what(plan: Plan) -> str:
    corpus = plan.corpus
    text = (
        f"Calibrated on {corpus.tokens} tokens of {corpus.prompts} prompts "
        f"(`{corpus.name}`, SHA-256 `{corpus.fingerprint[:16]}`). "
    )
    if plan.kind == "merge":
        text += (
            f"Experts whose similarity reaches {plan.settings.get('threshold')} were merged: the "
            "weights of a group are the mean of its members' weights by how often each was "
            "chosen, router rows likewise. Experts that were not merged are the parent's, byte "
            f"for byte. {plan.definition}. {plan.evidence.get('scale', '')}"
        )
    else:
        text += (
            f"The least salient experts were removed with their router rows "
            f"(ratio {plan.settings.get('ratio')}); the others are the parent's, byte for byte. "
            f"Saliency: {plan.definition}."
        )
    choice = plan.evidence.get("experts_per_token")
    if isinstance(choice, dict) and choice.get("text"):
        text += f" {choice['text']}"
    return text.strip()


def _pairs(plan: Plan) -> list[str]:
    names, rows = pair_rows(plan)
    if not rows:
        return []
    shown = sorted(rows, key=lambda row: row[2])[:_PAIRS]
    left = f", the {_PAIRS} lowest of {len(rows)}" if len(rows) > _PAIRS else ""
    return [f"The least similar pair of every merged group{left}:", markdown(names, shown)]


def _cost(verification: Verification | None) -> list[str]:
    if verification is None:
        return ["Nothing was measured yet: run `moe-lens compress` with a text for evaluation."]
    corpus = verification.corpus
    meanings = "\n".join(f"- {name}: {text}." for name, text in DEFINITIONS.items())
    return [
        f"Measured on {corpus.tokens} tokens of {corpus.prompts} held-out prompts "
        f"(`{corpus.name}`, SHA-256 `{corpus.fingerprint[:16]}`), "
        f"computed on the {verification.device}.",
        *(f"**Warning:** {each}." for each in verification.warnings),
        markdown(*loss_rows(verification)),
        markdown(*size_rows(verification)),
        meanings,
    ]


def _loading() -> str:
    return (
        "```python\n"
        "from mlx_lm import generate, load\n\n"
        'model, tokenizer = load("path/to/this/folder")\n'
        'print(generate(model, tokenizer, prompt="hello", max_tokens=64))\n'
        "```"
    )
