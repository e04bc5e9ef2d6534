"""How often each expert was chosen, whatever the routing comes from."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from moe_lens.errors import UsageError
from moe_lens.profile import Profile, tally
from moe_lens.trace import Routes, Trace

__all__ = ["routed_counts"]


def routed_counts(
    source: Trace | Profile | Routes, label: str | None = None
) -> tuple[NDArray[np.int64], int, int]:
    """Counts [layers, experts] int64, number of tokens and number of prompts of a source.

    Args:
        source: A trace or profile of a corpus, or the routes of a prompt.
        label: Count only prompts with this label.

    Raises:
        UsageError: No prompt has that label.
    """
    if isinstance(source, Profile):
        return _counts_of_profile(source, label)
    if isinstance(source, Routes):
        _refuse_label(label, ())
        return tally.expert_counts(source), len(source), int((source.position == 0).sum())
    if label is not None:
        _refuse_label(label, source.label_names)
    wanted = np.array([label is None or label == name for name in source.labels])
    counts = np.zeros((len(source.layers), source.router_width), dtype=np.int64)
    for routes in source.shards():
        counts += tally.expert_counts(routes.take(np.flatnonzero(wanted[routes.prompt])))
    lengths = source.prompt_tokens[wanted]
    return counts, int(lengths.sum()), int((lengths > 0).sum())


def _counts_of_profile(profile: Profile, label: str | None) -> tuple[NDArray[np.int64], int, int]:
    if label is None:
        return profile.counts, profile.num_tokens, profile.num_prompts
    _refuse_label(label, profile.labels)
    place = profile.labels.index(label)
    tokens, prompts = profile.label_tokens[place], profile.label_prompts[place]
    return profile.label_counts[place], int(tokens), int(prompts)


def _refuse_label(label: str | None, names: tuple[str, ...]) -> None:
    if label is not None and label not in names:
        have = f"the labels are {', '.join(names)}" if names else "these prompts have no labels"
        raise UsageError(f"no prompt has the label {label!r}; {have}")
