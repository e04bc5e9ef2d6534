"""Text that measures the loss must not be text that made the plan."""

from __future__ import annotations

import json
from dataclasses import replace

from moe_lens.compress.plan.plan import Plan
from moe_lens.corpus import Corpus, Prompt
from moe_lens.errors import UsageError

_LONG = 64
"""Characters from which a prompt that stands inside another counts as the same text."""

EVIDENCE = "calibration_prompts"
"""The key of the hashes of prompts in a plan's evidence."""
_DIGITS = 12

REMEDY = "give another text for evaluation (--eval-data)"


def check_held_out(calibration: Corpus, evaluation: Corpus) -> None:
    """Raise UsageError if the two texts are one, share a prompt, or one holds the other's.

    A prompt of at least 64 characters that stands inside a prompt of the other text counts as
    shared, so that the same file cut differently is noticed.
    """
    if calibration.fingerprint == evaluation.fingerprint:
        raise UsageError(
            f"the text for evaluation ({evaluation.name}) is the text that calibrates; a loss "
            f"measured on it would be too good: {REMEDY}"
        )
    shared = _shared(calibration, evaluation)
    if shared:
        raise UsageError(
            f"{shared} of {len(evaluation.prompts)} prompts for evaluation ({evaluation.name}) "
            f"also stand in the calibration text ({calibration.name}); a loss measured on them "
            f"would be too good: {REMEDY}, or take them out"
        )


def remember_text(plan: Plan, calibration: Corpus) -> Plan:
    """`plan` with the prompts that made it as evidence: 12 hexadecimal digits of each SHA-256."""
    prompts = sorted(_hashes(calibration))
    return replace(plan, evidence={**plan.evidence, EVIDENCE: prompts})


def check_not_remembered(plan: Plan, name: str, evaluation: Corpus) -> None:
    """Raise UsageError if a prompt of `evaluation` is among those that made `plan`.

    Args:
        plan: Of the smaller model; one that remembers no prompts is known by its whole text only.
        name: Of the smaller model, for the message.
        evaluation: The text that would measure it.
    """
    known = set(plan.evidence.get(EVIDENCE, ()))
    own = _hashes(evaluation)
    shared = len(known & own)
    if shared or plan.corpus.fingerprint == evaluation.fingerprint:
        raise UsageError(
            f"{shared or len(own)} of {len(own)} different prompts for evaluation "
            f"({evaluation.name}) calibrated {name}; a loss measured on them would be too good: "
            f"{REMEDY}"
        )


def _hashes(corpus: Corpus) -> set[str]:
    return {prompt.sha256[:_DIGITS] for prompt in corpus.prompts if _text(prompt)}


def _shared(calibration: Corpus, evaluation: Corpus) -> int:
    seen = {_text(prompt) for prompt in calibration.prompts} - {""}
    around = "\0".join(sorted(seen))
    own = {_text(prompt) for prompt in evaluation.prompts}
    inside = "\0".join(sorted(own))
    swallowed = [text for text in seen if len(text) >= _LONG and text in inside]
    shared = 0
    for prompt in evaluation.prompts:
        text = _text(prompt)
        shared += (
            text in seen
            or (len(text) >= _LONG and text in around)
            or any(part in text for part in swallowed)
        )
    return shared


def _text(prompt: Prompt) -> str:
    if prompt.messages is not None:
        return json.dumps([dict(message) for message in prompt.messages], sort_keys=True)
    return (prompt.text or "").strip()
