"""README.md of the smaller model: what it is made from, what was done, what was lost."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from moe_lens import __version__
from moe_lens.compress.checkpoint.model_file import NAME as MODEL_FILE
from moe_lens.compress.choice.trial_table import choice_rows, skipped_lines
from moe_lens.compress.plan.plan import Plan
from moe_lens.compress.tensors.parent import Parent
from moe_lens.compress.tensors.regroup import describe
from moe_lens.compress.verification.verification import DEFINITIONS, Verification

from .commands import Commands
from .pictures import Picture
from .report import check_lines, drift_rows, loss_rows, markdown, pair_rows, plan_rows, size_rows

_PAIRS = 64
"""Rows of the card's table of merged pairs; `plan.json` has all."""

_TAGS = {
    "merge": ("merged-experts",),
    "prune": ("pruned-experts",),
    "channels": ("narrowed-experts",),
}

_LIBRARIES = {"mlx": "mlx", "hf": "transformers"}
"""What the hub offers for a model, by the layout of its weights."""

_KEPT = ("language", "license", "license_name", "license_link", "pipeline_tag")


def write_card(
    folder: Path,
    parent: Parent,
    plan: Plan,
    commands: Commands,
    verification: Verification | None = None,
    pictures: Sequence[Picture] = (),
    *,
    layout: str = "mlx",
) -> None:
    """Write the model card; without a verification it says that nothing was measured."""
    data = _front_matter(parent, plan, layout)
    tried = [each for each in pictures if each.file.endswith("/methods.png")]
    drawn = [each for each in pictures if each not in tried]
    text = "\n\n".join(
        [
            f"# {_title(plan)}",
            _made_from(plan),
            "## What was done",
            _what(parent, plan),
            *_unread(parent, layout),
            *map(_shown, drawn),
            markdown(*plan_rows(plan)),
            *_pairs(plan),
            *_choice(plan, tried),
            "## What it cost",
            *_cost(verification),
            "## How to load it",
            _loading(plan, layout),
            "## How to make it again",
            *_again(plan, commands),
        ]
    )
    content = f"---\n{data.to_yaml()}\n---\n\n{text}\n"
    (folder / "README.md").write_text(content, encoding="utf-8")


def _front_matter(parent: Parent, plan: Plan, layout: str) -> ModelCardData:
    kept: dict[str, Any] = {}
    card = parent.path / "README.md"
    if card.is_file():
        kept = _metadata(card)
    if "/" in plan.model.name:
        kept["base_model"] = plan.model.name
    tags = [tag for tag in kept.pop("tags", []) if isinstance(tag, str)]
    for tag in ("mlx", "moe-lens", *_TAGS[plan.kind]):
        if tag not in tags:
            tags.append(tag)
    kept.setdefault("pipeline_tag", "text-generation")
    return ModelCardData(library_name=_LIBRARIES[layout], tags=tags, **kept)


def _metadata(card: Path) -> dict[str, Any]:
    """What stays true of the parent's front matter; nothing where it cannot be read."""
    try:
        found = ModelCard.load(card, ignore_metadata_errors=True).data.to_dict()
    except (ValueError, OSError):
        return {}
    return {key: found[key] for key in (*_KEPT, "tags") if key in found}


def _title(plan: Plan) -> str:
    name = plan.model.name.rstrip("/").rpartition("/")[2]
    parts = []
    if plan.kind != "channels":
        parts.append(f"{plan.experts_text} of {plan.model.num_experts} experts")
    if plan.expert_width is not None:
        parts.append(f"{plan.expert_width} of {plan.model.expert_width} channels in each")
    return ", ".join([name, *parts])


def _made_from(plan: Plan) -> str:
    model = plan.model
    return (
        f"Made from `{model.name}` ({model.model_type}) by moe-lens {__version__}: "
        f"{plan.summary()}. `plan.json` says what became of every expert, `report.json` holds all "
        "of this page for programs."
    )


def _again(plan: Plan, commands: Commands) -> list[str]:
    """Command lines that can be pasted, and what they need."""
    lines = commands.to_dict()
    text = [
        "In the folder of this model, from its `plan.json`; the same bytes, if the parent is the "
        f"same (fingerprint `{plan.model.fingerprint[:16]}`, which is checked):",
        _shell(lines["plan"]),
    ]
    if lines["compress"] is not None:
        text += [
            "All of it, from the calibration text on. On another kind of processor sums may round "
            "differently, and a close decision may then fall the other way:",
            _shell(lines["compress"]),
        ]
    if lines["verify"] is not None:
        text += ["The measurement, in the folder of this model:", _shell(lines["verify"])]
    if commands.local:
        text.append(
            "A model or text that lies neither on the hub nor comes with moe-lens is named by the "
            "last part of its path: put yours in its place."
        )
    return text


def _shell(line: str | None) -> str:
    return f"```bash\n{line}\n```"


def _shown(picture: Picture) -> str:
    return f"![{picture.text}]({picture.file})"


def _what(parent: Parent, plan: Plan) -> str:
    corpus = plan.corpus
    text = (
        f"Calibrated on {corpus.tokens} tokens of {corpus.prompts} prompts "
        f"(`{corpus.name}`, SHA-256 `{corpus.fingerprint[:16]}`). "
    )
    if plan.kind == "merge":
        threshold = plan.settings.get("threshold")
        which = "Experts" if threshold is None else f"Experts whose similarity reaches {threshold}"
        text += (
            f"{which} were merged: the weights of a group are the weighted mean of its members'. "
            "Experts that were not merged are the parent's, byte for byte. "
            f"{plan.definition}. {plan.evidence.get('scale', '')}"
        )
    elif plan.kind == "prune":
        text += "The least salient experts were removed with their router rows"
        whole = plan.expert_width is None
        text += "; the others are the parent's, byte for byte. " if whole else ". "
    if plan.expert_width is not None:
        text += (
            f"Of the {plan.model.expert_width} channels inside each expert the "
            f"{plan.expert_width} most important stay. "
        )
        again = describe(parent.down_quantisations().values(), plan.expert_width)
        text += f"{again[0].upper()}{again[1:]}. " if again else ""
    if plan.kind != "merge":
        text += f"Judged by: {plan.definition}."
    choice = plan.evidence.get("experts_per_token")
    if isinstance(choice, dict) and choice.get("text"):
        text += f" {choice['text']}"
    repair = plan.evidence.get("router_repair")
    if isinstance(repair, dict) and repair.get("text"):
        said = str(repair["text"])
        text += f" {said[0].upper()}{said[1:]}."
    return text.strip()


def _unread(parent: Parent, layout: str) -> list[str]:
    """What the parent's files hold besides the language model."""
    notes = parent.unread.notes(layout)
    return ["\n".join(f"- {note[0].upper()}{note[1:]}." for note in notes)] if notes else []


def _choice(plan: Plan, tried: Sequence[Picture]) -> list[str]:
    """All methods that were tried for this size."""
    choice = plan.evidence.get("choice")
    if not isinstance(choice, dict):
        return []
    said, validation = str(choice["text"]), choice["validation"]
    return [
        "## How the method was chosen",
        f"{said[0].upper()}{said[1:]}. The validation text is a part of the calibration text that "
        f"made no plan (SHA-256 `{validation['fingerprint'][:16]}`): {choice['definition']}.",
        *map(_shown, tried),
        markdown(*choice_rows(choice)),
        *(["\n".join(f"- {line}" for line in skipped_lines(choice))] if choice["skipped"] else []),
    ]


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
        *([markdown(*drift_rows(verification))] if verification.drift.layers else []),
        markdown(*size_rows(verification)),
        "\n".join(f"- {line}." for line in check_lines(verification)),
        meanings,
    ]


def _loading(plan: Plan, layout: str) -> str:
    argument, why = "", ""
    if layout == "hf":
        why = (
            "\n\nNames and tensors are those of Hugging Face transformers:\n\n"
            "```python\n"
            "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
            'model = AutoModelForCausalLM.from_pretrained("path/to/this/folder")\n'
            'tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder")\n'
            "```"
        )
    if plan.per_layer:
        argument = ", trust_remote_code=True"
        why = (
            "\n\nIts layers keep different numbers of experts, for which mlx-lm has no number in "
            f"config.json. So it must be allowed to run `{MODEL_FILE}` of this folder, which "
            "builds mlx-lm's own model once for each number and takes every layer from the one "
            "that has its number; it reads nothing but config.json."
        )
    return (
        "```python\n"
        "from mlx_lm import generate, load\n\n"
        f'model, tokenizer = load("path/to/this/folder"{argument})  # or its name on the hub\n'
        'print(generate(model, tokenizer, prompt="hello", max_tokens=64))\n'
        f"```{why}"
    )
