"""Which heat map is asked for, and the result it is made from."""

from __future__ import annotations

import re
from contextlib import nullcontext
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Any

from moe_lens.errors import UsageError
from moe_lens.telling import Stage, begin

from .models import load
from .progress import stages
from .routing import Routing

if TYPE_CHECKING:
    from moe_lens.analysis.heatmap import Heatmap


READING = Stage("reading", "tokens")


class View(StrEnum):
    """What a heat map shows."""

    LAYERS = "layers"
    CHOICES = "choices"
    TOKENS = "tokens"


@dataclass(frozen=True)
class Wanted:
    """One heat map: the view and the part of the text."""

    view: View
    layer: int | None
    number: int
    start: int
    stop: int | None
    only_used: bool
    label: str | None

    @classmethod
    def read(
        cls,
        view: View | None,
        layer: int | None,
        number: int | None,
        tokens: str | None,
        only_used: bool,
        label: str | None,
        *,
        by_prompt: bool,
    ) -> Wanted:
        """Check that the options fit each other.

        Args:
            by_prompt: Whether the text is one prompt, whose tokens are shown unless the view
                says otherwise.

        Raises:
            UsageError: If they do not.
        """
        start, stop = read_span(tokens)
        if view is None:
            by_token = by_prompt or number is not None or tokens is not None
            view = View.CHOICES if by_token else View.LAYERS
            view = View.TOKENS if layer is not None or only_used else view
        if view is View.TOKENS and layer is None:
            raise UsageError("tokens by experts are shown for one layer: name it with --layer N")
        given = {
            "--layer": (layer is not None, (View.TOKENS,)),
            "--only-used": (only_used, (View.TOKENS,)),
            "--tokens": (tokens is not None, (View.TOKENS, View.CHOICES)),
            "--number": (number is not None, (View.TOKENS, View.CHOICES)),
            "--label": (label is not None, (View.LAYERS,)),
        }
        for option, (there, views) in given.items():
            if there and view not in views:
                raise UsageError(
                    f"{option} means nothing in --view {view}: it belongs to --view "
                    + " or ".join(views)
                )
        if by_prompt and number is not None:
            raise UsageError("--number chooses from --data or a run, but --prompt is one prompt")
        return cls(view, layer, number or 0, start, stop, only_used, label)

    def of(self, source: Any) -> Heatmap:
        """The heat map of a trace or profile (layers), or of the routes of a prompt."""
        from moe_lens.analysis.heatmap import first_choice, layer_expert, token_expert

        if self.view is View.LAYERS:
            return layer_expert(source, self.label)
        if self.view is View.CHOICES:
            return first_choice(source, start=self.start, stop=self.stop)
        assert self.layer is not None
        return token_expert(
            source, self.layer, start=self.start, stop=self.stop, only_used=self.only_used
        )


def read_span(text: str | None) -> tuple[int, int | None]:
    """``10:40`` as (10, 40); either side may be left out.

    Raises:
        UsageError: If it is written otherwise.
    """
    found = re.fullmatch(r"(\d*):(\d*)", text or ":", re.ASCII)
    if found is None:
        raise UsageError(f"--tokens takes FROM:TO, such as 0:40, not {text!r}")
    return int(found[1] or 0), int(found[2]) if found[2] else None


def of_run(run: str, wanted: Wanted) -> tuple[Heatmap, str]:
    """The heat map of a recorded run, and the name of the model that ran."""
    from moe_lens import Trace

    trace = Trace.open(run)
    source = trace if wanted.view is View.LAYERS else trace.prompt(wanted.number)
    return wanted.of(source), str(trace.model["name"])


@dataclass(frozen=True)
class Text:
    """What a model is to read: one prompt, or data."""

    prompt: str | None
    data: str | None
    sample_size: int | None
    sequence_length: int | None
    chat_template: bool
    seed: int


def of_model(
    model: str,
    text: Text,
    wanted: Wanted,
    routing: Routing,
    trust_remote_code: bool,
    kernel: str | None,
    stream: bool | None,
) -> tuple[Heatmap, str]:
    """The heat map of a model that reads `text` now, and its name."""
    from moe_lens import Prompt, read_corpus

    corpus = None if text.data is None else read_corpus(text.data)
    if corpus is not None and text.sample_size is not None:
        corpus = corpus.sample(text.sample_size, text.seed)
    if corpus is not None and wanted.view is not View.LAYERS and wanted.number >= len(corpus):
        raise UsageError(
            f"there is no prompt {wanted.number}: {text.data} has prompts 0 to {len(corpus) - 1}"
        )
    router = load(model, trust_remote_code, kernel, stream)
    settings: dict[str, Any] = {
        "sequence_length": text.sequence_length,
        "chat_template": text.chat_template,
    }
    from moe_lens.recording import record_profile, record_prompt

    with router.override(routing.overrides(router)) if routing else nullcontext():
        if corpus is not None and wanted.view is View.LAYERS:
            with stages() as show:
                source: Any = record_profile(
                    router, corpus, vocabulary=False, progress=begin(show, READING), **settings
                )
        else:
            prompt = Prompt(text.prompt) if corpus is None else corpus.prompts[wanted.number]
            source = record_prompt(router, prompt, **settings)
    name = f"{router.name}, {routing.describe()}" if routing else router.name
    return wanted.of(source), name
