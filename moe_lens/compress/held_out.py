"""Text that measures the loss must not be text that made the plan."""

from __future__ import annotations

import json

from moe_lens.corpus import Corpus, Prompt
from moe_lens.errors import UsageError

_LONG = 64
"""Characters from which a prompt that stands inside another counts as the same text."""

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
